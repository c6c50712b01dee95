"""The rows of one logical stream in their order: each source at its place, mixed by counters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, repeat
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
from torchdata.nodes import BaseNode

from sftstream.config import DataConfig
from sftstream.records import Ref, Refused
from sftstream.sources import CorpusReader, ShardReader
from sftstream.state import Position, ShardPosition
from sftstream.streaming.order import RowOrder, draws_of_source, draws_of_stream, next_source

X = TypeVar("X")

TOGETHER = 128
"""Rows that go through the stages together, at most: a few hundred kilobytes."""
AHEAD = 512
"""Rows whose order is computed at once."""


class RowBatch(NamedTuple, Generic[X]):
    """What a stage made of rows that were drawn together, or why they are not trained on."""

    refs: list[Ref]
    values: list[X | Refused]


EPOCHS_WITHOUT_A_ROW = 20
"""After which an endless stream stops looking for one."""


class SamplerState(Position, frozen=True, kw_only=True):
    """What the node of the rows gives as its state."""

    exhausted: bool = False


class IndexedCursor:
    """One stream's way through a source whose rows can be read in any order."""

    def __init__(self, shards: Sequence[int], config: DataConfig, source: int, stream: int) -> None:
        self.rows = sum(shards)
        self.drawn = 0
        self._source, self._stream, self._streams = source, stream, config.streams
        self._order = RowOrder(shards, config.seed, source, config.shuffle_of(config.sources[source]))
        draws = _draws(config, source, self.rows)
        self._limit = None if draws is None else draws_of_stream(draws, stream, config.streams)
        self._ahead: list[int] = []
        self._ahead_from = self._epoch = 0

    @property
    def exhausted(self) -> bool:
        return self._limit is not None and self.drawn >= self._limit

    def draw(self) -> Ref:
        at = self._look_ahead()
        self.drawn += 1
        return Ref(self._source, self._ahead[at], self._epoch)

    def draws(self, most: int) -> list[Ref]:
        """The next ones, as many as are at hand: none where it has ended."""
        if self.exhausted:
            return []
        if self._limit is not None:
            most = min(most, self._limit - self.drawn)
        at = self._look_ahead()
        rows = self._ahead[at : at + most]
        self.drawn += len(rows)
        return list(map(Ref._make, zip(repeat(self._source), rows, repeat(self._epoch))))

    def _look_ahead(self) -> int:
        """The place of the next draw among those whose rows are known."""
        at = self.drawn - self._ahead_from
        if not 0 <= at < len(self._ahead):
            first = self._stream + self.drawn * self._streams
            self._ahead, self._epoch = self._order.stretch(first, self._streams, AHEAD)
            self._ahead_from, at = self.drawn, 0
        return at


class StreamingCursor:
    """One stream's way through a source that can only be read forward.

    What streams take turns in are its shards, or where these are fewer than streams, parts of them: a part is every `n`-th
    row of a shard, which each of `n` streams reads whole.
    """

    rows = None

    def __init__(self, tape: ShardReader, config: DataConfig, source: int, stream: int) -> None:
        self.drawn = 0
        self.position = ShardPosition()
        self._tape, self._source, self._stream, self._streams = tape, source, stream, config.streams
        self._found, self._found_at = (0, 0), -1
        self._parts = -(-config.streams // tape.source.shards)
        shuffle = config.shuffle_of(config.sources[source])
        self._order = RowOrder((tape.source.shards * self._parts,), config.seed, source, bool(shuffle))
        draws = _draws(config, source, self._order.rows)
        if draws == 0:
            raise ValueError(
                f"repeat = {config.sources[source].repeat} of source {source} takes none of its {tape.source.shards} shards, and "
                "where a source is streamed shards are what is counted; raise it"
            )
        self._limit = None if draws is None else draws_of_stream(draws, stream, config.streams)

    @property
    def exhausted(self) -> bool:
        """As far as was looked."""
        return self._limit is not None and self.position.shards >= self._limit

    def look(self) -> None:
        """Go on to where a row is. How many a shard has is not known before its end."""
        empty = 0
        while not self.exhausted and not self._tape.reaches(self._next()):
            empty = 0 if self.position.rows else empty + 1
            if empty > EPOCHS_WITHOUT_A_ROW * self._order.rows:
                raise ValueError(
                    f"stream {self._stream} finds no row in its parts of source {self._source}, which has "
                    f"{self._tape.source.shards} shards; shuffle the shards, or have fewer data.streams"
                )
            self.position = ShardPosition(self.position.shards + 1)

    def draw(self) -> Ref:
        ref = self._next()
        self.drawn += 1
        self.position = ShardPosition(self.position.shards, self.position.rows + 1)
        return ref

    def _next(self) -> Ref:
        if self._found_at != self.position.shards:
            self._found_at = self.position.shards
            self._found = self._order.at(self._stream + self.position.shards * self._streams)
        part, epoch = self._found
        first, shard = divmod(part, self._tape.source.shards)
        return Ref(self._source, self._tape.source.number(shard, first + self.position.rows * self._parts), epoch)


Cursor = IndexedCursor | StreamingCursor


def open_cursors(config: DataConfig, reading: CorpusReader, stream: int) -> list[Cursor]:
    """A stream's place in each source, at the beginning."""
    return [
        StreamingCursor(opened, config, source, stream)
        if isinstance(opened, ShardReader)
        else IndexedCursor(opened.shards, config, source, stream)
        for source, opened in enumerate(reading.sources)
    ]


def _draws(config: DataConfig, source: int, count: int) -> int | None:
    """What all epochs take of a source that has `count`; None where there is no end."""
    return None if config.epochs is None else draws_of_source(count, config.sources[source].repeat, config.epochs)


class RowSampler(BaseNode[RowBatch[Ref]]):
    """The rows of one logical stream in their order, mixed by counters.

    `wanted` is how many are to be drawn before it is asked for its state. They come several at a time; one by one where what
    they turn out to hold decides what is drawn next.
    """

    def __init__(self, config: DataConfig, cursors: Sequence[Cursor]) -> None:
        super().__init__()
        self._config = config
        self._cursors = cursors
        self._unsure = [cursor for cursor in cursors if isinstance(cursor, StreamingCursor)]
        self._alone = _alone(config, cursors)
        self._weights = [_weights(config, cursors), *(stage.weights for stage in config.stages)]
        self.wanted = 1

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        zeros = (0,) * len(self._cursors)
        state = (
            msgspec.convert(initial_state, SamplerState) if initial_state else SamplerState(drawn=zeros, mixed=zeros)
        )
        self._mixed, self._stage = list(state.mixed), state.stage
        for source, cursor in enumerate(self._cursors):
            cursor.drawn = state.drawn[source]
            if isinstance(cursor, StreamingCursor):
                cursor.position = state.shard_positions.get(source, ShardPosition())

    def next(self) -> RowBatch[Ref]:
        most = min(self.wanted, TOGETHER) if self._config.mix_by == "conversations" else 1
        refs = self._all_of(self._alone, most) if self._alone else list(islice(self._refs(), most))
        if not refs:
            raise StopIteration
        return RowBatch(refs, list(refs))

    def _all_of(self, cursor: IndexedCursor, most: int) -> list[Ref]:
        refs = cursor.draws(most)
        self._mixed[0] += len(refs)
        return refs

    def _refs(self) -> Iterator[Ref]:
        """Row by row, until nothing is left."""
        while True:
            if self._config.stages:
                self._enter_stage()
            for cursor in self._unsure:
                cursor.look()
            source = self._next_source()
            if source is None:
                return
            if self._config.mix_by == "conversations":
                self._mixed[source] += 1
            yield self._cursors[source].draw()

    def account(self, source: int, tokens: int, trained_tokens: int) -> None:
        """What the row just drawn turned out to hold: a mixture by tokens counts these."""
        if self._config.mix_by != "conversations":
            self._mixed[source] += tokens if self._config.mix_by == "tokens" else trained_tokens

    def get_state(self) -> dict[str, Any]:
        state = SamplerState(
            drawn=tuple(cursor.drawn for cursor in self._cursors),
            mixed=tuple(self._mixed),
            shard_positions={
                i: cursor.position for i, cursor in enumerate(self._cursors) if isinstance(cursor, StreamingCursor)
            },
            stage=self._stage,
            exhausted=self._next_source() is None,
        )
        result: dict[str, Any] = msgspec.to_builtins(state)
        return result

    def _enter_stage(self) -> None:
        drawn = sum(cursor.drawn for cursor in self._cursors) * self._config.streams
        stage = sum(stage.after <= drawn for stage in self._config.stages)
        if stage != self._stage:
            self._stage, self._mixed = stage, [0] * len(self._cursors)

    def _next_source(self) -> int | None:
        if len(self._cursors) == 1:
            return None if self._cursors[0].exhausted else 0
        exhausted = [cursor.exhausted for cursor in self._cursors]
        if self._config.ends_with == "first" and any(exhausted):
            return None
        open_sources = [source for source, end in enumerate(exhausted) if not end]
        if len(open_sources) < 2:
            return next(iter(open_sources), None)
        return next_source(self._mixed, self._weights[self._stage], open_sources)


def _alone(config: DataConfig, cursors: Sequence[Cursor]) -> IndexedCursor | None:
    """The one source of which all rows come, if nothing else is to be looked at between them."""
    if len(cursors) > 1 or config.stages or config.mix_by != "conversations":
        return None
    return next((cursor for cursor in cursors if isinstance(cursor, IndexedCursor)), None)


def _weights(config: DataConfig, cursors: Sequence[Cursor]) -> list[float]:
    """The sources' own, or their sizes: then all end an epoch together. A source of unknown size is the only one."""
    pairs = zip(config.sources, cursors, strict=True)
    return [(cursor.rows or 1) * source.repeat if source.weight is None else source.weight for source, cursor in pairs]
