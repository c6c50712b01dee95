"""Convert states of earlier formats to the present format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sftstream.identity import FORMAT


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
        return {**state, "identity": {**identity, "format": 4}}
    raise ValueError(
        f"the state has format {number}, and this version of sftstream reads formats 3 and {FORMAT}; "
        "resume with the version that wrote the state"
    )
