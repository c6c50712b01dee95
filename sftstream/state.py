"""Positions of streams as frozen values: counters and references, never tokens.

A few kilobytes a stream.

A name in `msgspec.field(name=...)` is the stored name: states of earlier versions stay readable. A
field younger than the format has the default UNSET, and is absent from a state until it has a
value.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from sftstream.earlier_formats import in_present_format
from sftstream.excerpt import excerpt
from sftstream.identity import Identity, differences
from sftstream.records import Amount, Ref, Refusal, Segment

CHECKSUM = "checksum"
"""Key of a state dict: SHA-256 of the rest of the state dict as JSON with sorted keys."""
FIRST_WITH_CHECKSUM = 4
"""First format of states with a checksum."""


class Leftover(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An example without a full pack yet."""

    segment: Segment
    waited: int
    """Windows waited."""


class PastOrder(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The order of a source's rows before an accepted change of the source's files."""

    epochs: int
    """First epoch of the next order."""
    files: tuple[tuple[int, int], ...]
    """Number of rows of each file before the change, and the first row's number now."""


PastOrders = Mapping[int, Sequence[PastOrder]]
"""Past orders by source number, oldest first; a source without an entry never changed."""
NO_PAST_ORDERS: PastOrders = MappingProxyType({})


class RowParts(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The number of examples of a row, for policies with several examples of a row."""

    source: int
    row: int
    epoch: int
    count: int
    """Number of examples; 0 if the row was read by a version without this record."""

    @property
    def ref(self) -> Ref:
        """Reference to the row."""
        return Ref(self.source, self.row, self.epoch)


class ShardPosition(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A stream's position in a streamed source."""

    shards: int = 0
    """Parts of shards read to the end, over all epochs."""
    rows: int = 0
    """Rows drawn from the current part."""


def add_refusals(refused: Sequence[dict[str, int]], more: Iterable[Refusal]) -> tuple[dict[str, int], ...]:
    """Return the counts of refused rows by source and reason, with further refused rows."""
    counts = [Counter(reasons) for reasons in refused]
    for refusal in more:
        counts[refusal.source][refusal.reason] += 1
    return tuple(map(dict, counts))


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """The position of a logical stream's rows."""

    drawn: tuple[int, ...]
    """Rows drawn from each source by the stream, over all epochs."""
    mixed: tuple[int, ...] = ()
    """Conversations, tokens or trained tokens drawn from each source since the current stage of the
    mixture began: the unit of `mix_by`."""
    shard_positions: dict[int, ShardPosition] = msgspec.field(name="places", default={})
    """Positions in streamed sources, by source number."""
    stage: int = 0


class StreamState(Position, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A logical stream after a pack."""

    accepted: tuple[Amount, ...] = ()
    """Amounts read from each source and not refused."""
    windows: int = 0
    """Windows planned."""
    planned: tuple[tuple[Segment, ...], ...] = ()
    """Segments of the next packs, already planned."""
    leftovers: tuple[Leftover, ...] = ()
    exhausted: bool = msgspec.field(name="dry", default=False)
    """No conversation is left."""
    packs: int = 0
    """Packs given, empty packs not counted."""
    conversations: int = 0
    """Conversations given."""
    tokens: int = 0
    """Tokens of the conversations given."""
    refused: tuple[dict[str, int], ...] = ()
    """Rows refused of each source, by reason."""
    unlisted: tuple[Refusal, ...] = ()
    """Rows refused by a rebase; reported with the next pack."""
    notes: dict[str, int] = {}
    """Counts of modified conversations: truncated, split, tokens across a span's border."""
    digests: tuple[int, ...] | UnsetType = UNSET
    """Digests of the examples of each planned pack, then of each leftover; absent after a rebase
    up to the next window, and in states of format 3."""
    row_parts: tuple[RowParts, ...] | UnsetType = UNSET
    """Waiting rows with several examples; absent in states of policies with one example a row."""

    @property
    def waiting(self) -> list[Segment]:
        """Segments read and not given yet: leftovers, then planned packs."""
        return [
            *(leftover.segment for leftover in self.leftovers),
            *(segment for pack in self.planned for segment in pack),
        ]


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A change of data or settings accepted in the course of a run."""

    packs: int
    """Number of the next pack at the time of the change."""
    differences: tuple[str, ...]


class DataState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A loader after some packs: identity, position in the run, and streams by number."""

    identity: Identity
    packs: int
    """Packs consumed by all shards, equal to the number of the next pack."""
    streams: dict[int, StreamState]
    history: tuple[Change, ...] = ()
    """Accepted changes of data or settings, oldest first."""
    past_orders: dict[int, tuple[PastOrder, ...]] | UnsetType = UNSET
    """Orders of rows before accepted changes of files; absent without such a change."""

    @property
    def orders(self) -> PastOrders:
        """`past_orders`, empty if absent."""
        return {} if isinstance(self.past_orders, UnsetType) else self.past_orders

    @classmethod
    def parse(cls, state: Mapping[str, Any] | DataState) -> DataState:
        """Return a state dict of this or an earlier format as a typed record.

        Raises ValueError with the path of a bad value, or if the state was edited.
        """
        if isinstance(state, DataState):
            return state
        content = {key: value for key, value in state.items() if key != CHECKSUM}
        parsed = cls._convert(content)
        if CHECKSUM in state or state["identity"]["format"] >= FIRST_WITH_CHECKSUM:
            _require_unedited(state.get(CHECKSUM), content)
        return parsed

    @classmethod
    def from_parts(cls, run: Mapping[str, Any], streams: Mapping[int, bytes]) -> DataState:
        """Return the state of a run and its streams stored one by one, as MessagePack.

        The parts have no checksum: the store of the parts has its own. Raises ValueError with the
        path of a bad value.
        """
        return cls._convert({**run, "streams": {str(n): msgspec.msgpack.decode(blob) for n, blob in streams.items()}})

    @classmethod
    def _convert(cls, content: Mapping[str, Any]) -> DataState:
        try:
            return msgspec.convert(in_present_format(content), cls, str_keys=True)
        except msgspec.ValidationError as error:
            raise ValueError(f"this is not a data state of this version: {error}") from None

    def builtins(self) -> dict[str, Any]:
        """Return a new state dict of JSON-able values, with a checksum."""
        # By way of JSON, so that tuples are lists before and after a file, and two dicts compare.
        result: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return {**result, CHECKSUM: _checksum(result)}


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


def _require_unedited(checksum: object, content: Mapping[str, Any]) -> None:
    """Raise ValueError unless `checksum` is that of `content`."""
    if checksum != (now := _checksum(content)):
        found = f"its checksum is {excerpt(checksum, 12)}" if checksum else "it has no checksum"
        raise ValueError(
            f"the state was edited or damaged: {found}, and its content gives {excerpt(now, 12)}; resume from the state "
            "as it was written, and change settings in the config, with data.accept_changed"
        )


StateDict = Mapping[str, Any]


def merge(states: Sequence[StateDict | DataState]) -> dict[str, Any]:
    """Combine the state dicts of all shards, taken after an equal number of steps.

    A shard whose streams are all exhausted may stand at an earlier pack. Raises ValueError if the
    states differ in identity or pack number, or share a stream.
    """
    parsed = [DataState.parse(state) for state in states]
    if not parsed:
        raise ValueError("merge needs at least one state")
    packs = max(state.packs for state in parsed)
    streams: dict[int, StreamState] = {}
    for index, state in enumerate(parsed):
        changed = differences(msgspec.to_builtins(parsed[0].identity), msgspec.to_builtins(state.identity))
        if changed:
            raise ValueError(f"state {index} is of other data than state 0: {'; '.join(changed)}")
        if state.past_orders != parsed[0].past_orders:
            raise ValueError(f"state {index} has other past orders of rows than state 0; merge states of one run")
        if state.packs != packs and not all(s.exhausted for s in state.streams.values()):
            raise ValueError(
                f"state {index} stands at pack {state.packs}, another at {packs}; take them after the same step"
            )
        if twice := streams.keys() & state.streams.keys():
            raise ValueError(
                f"streams {sorted(twice)[:5]} are in state {index} and in an earlier state; give "
                "each shard's state once"
            )
        streams |= state.streams
    merged = msgspec.structs.replace(parsed[0], packs=packs, streams=dict(sorted(streams.items())))
    return merged.builtins()


def describe(state: StateDict | DataState) -> str:
    """Return a summary for people: progress, sources, refusals, accepted changes."""
    data = DataState.parse(state)
    lines = [
        *_progress_lines(data),
        *_source_lines(data),
        *_count_lines(data),
        *(f"accepted at pack {c.packs}: {'; '.join(c.differences)}" for c in data.history),
    ]
    if exhausted := sum(stream.exhausted for stream in data.streams.values()):
        lines.append(f"exhausted streams: {exhausted}")
    return "\n".join(lines)


def _progress_lines(data: DataState) -> list[str]:
    streams, identity = data.streams.values(), data.identity
    packs = sum(stream.packs for stream in streams)
    conversations = sum(stream.conversations for stream in streams)
    tokens = sum(stream.tokens for stream in streams)
    # After a change of capacity packs of two sizes were given, and nobody counted how many of each.
    same_capacity = not any(d.startswith("data.capacity:") for change in data.history for d in change.differences)
    fill = f", {tokens / (packs * identity.capacity):.2%} full" if packs and same_capacity else ""
    waiting = sum(len(stream.waiting) for stream in streams)
    return [
        f"pack {data.packs} is next; streams here: {len(streams)} of {identity.streams}",
        f"given: {packs:,} packs, {conversations:,} conversations, {tokens:,} tokens{fill}",
        f"read and waiting: {waiting:,} conversations",
    ]


def _source_lines(data: DataState) -> list[str]:
    streams, sources = data.streams.values(), data.identity.sources
    accepted = [
        sum((stream.accepted[index] for stream in streams if stream.accepted), Amount())
        for index in range(len(sources))
    ]
    total = sum(accepted, Amount())
    lines = []
    for index, source in enumerate(sources):
        drawn = sum(stream.drawn[index] for stream in streams)
        more = ", ..." if len(source.files) > 3 else ""
        names = ", ".join(file.name for file in source.files[:3]) + more
        line = f"source {index} ({names}): {drawn:,} rows drawn"
        line += f", {drawn / source.rows:.3f} epochs" if source.rows else ""
        line += _shares(accepted[index], total) if len(sources) > 1 and total.conversations else ""
        lines.append(line)
    return lines


def _shares(part: Amount, total: Amount) -> str:
    trained = part.trained_tokens / max(total.trained_tokens, 1)
    return (
        f"; {part.conversations / total.conversations:.1%} of conversations, "
        f"{part.tokens / total.tokens:.1%} of tokens, {trained:.1%} of trained tokens"
    )


def _count_lines(data: DataState) -> list[str]:
    streams = data.streams.values()
    notes = sum((Counter(stream.notes) for stream in streams), Counter[str]())
    refused = sum((Counter(reasons) for stream in streams for reasons in stream.refused), Counter[str]())
    return [
        *(f"{note}: {count:,}" for note, count in notes.most_common()),
        *(f"refused, {reason}: {count:,}" for reason, count in refused.most_common()),
    ]


def diff(a: StateDict | DataState, b: StateDict | DataState) -> list[str]:
    """Return the differences between two states, as `path: in a -> in b`."""
    first, second = (msgspec.to_builtins(DataState.parse(state)) for state in (a, b))
    return differences(first, second, "state")
