"""Define the state of a loader: frozen records of counters and references, never of tokens.

The state of a stream has a few kilobytes. The records keep the states of earlier versions readable:
a renamed field keeps its stored name in `msgspec.field(name=...)`, and a field that was added after
`FORMAT` was last raised has the default UNSET and is left out of a state until it has a value.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from sftstream.door import Door
from sftstream.earlier_formats import in_present_format
from sftstream.encoded_stream import WAITING, EncodedStream, encode_stream, with_texts
from sftstream.excerpt import excerpt, one_line
from sftstream.identity import Identity, differences
from sftstream.records import Amount, Ref, Refusal, Segment
from sftstream.sources import Bookmark

CHECKSUM = "checksum"
"""Key in a state dict. Its value is the SHA-256 of all other keys, as JSON with sorted keys."""
FIRST_WITH_CHECKSUM = 4
"""Number of the first format whose states have a checksum."""


class Leftover(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An example that waits for the next window, because no pack of its window is full with it."""

    segment: Segment
    waited: int
    """Number of windows that the example has waited."""


class PastOrder(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The order of a source's rows before an accepted change of the source's files.

    Epochs that were begun before the change keep this order to their end. Two files of 2 and 3
    rows change places during epoch 0: `PastOrder(epochs=1, files=((2, 3), (3, 0)))`.
    """

    epochs: int
    """First epoch with the next order."""
    files: tuple[tuple[int, int], ...]
    """For each file before the change: its number of rows, and the present number of its first
    row."""


PastOrders = Mapping[int, Sequence[PastOrder]]
"""Number of a source -> past orders, oldest first. A source without an entry never changed."""
NO_PAST_ORDERS: PastOrders = MappingProxyType({})


class RowParts(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Number of examples of a row. Needed if settings make several examples from one row, since a
    changed setting may make another number."""

    source: int
    row: int
    epoch: int
    count: int
    """Number of examples; 0 if the row was read by a version without this record."""

    @property
    def ref(self) -> Ref:
        """Reference to the row."""
        return Ref(self.source, self.row, self.epoch)


class StripePosition(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A stream's position in a streamed source, counted in stripes (see `StreamingCursor`)."""

    stripes: int = 0
    """Number of stripes read to the end, over all epochs."""
    rows: int = 0
    """Rows drawn from the current stripe."""


def add_refusals(refused: Sequence[dict[str, int]], more: Iterable[Refusal]) -> tuple[dict[str, int], ...]:
    """Return the counts of refused rows by source and reason, with further refused rows."""
    counts = [Counter(reasons) for reasons in refused]
    for refusal in more:
        counts[refusal.source][refusal.reason] += 1
    return tuple(map(dict, counts))


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """A logical stream's position in its sources."""

    drawn: tuple[int, ...]
    """Rows drawn from each source by the stream, over all epochs."""
    mixed: tuple[int, ...] = ()
    """Amount drawn from each source since the current mixture stage began, in the unit of `mix_by`:
    conversations, tokens or trained tokens."""
    stripe_positions: dict[int, StripePosition] = msgspec.field(name="places", default={})
    """Number of a streamed source -> position in the source."""
    stage: int = 0
    """Number of mixture stages entered."""


class StreamState(Position, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """State of a logical stream after a pack."""

    accepted: tuple[Amount, ...] = ()
    """Amount read from each source, without refused rows."""
    windows: int = 0
    """Number of windows read and divided into packs."""
    planned: tuple[tuple[Segment, ...], ...] = ()
    """Segments of each planned pack that is not yet returned, in order."""
    leftovers: tuple[Leftover, ...] = ()
    exhausted: bool = msgspec.field(name="dry", default=False)
    """True if all conversations were returned in packs."""
    packs: int = 0
    """Packs returned, without empty packs, but with packs that `data.skip` has left empty."""
    conversations: int = 0
    """Conversations returned in packs, or skipped."""
    tokens: int = 0
    """Tokens of the returned and skipped conversations."""
    refused: tuple[dict[str, int], ...] = ()
    """For each source: reason -> number of refused rows."""
    unlisted: tuple[Refusal, ...] = ()
    """Rows refused by a rebase, to be listed in the next pack."""
    notes: dict[str, int] = {}
    """Name of a modification -> number of conversations: truncated, split, a token that crosses the
    border of a span."""
    digests: tuple[int, ...] | UnsetType = UNSET
    """Digest of the examples of each planned pack, then of each leftover. Absent after a rebase up
    to the next window, and in states of format 3."""
    row_parts: tuple[RowParts, ...] | UnsetType = UNSET
    """Waiting rows with several examples. Absent if the settings make one example for each row."""

    bookmarks: dict[int, tuple[Bookmark, ...]] | UnsetType = UNSET
    """Number of a streamed source -> rows from which a resume begins to read, as of the last
    window. Absent if a resume reads each file from the beginning."""

    planning: Literal[4] | UnsetType = UNSET
    """Format with the first stream planned by the same rules as the next windows; absent for a
    stream begun under format 3, which goes on under the rules of that format."""

    @property
    def known_bookmarks(self) -> dict[int, tuple[Bookmark, ...]]:
        """`bookmarks`, or an empty dict if absent."""
        return {} if isinstance(self.bookmarks, UnsetType) else self.bookmarks

    @property
    def waiting(self) -> list[Segment]:
        """Segments of rows that were read but not yet returned: leftovers, then planned packs."""
        return [
            *(leftover.segment for leftover in self.leftovers),
            *(segment for pack in self.planned for segment in pack),
        ]


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A change of data or settings that a resume of the run accepted."""

    packs: int
    """Number of the next pack at the time of the change."""
    differences: tuple[str, ...]

    @property
    def only_skips(self) -> bool:
        """True if the change only skips other rows or steps, so that all draws and waiting rows
        remain as they were."""
        return only_skips(self.differences)


def only_skips(differences: Sequence[str]) -> bool:
    """Return True if all `differences` are in `data.skip`."""
    return all(re.match(r"data\.skip[.:]", difference) for difference in differences)


class DataState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """State of a loader: identity, number of packs, and the states of the logical streams."""

    identity: Identity
    packs: int
    """Packs consumed by all shards; also the number of the next pack."""
    streams: dict[int, StreamState]
    """Number of a logical stream -> its state."""
    history: tuple[Change, ...] = ()
    """Accepted changes of data or settings, oldest first."""
    past_orders: dict[int, tuple[PastOrder, ...]] | UnsetType = UNSET
    """Orders of rows before accepted changes of files. Absent if no such change was accepted."""

    full_digests: dict[int, dict[int, str]] | UnsetType = UNSET
    """Number of a source -> number of a file above 256 MiB -> SHA-256 of all its bytes. A file is
    absent until the digest is computed, and files of a state without it are known by samples."""

    unread_columns: dict[int, tuple[str, ...]] | UnsetType = UNSET
    """Number of a source -> columns, and keys of messages, that no layout reads. Absent until
    `PackLoader.unread_columns` has found any."""

    @property
    def digests_in_full(self) -> dict[int, dict[int, str]]:
        """`full_digests`, or an empty dict if absent."""
        return {} if isinstance(self.full_digests, UnsetType) else self.full_digests

    @property
    def rebased(self) -> bool:
        """True if an accepted change has read waiting rows again, or has divided the draws among
        other streams."""
        return not all(change.only_skips for change in self.history)

    @property
    def orders(self) -> PastOrders:
        """`past_orders`, or an empty dict if absent."""
        return {} if isinstance(self.past_orders, UnsetType) else self.past_orders

    @classmethod
    def parse(cls, state: Mapping[str, Any] | DataState) -> DataState:
        """Return the typed record of a state dict in this format or an earlier one.

        The streams of a state dict are encoded as by `state_dict`, or plain as by `builtins`.

        Raises ValueError with the path of a bad value, or if the state was edited.
        """
        if isinstance(state, DataState):
            return state
        content = {key: value for key, value in state.items() if key != CHECKSUM}
        parsed = cls._convert(_decoded(content))
        if CHECKSUM in state or state["identity"]["format"] >= FIRST_WITH_CHECKSUM:
            _require_unedited(state.get(CHECKSUM), content)
        return parsed

    @classmethod
    def from_parts(cls, run: Mapping[str, Any], streams: Mapping[int, bytes]) -> DataState:
        """Return the state made of a run's state without streams, and of its streams as
        MessagePack.

        Checkpoints store these pieces separately, without the checksum of a state dict, because a
        checkpoint has its own digests. Raises ValueError with the path of a bad value.
        """
        return cls._convert({**run, "streams": {str(n): msgspec.msgpack.decode(blob) for n, blob in streams.items()}})

    @classmethod
    def _convert(cls, content: Mapping[str, Any]) -> DataState:
        try:
            return msgspec.convert(in_present_format(content), cls, str_keys=True)
        except msgspec.ValidationError as error:
            raise ValueError(
                f"this is not a data state of this version: {one_line(error)}; give a state that this version saved"
            ) from None

    def state_dict(self) -> dict[str, Any]:
        """Return a new state dict of JSON-able values with a checksum: see `state_dict_of`."""
        streams = {number: encode_stream(stream) for number, stream in self.streams.items()}
        return state_dict_of(msgspec.structs.replace(self, streams={}), streams)

    def builtins(self) -> dict[str, Any]:
        """Return a new state dict in which the waiting rows are plain lists too, for programs that
        look at each row. Such a state dict can be loaded as well."""
        return _sealed(_builtins(self))


def state_dict_of(run: DataState, streams: Mapping[int, EncodedStream]) -> dict[str, Any]:
    """Return the state dict of a run's state without streams, and of its encoded streams.

    Positions and counters of a stream are plain values. The lists of its waiting rows (`WAITING`)
    are texts, the base64 of MessagePack. So a state dict of 64 streams takes 0.6 ms and
    has some hundred entries. With plain lists it would take 10 ms and have
    thousands of entries, each of which a checkpoint library may save as a key of its own.
    """
    return _sealed({**_builtins(run), "streams": with_texts(streams)})


def _builtins(state: DataState) -> dict[str, Any]:
    # Through JSON, so that a state dict has lists, never tuples, and is equal to one read from a
    # file.
    result: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(state))
    return result


def _sealed(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, CHECKSUM: _checksum(content)}


def _decoded(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state dict with plain lists of waiting rows.

    Raises ValueError for a text that is not the base64 of MessagePack.
    """
    streams = content.get("streams")
    if not isinstance(streams, Mapping):
        return content
    return {**content, "streams": {number: _decoded_stream(number, stream) for number, stream in streams.items()}}


def _decoded_stream(number: object, stream: object) -> object:
    if not isinstance(stream, Mapping):
        return stream
    texts = {name: text for name in WAITING if isinstance(text := stream.get(name), str)}
    with Door(f"the state is damaged: stream {excerpt(number, 12)}"):
        lists = {name: msgspec.msgpack.decode(base64.b64decode(text, validate=True)) for name, text in texts.items()}
    return {**stream, **lists}


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


def _require_unedited(checksum: object, content: Mapping[str, Any]) -> None:
    """Raise ValueError unless `checksum` is the checksum of `content`."""
    if checksum != (now := _checksum(content)):
        found = f"its checksum is {excerpt(checksum, 12)}" if checksum else "it has no checksum"
        raise ValueError(
            f"the state was edited or damaged: {found}, and its content gives {excerpt(now, 12)}; resume from the state "
            "as it was written, and change settings in the config, with data.accept_changed"
        )


StateDict = Mapping[str, Any]


def merge(states: Sequence[StateDict | DataState]) -> dict[str, Any]:
    """Combine the state dicts of all shards after the same step into the state dict of the run.

    The state of a shard whose streams are all exhausted may be of an earlier step. Raises
    ValueError if the states differ in identity or pack number, or have a stream in common.
    """
    parsed = [DataState.parse(state) for state in states]
    if not parsed:
        raise ValueError("merge needs at least one state; pass the states of all shards")
    packs = max(state.packs for state in parsed)
    streams: dict[int, StreamState] = {}
    for index, state in enumerate(parsed):
        changed = differences(msgspec.to_builtins(parsed[0].identity), msgspec.to_builtins(state.identity))
        if changed:
            raise ValueError(
                f"state {index} has other data or settings than state 0: {'; '.join(changed)}; merge states of one run"
            )
        if state.past_orders != parsed[0].past_orders:
            raise ValueError(f"state {index} has other past orders of rows than state 0; merge states of one run")
        if state.packs != packs and not all(s.exhausted for s in state.streams.values()):
            raise ValueError(
                f"state {index} was saved after {state.packs} packs and another state after {packs} packs; "
                "save all states after the same step"
            )
        if twice := streams.keys() & state.streams.keys():
            raise ValueError(
                f"streams {sorted(twice)[:5]} are in state {index} and in an earlier state; pass each shard's state once"
            )
        streams |= state.streams
    digests = _merged_digests(parsed) or UNSET
    merged = msgspec.structs.replace(
        parsed[0], packs=packs, streams=dict(sorted(streams.items())), full_digests=digests
    )
    return merged.state_dict()


def _merged_digests(states: Sequence[DataState]) -> dict[int, dict[int, str]]:
    """Return the full digests that any of the states has; raises ValueError if two differ."""
    merged: dict[int, dict[int, str]] = {}
    for index, state in enumerate(states):
        for source, digests in state.digests_in_full.items():
            known = merged.setdefault(source, {})
            for file, digest in digests.items():
                if known.setdefault(file, digest) != digest:
                    name = state.identity.sources[source].files[file].name
                    raise ValueError(
                        f"{name} has other bytes on the machine of state {index} than on that of an earlier state; "
                        "copy the file to all machines again"
                    )
    return merged
