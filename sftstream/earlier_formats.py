"""Convert states of earlier formats to the present format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec

from sftstream.identity import FORMAT
from sftstream.records import Amount


def in_present_format(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a stored state in the present format.

    A state without a format number is returned unchanged; the caller then fails to convert it to a
    record, with an error that names the fault. Raises ValueError for a format that this version
    cannot read.
    """
    identity = state.get("identity")
    number = identity.get("format") if isinstance(identity, Mapping) else None
    if not isinstance(identity, Mapping) or not isinstance(number, int) or number == FORMAT:
        return state
    if number == 3:
        return _from_3(state, identity)
    raise ValueError(
        f"the state has format {number}, and this version of sftstream reads formats 3 and {FORMAT}; "
        "resume with the version that wrote the state"
    )


class _StreamOf3(msgspec.Struct, frozen=True):
    """The part of a stream of format 3 with another meaning in format 4."""

    drawn: tuple[int, ...]
    accepted: tuple[Amount, ...] = ()
    refused: dict[str, int] = {}


def _from_3(state: Mapping[str, Any], identity: Mapping[str, Any]) -> Mapping[str, Any]:
    streams = state.get("streams")
    if isinstance(streams, Mapping):
        streams = {number: _stream_from_3(stream) for number, stream in streams.items()}
    return {**state, "identity": _identity_from_3(identity), "streams": streams}


def _identity_from_3(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an identity with the version of a fast tokenizer apart from its name."""
    name, _, version = str(identity.get("fast_tokenizer") or "").partition(" ")
    return {**identity, "format": 4, "fast_tokenizer": name or None, "versions": {name: version} if name else {}}


def _stream_from_3(stream: Any) -> Any:
    """Return a stream with refusals by source; format 3 counts the reasons of all sources together.

    The number of each source's refused rows is exact. If rows of several sources were refused for
    several reasons, nobody can tell which source had which reason: the most frequent reasons are
    given to the first sources. A damaged stream is returned as given.
    """
    try:
        old = msgspec.convert(stream, _StreamOf3)
    except msgspec.ValidationError:
        return stream
    if not old.drawn:
        return stream
    accepted = old.accepted or (Amount(),) * len(old.drawn)
    left = Counter(old.refused)
    refused = [_part(left, drawn - amount.conversations) for drawn, amount in zip(old.drawn, accepted, strict=False)]
    # More than that are left after an accepted change, which may refuse rows accepted before.
    refused[-1] = dict(Counter(refused[-1]) + left)
    return {**stream, "refused": refused}


def _part(left: Counter[str], count: int) -> dict[str, int]:
    """Return `count` refused rows of `left`, and take the rows away from `left`."""
    part: dict[str, int] = {}
    for reason, rows in left.most_common():
        taken = min(rows, count - sum(part.values()))
        if taken > 0:
            part[reason] = taken
            left[reason] -= taken
    return part
