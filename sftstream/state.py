"""Where a stream stands, as frozen values: positions and references, never tokens. A few kilobytes a logical stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from sftstream.identity import Identity, differences
from sftstream.records import Amount, Refusal, Segment


class Leftover(msgspec.Struct, frozen=True, array_like=True):
    """A conversation that was read and fitted no full pack yet, and how many windows it has waited."""

    segment: Segment
    waited: int


class ShardPosition(msgspec.Struct, frozen=True, array_like=True):
    """Where a stream stands in a source that is streamed."""

    shards: int = 0
    """Parts of shards that it has left behind, over all epochs."""
    rows: int = 0
    """Rows that it has drawn from the present one."""


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """Where the rows of one logical stream stand."""

    drawn: tuple[int, ...]
    """Rows drawn from each source by this stream, over all epochs."""
    mixed: tuple[int, ...] = ()
    """What the mixture counts of each source, since its stage began."""
    shard_positions: dict[int, ShardPosition] = msgspec.field(name="places", default={})
    """In each source that is streamed."""
    stage: int = 0


class StreamState(Position, frozen=True, kw_only=True):
    """One logical stream after a pack."""

    accepted: tuple[Amount, ...] = ()
    """What was read from each source and not refused."""
    windows: int = 0
    """Windows planned."""
    planned: tuple[tuple[Segment, ...], ...] = ()
    """The packs that come next, already planned."""
    leftovers: tuple[Leftover, ...] = ()
    exhausted: bool = msgspec.field(name="dry", default=False)
    """Nothing comes any more."""
    packs: int = 0
    """Packs given, empty ones not counted."""
    conversations: int = 0
    """Conversations given."""
    tokens: int = 0
    """Their tokens."""
    refused: dict[str, int] = {}
    """Rows refused, by reason."""
    unlisted: tuple[Refusal, ...] = ()
    """Rows that were refused while a change was made: the next pack lists them."""
    notes: dict[str, int] = {}
    """What was done to conversations to train them: cut, split, tokens that were not trained for lying across a border."""

    @property
    def waiting(self) -> list[Segment]:
        """What was read and not given yet."""
        return [*(leftover.segment for leftover in self.leftovers), *(s for pack in self.planned for s in pack)]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody accepted to be different from some pack on."""

    packs: int
    """Number of the next pack at that time."""
    differences: tuple[str, ...]


class DataState(msgspec.Struct, frozen=True, kw_only=True):
    """A loader after some packs: what it was made from, how far the run is, and its streams by number."""

    identity: Identity
    packs: int
    """Packs of all shards that were consumed: the number of the next one."""
    streams: dict[int, StreamState]
    history: tuple[Change, ...] = ()
    """Changes of data or settings that were accepted in the course of the run."""

    @classmethod
    def parse(cls, state: Mapping[str, Any] | DataState) -> DataState:
        """A state dict, typed; raises ValueError naming the place that is not as it should be."""
        if isinstance(state, DataState):
            return state
        try:
            return msgspec.convert(state, cls, str_keys=True)
        except msgspec.ValidationError as error:
            raise ValueError(f"this is no data state of this version: {error}") from None

    def builtins(self) -> dict[str, Any]:
        """A fresh state dict of JSON-able values."""
        # Through JSON, so that tuples are lists before and after a file, and two state dicts compare.
        result: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return result


StateDict = Mapping[str, Any]


def merge(states: Sequence[StateDict | DataState]) -> dict[str, Any]:
    """One state dict of the state dicts of all shards, taken after the same step.

    A shard whose streams have all run dry may stand at an earlier pack. Raises ValueError where the shards do not fit.
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
        if state.packs != packs and not all(stream.exhausted for stream in state.streams.values()):
            raise ValueError(
                f"state {index} stands at pack {state.packs}, another at {packs}; take them after the same step"
            )
        if twice := streams.keys() & state.streams.keys():
            raise ValueError(
                f"streams {sorted(twice)[:5]} are in state {index} and in an earlier one; give each shard's state once"
            )
        streams |= state.streams
    return msgspec.structs.replace(parsed[0], packs=packs, streams=dict(sorted(streams.items()))).builtins()


def describe(state: StateDict | DataState) -> str:
    """A few lines for people: how far the run is, what it is made of, what was refused."""
    data = DataState.parse(state)
    streams = data.streams.values()
    identity = data.identity
    refused: Counter[str] = sum((Counter(stream.refused) for stream in streams), Counter())
    waiting = sum(len(stream.waiting) for stream in streams)
    given = sum(stream.packs for stream in streams)
    tokens = sum(stream.tokens for stream in streams)
    fill = f", {tokens / (given * identity.capacity):.2%} full" if given else ""
    conversations = sum(stream.conversations for stream in streams)
    lines = [
        f"pack {data.packs} is next; streams here: {len(streams)} of {identity.streams}",
        f"given: {given:,} packs, {conversations:,} conversations, {tokens:,} tokens{fill}",
        f"read and waiting: {waiting:,} conversations",
    ]
    accepted = [sum((s.accepted[i] for s in streams if s.accepted), Amount()) for i in range(len(identity.sources))]
    whole = sum(accepted, Amount())
    for index, source in enumerate(identity.sources):
        drawn = sum(stream.drawn[index] for stream in streams)
        names = ", ".join(file.name for file in source.files[:3]) + (", ..." if len(source.files) > 3 else "")
        lines.append(f"source {index} ({names}): {drawn:,} rows drawn")
        lines[-1] += f", {drawn / source.rows:.3f} epochs" if source.rows else ""
        lines[-1] += _shares(accepted[index], whole) if len(accepted) > 1 and whole.conversations else ""
    notes: Counter[str] = sum((Counter(stream.notes) for stream in streams), Counter())
    lines += [f"{note}: {count:,}" for note, count in notes.most_common()]
    lines += [f"refused, {reason}: {count:,}" for reason, count in refused.most_common()]
    lines += [f"accepted at pack {change.packs}: {'; '.join(change.differences)}" for change in data.history]
    if exhausted := sum(stream.exhausted for stream in streams):
        lines.append(f"{exhausted} streams have run dry")
    return "\n".join(lines)


def _shares(part: Amount, whole: Amount) -> str:
    trained = part.trained_tokens / max(whole.trained_tokens, 1)
    return (
        f"; {part.conversations / whole.conversations:.1%} of conversations, {part.tokens / whole.tokens:.1%} of tokens, "
        f"{trained:.1%} of trained tokens"
    )


def diff(a: StateDict | DataState, b: StateDict | DataState) -> list[str]:
    """Each field that differs between two states, as `path: in a -> in b`."""
    first, second = (msgspec.to_builtins(DataState.parse(state)) for state in (a, b))
    return differences(first, second, "state")
