"""The rows of a logical stream in order: a cursor in each source, and a mixture by counters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, repeat
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
from torchdata.nodes import BaseNode

from sftstream.config import DataConfig
from sftstream.records import Ref, Refused
from sftstream.sources import CorpusReader, ShardReader
from sftstream.state import NO_PAST_ORDERS, PastOrder, PastOrders, Position, ShardPosition
from sftstream.streaming.order import RowOrder, draws_of_source, draws_of_stream, next_source

X = TypeVar("X")

BATCH_ROWS = 128
"""Most rows of a batch on the way through the stages: a few hundred kilobytes."""
LOOKAHEAD = 512
"""Rows of an order computed at once."""
EPOCHS_WITHOUT_A_ROW = 20
"""Epochs of empty shards after which an endless stream raises an error."""


class RowBatch(NamedTuple, Generic[X]):
    """Rows on the way through the stages: references, and a stage's result for each row."""

    refs: list[Ref]
    values: list[X | Refused]


class IndexedCursor:
    """A stream's position in a source with random access to rows."""

    def __init__(
        self,
        shards: Sequence[int],
        config: DataConfig,
        source: int,
        stream: int,
        past: Sequence[PastOrder] = (),
    ) -> None:
        self.rows = sum(shards)
        self.drawn = 0
        """Past draws of the stream, over all epochs."""
        self._source, self._stream, self._streams = source, stream, config.stream_count
        self._order = row_order(shards, config, source, past)
        draws = None if config.epochs is None else self._order.draws(config.sources[source].repeat, config.epochs)
        self._limit = None if draws is None else draws_of_stream(draws, stream, config.stream_count)
        self._ahead: list[int] = []
        self._ahead_from = self._epoch = 0

    @property
    def exhausted(self) -> bool:
        return self._limit is not None and self.drawn >= self._limit

    @property
    def rows_left(self) -> int | None:
        """Draws to come; None for an endless stream."""
        return None if self._limit is None else max(0, self._limit - self.drawn)

    def draw(self) -> Ref:
        """Return the next row's reference. The cursor must not be exhausted."""
        index = self._look_ahead()
        self.drawn += 1
        return Ref(self._source, self._ahead[index], self._epoch)

    def draw_many(self, most: int) -> list[Ref]:
        """Return up to `most` references, all of a single epoch; an empty list if exhausted."""
        if self.exhausted:
            return []
        if self._limit is not None:
            most = min(most, self._limit - self.drawn)
        index = self._look_ahead()
        rows = self._ahead[index : index + most]
        self.drawn += len(rows)
        return list(map(Ref._make, zip(repeat(self._source), rows, repeat(self._epoch))))

    def _look_ahead(self) -> int:
        """Return the next draw's index in `_ahead`, after filling `_ahead` if necessary."""
        index = self.drawn - self._ahead_from
        if not 0 <= index < len(self._ahead):
            first = self._stream + self.drawn * self._streams
            self._ahead, self._epoch = self._order.stretch(first, self._streams, LOOKAHEAD)
            self._ahead_from, index = self.drawn, 0
        return index


class StreamingCursor:
    """A stream's position in a source without random access: shards are read forward.

    Shards are dealt to streams one whole shard at a time. If a source has fewer shards than the run
    has streams, a shard counts as `n` parts: part `i` holds the rows `i, i + n, i + 2n, ...` of the
    shard, and each of the `n` streams reads the whole shard.
    """

    rows = None
    rows_left = None
    """Unknown: shards are counted when they end."""

    def __init__(self, reader: ShardReader, config: DataConfig, source: int, stream: int) -> None:
        self.drawn = 0
        self.position = ShardPosition()
        self._reader, self._source = reader, source
        self._stream, self._streams = stream, config.stream_count
        self._part, self._part_number = (0, 0), -1
        shards = reader.source.shards
        self._parts = -(-config.stream_count // shards)
        shuffle = bool(config.shuffle_of(config.sources[source]))
        self._order = RowOrder((shards * self._parts,), config.seed, source, shuffle)
        self._limit = _limit(config, source, self._order.rows, stream)
        if draws_of(config, source, self._order.rows) == 0:
            raise ValueError(
                f"repeat = {config.sources[source].repeat} of source {source} takes none of its "
                f"{shards} shards, since repeat counts shards of a streamed source; raise repeat"
            )

    @property
    def exhausted(self) -> bool:
        """All shards before the position were read to the end, and no shard is left."""
        return self._limit is not None and self.position.shards >= self._limit

    def skip_empty(self) -> None:
        """Move to the next part with a row. The size of a shard is unknown before the end.

        Raises ValueError if an endless stream meets no row for `EPOCHS_WITHOUT_A_ROW` epochs.
        """
        empty = 0
        while not self.exhausted and not self._reader.reaches(self._next()):
            empty = 0 if self.position.rows else empty + 1
            if empty > EPOCHS_WITHOUT_A_ROW * self._order.rows:
                raise ValueError(
                    f"stream {self._stream} finds no row in its parts of source {self._source}, "
                    f"which has {self._reader.source.shards} shards; shuffle the shards, or set "
                    "fewer data.streams"
                )
            self.position = ShardPosition(self.position.shards + 1)

    def draw(self) -> Ref:
        """Return the next row's reference. `skip_empty` must come before."""
        ref = self._next()
        self.drawn += 1
        self.position = ShardPosition(self.position.shards, self.position.rows + 1)
        return ref

    def _next(self) -> Ref:
        if self._part_number != self.position.shards:
            self._part_number = self.position.shards
            self._part = self._order.at(self._stream + self.position.shards * self._streams)
        part, epoch = self._part
        first, shard = divmod(part, self._reader.source.shards)
        index = first + self.position.rows * self._parts
        return Ref(self._source, self._reader.source.number(shard, index), epoch)


Cursor = IndexedCursor | StreamingCursor


def row_order(shards: Sequence[int], config: DataConfig, source: int, past: Sequence[PastOrder] = ()) -> RowOrder:
    """Return the order of a source with random access to rows."""
    return RowOrder(shards, config.seed, source, config.shuffle_of(config.sources[source]), past)


def open_cursors(
    config: DataConfig, reader: CorpusReader, stream: int, past: PastOrders = NO_PAST_ORDERS
) -> list[Cursor]:
    """Return a cursor at the beginning of each source, for a logical stream."""
    return [
        StreamingCursor(opened, config, source, stream)
        if isinstance(opened, ShardReader)
        else IndexedCursor(opened.shards, config, source, stream, past.get(source, ()))
        for source, opened in enumerate(reader.sources)
    ]


def draws_of(config: DataConfig, source: int, count: int) -> int | None:
    """Return the draws of a source of `count` rows in all epochs; None for an endless stream."""
    if config.epochs is None:
        return None
    return draws_of_source(count, config.sources[source].repeat, config.epochs)


def _limit(config: DataConfig, source: int, count: int, stream: int) -> int | None:
    """Return the draws of a logical stream in all epochs; None for an endless stream."""
    draws = draws_of(config, source, count)
    return None if draws is None else draws_of_stream(draws, stream, config.stream_count)


class RowSampler(BaseNode[RowBatch[Ref]]):
    """The first node of a stream's graph: row references in order, mixed by counters.

    The packer asks for a number of rows by `request`, to draw no row beyond a window, and reports
    the content of each row by `count_tokens`, for mixtures by tokens. Rows come in batches; one at
    a time for a mixture by tokens, since the content of a row decides the next draw.
    """

    def __init__(self, config: DataConfig, cursors: Sequence[Cursor]) -> None:
        super().__init__()
        self._config = config
        self._cursors = cursors
        self._streaming = [cursor for cursor in cursors if isinstance(cursor, StreamingCursor)]
        self._only = _only_cursor(config, cursors)
        self._weights = [_weights(config, cursors), *(stage.weights for stage in config.stages)]
        self.mixes_by_content = config.mix_by != "conversations"
        """The content of a row decides the next draw."""
        self._requested = 1

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Move all cursors to `initial_state`, a `Position` or `StreamState` as builtins."""
        super().reset(initial_state)
        zeros = (0,) * len(self._cursors)
        position = msgspec.convert(initial_state, Position) if initial_state else Position(drawn=zeros, mixed=zeros)
        self._mixed, self._stage = list(position.mixed), position.stage
        for source, cursor in enumerate(self._cursors):
            cursor.drawn = position.drawn[source]
            if isinstance(cursor, StreamingCursor):
                cursor.position = position.shard_positions.get(source, ShardPosition())

    def request(self, rows: int) -> None:
        """Limit the next batches to `rows` rows each."""
        self._requested = rows

    def next(self) -> RowBatch[Ref]:
        most = min(self._requested, BATCH_ROWS) if not self.mixes_by_content else 1
        refs = self._draw_many(self._only, most) if self._only else list(islice(self._draw_each(), most))
        if not refs:
            raise StopIteration
        return RowBatch(refs, list(refs))

    def count_tokens(self, source: int, tokens: int, trained_tokens: int) -> None:
        """Count the content of the row drawn last, for a mixture by tokens or trained tokens."""
        if self.mixes_by_content:
            self._mixed[source] += tokens if self._config.mix_by == "tokens" else trained_tokens

    @property
    def position(self) -> Position:
        """The position after the rows drawn."""
        return Position(
            drawn=tuple([cursor.drawn for cursor in self._cursors]),
            mixed=tuple(self._mixed),
            shard_positions={
                source: cursor.position
                for source, cursor in enumerate(self._cursors)
                if isinstance(cursor, StreamingCursor)
            },
            stage=self._stage,
        )

    @property
    def rows_left(self) -> int | None:
        """Draws to come, at most; None if unknown or endless."""
        left = [cursor.rows_left for cursor in self._cursors]
        known = [rows for rows in left if rows is not None]
        return sum(known) if len(known) == len(left) else None

    @property
    def exhausted(self) -> bool:
        """No row is left."""
        return self._next_source() is None

    def get_state(self) -> dict[str, Any]:
        """Return `position` as builtins."""
        result: dict[str, Any] = msgspec.to_builtins(self.position)
        return result

    def _draw_many(self, cursor: IndexedCursor, most: int) -> list[Ref]:
        refs = cursor.draw_many(most)
        self._mixed[0] += len(refs)
        return refs

    def _draw_each(self) -> Iterator[Ref]:
        """Draw row by row until all sources are exhausted."""
        while True:
            if self._config.stages:
                self._enter_stage()
            for cursor in self._streaming:
                cursor.skip_empty()
            source = self._next_source()
            if source is None:
                return
            if not self.mixes_by_content:
                self._mixed[source] += 1
            yield self._cursors[source].draw()

    def _enter_stage(self) -> None:
        drawn = sum(cursor.drawn for cursor in self._cursors) * self._config.stream_count
        stage = sum(stage.after <= drawn for stage in self._config.stages)
        if stage != self._stage:
            self._stage, self._mixed = stage, [0] * len(self._cursors)

    def _next_source(self) -> int | None:
        if len(self._cursors) == 1:
            return None if self._cursors[0].exhausted else 0
        exhausted = [cursor.exhausted for cursor in self._cursors]
        if self._config.ends_with == "first" and any(exhausted):
            return None
        open_sources = [source for source, ended in enumerate(exhausted) if not ended]
        if len(open_sources) < 2:
            return next(iter(open_sources), None)
        return next_source(self._mixed, self._weights[self._stage], open_sources)


def _only_cursor(config: DataConfig, cursors: Sequence[Cursor]) -> IndexedCursor | None:
    """Return the only source's cursor if rows can be drawn in bulk, else None."""
    if len(cursors) > 1 or config.stages or config.mix_by != "conversations":
        return None
    return next((cursor for cursor in cursors if isinstance(cursor, IndexedCursor)), None)


def _weights(config: DataConfig, cursors: Sequence[Cursor]) -> list[float]:
    """Return the sources' weights; without weights the sizes: all sources end an epoch together.

    A source of unknown size without a weight is the only source: any weight will do.
    """
    return [
        (cursor.rows or 1) * source.repeat if source.weight is None else source.weight
        for source, cursor in zip(config.sources, cursors, strict=True)
    ]
