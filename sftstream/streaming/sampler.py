"""Draw the rows of a logical stream: a cursor for each source, and a mixture of the sources."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice, repeat
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
from torchdata.nodes import BaseNode

from sftstream.config import DataConfig
from sftstream.records import Ref, Refused
from sftstream.sources import CorpusReader, StreamedReader
from sftstream.state import NO_PAST_ORDERS, PastOrder, PastOrders, Position, StripePosition
from sftstream.streaming.order import RowOrder, draws_of_source, draws_of_stream, next_source

X = TypeVar("X")

BATCH_ROWS = 128
"""Largest number of rows in a batch: a few hundred kilobytes."""
LOOKAHEAD = 512
"""Number of draws of which a cursor computes the rows at once."""
EPOCHS_WITHOUT_A_ROW = 20
"""Number of empty stripes in succession after which a stream raises an error, in multiples of the
number of stripes of the source."""


class RowBatch(NamedTuple, Generic[X]):
    """Rows on their way through the graph: references, and for each row the result of the node that
    returned the batch."""

    refs: list[Ref]
    values: list[X | Refused]


class IndexedCursor:
    """A stream's position in a source that is read by row number."""

    def __init__(
        self,
        file_sizes: Sequence[int],
        config: DataConfig,
        source: int,
        stream: int,
        past: Sequence[PastOrder] = (),
    ) -> None:
        self.rows = sum(file_sizes)
        self.drawn = 0
        """Number of draws that the stream has made, over all epochs."""
        self._source, self._stream, self._streams = source, stream, config.stream_count
        self._order = row_order(file_sizes, config, source, past)
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
        """Return a reference to the next row. The cursor must not be exhausted."""
        index = self._look_ahead()
        self.drawn += 1
        return Ref(self._source, self._ahead[index], self._epoch)

    def draw_many(self, most: int) -> list[Ref]:
        """Return references to up to `most` rows of one epoch; an empty list if exhausted."""
        if self.exhausted:
            return []
        if self._limit is not None:
            most = min(most, self._limit - self.drawn)
        index = self._look_ahead()
        rows = self._ahead[index : index + most]
        self.drawn += len(rows)
        return list(map(Ref._make, zip(repeat(self._source), rows, repeat(self._epoch))))

    def _look_ahead(self) -> int:
        """Return the index of the next draw in `_ahead`, and compute more rows if necessary."""
        index = self.drawn - self._ahead_from
        if not 0 <= index < len(self._ahead):
            first = self._stream + self.drawn * self._streams
            self._ahead, self._epoch = self._order.stretch(first, self._streams, LOOKAHEAD)
            self._ahead_from, index = self.drawn, 0
        return index


class Stripe(NamedTuple):
    """A part of a file of a streamed source: its rows `first, first + step, first + 2 * step,
    ...`."""

    file: int
    first: int
    step: int
    epoch: int


class StripeOrder:
    """The stripes of a streamed source of `files` files, in the order of draws of all streams."""

    def __init__(self, files: int, config: DataConfig, source: int) -> None:
        self._files = files
        self._per_file = -(-config.stream_count // files)
        self.count = files * self._per_file
        """Number of stripes in an epoch."""
        shuffle = bool(config.shuffle_of(config.sources[source]))
        self._order = RowOrder((self.count,), config.seed, source, shuffle)

    def at(self, draw: int) -> Stripe:
        """Return the stripe of a draw. Draws are numbered through all epochs."""
        number, epoch = self._order.at(draw)
        first, file = divmod(number, self._files)
        return Stripe(file, first, self._per_file, epoch)


class StreamingCursor:
    """A stream's position in a streamed source, whose files are read from beginning to end.

    A stream gets whole files. If a source has fewer files than the run has streams, each file is
    divided into `n` stripes: stripe `i` is the rows `i, i + n, i + 2n, ...` of the file. A stream
    gets whole stripes, and reads a whole file to find the rows of its stripe. Example: 2 files and
    4 streams make 2 stripes of each file; stripe 1 of a file is its rows 1, 3, 5, ...
    """

    rows = None
    rows_left = None
    """None, because the number of rows of a file is unknown before its end is read."""

    def __init__(self, reader: StreamedReader, config: DataConfig, source: int, stream: int) -> None:
        self.drawn = 0
        self.position = StripePosition()
        self._reader, self._source = reader, source
        self._stream, self._streams = stream, config.stream_count
        self._order = StripeOrder(reader.source.file_count, config, source)
        self._stripe, self._stripe_number = self._order.at(stream), 0
        self._limit = _limit(config, source, self._order.count, stream)
        if draws_of(config, source, self._order.count) == 0:
            least = math.ceil(1000 / (self._order.count * config.epochs)) / 1000 if config.epochs else 1
            raise ValueError(
                f"repeat = {config.sources[source].repeat} of source {source} selects none of its "
                f"{reader.source.file_count} files: "
                f"a streamed source is read in whole files; raise repeat to {least} or more"
            )

    @property
    def exhausted(self) -> bool:
        """True if the stream has read all its stripes to the end."""
        return self._limit is not None and self.position.stripes >= self._limit

    def skip_empty(self) -> None:
        """If the current stripe has no further row, move to the next stripe that has a row.

        Stripes must be tried, because the size of a file is unknown before its end.

        Raises ValueError after too many empty stripes in succession (see `EPOCHS_WITHOUT_A_ROW`).
        """
        empty = 0
        while not self.exhausted and not self._reader.reaches(self._next()):
            empty = 0 if self.position.rows else empty + 1
            if empty > EPOCHS_WITHOUT_A_ROW * self._order.count:
                raise ValueError(
                    f"stream {self._stream} finds no row in its share of source {self._source}, which has "
                    f"{self._reader.source.file_count} files; remove files without rows, set fewer data.streams, or set "
                    'shuffle = "shards"'
                )
            self.position = StripePosition(self.position.stripes + 1)

    def draw(self) -> Ref:
        """Return a reference to the next row. Call `skip_empty` before."""
        ref = self._next()
        self.drawn += 1
        self.position = StripePosition(self.position.stripes, self.position.rows + 1)
        return ref

    @property
    def last_drawn(self) -> Ref | None:
        """The row drawn last from the current stripe; None before its first row."""
        return self._row(self.position.rows - 1) if self.position.rows else None

    def _next(self) -> Ref:
        return self._row(self.position.rows)

    def _row(self, number: int) -> Ref:
        """Return a reference to a row of the current stripe."""
        if self._stripe_number != self.position.stripes:
            self._stripe_number = self.position.stripes
            self._stripe = self._order.at(self._stream + self.position.stripes * self._streams)
        stripe = self._stripe
        index = stripe.first + number * stripe.step
        return Ref(self._source, self._reader.source.number(stripe.file, index), stripe.epoch)


Cursor = IndexedCursor | StreamingCursor


def row_order(file_sizes: Sequence[int], config: DataConfig, source: int, past: Sequence[PastOrder] = ()) -> RowOrder:
    """Return the order of the rows of a source that is not streamed."""
    return RowOrder(file_sizes, config.seed, source, config.shuffle_of(config.sources[source]), past)


def open_cursors(
    config: DataConfig, reader: CorpusReader, stream: int, past: PastOrders = NO_PAST_ORDERS
) -> list[Cursor]:
    """Return for each source a cursor of logical stream number `stream`, at the beginning."""
    return [
        StreamingCursor(opened, config, source, stream)
        if isinstance(opened, StreamedReader)
        else IndexedCursor(opened.file_sizes, config, source, stream, past.get(source, ()))
        for source, opened in enumerate(reader.sources)
    ]


def draws_of(config: DataConfig, source: int, count: int) -> int | None:
    """Return the number of draws from a source of `count` rows in all epochs; None if endless."""
    if config.epochs is None:
        return None
    return draws_of_source(count, config.sources[source].repeat, config.epochs)


def _limit(config: DataConfig, source: int, count: int, stream: int) -> int | None:
    """Return the number of draws that a logical stream makes in all epochs; None if endless."""
    draws = draws_of(config, source, count)
    return None if draws is None else draws_of_stream(draws, stream, config.stream_count)


class RowSampler(BaseNode[RowBatch[Ref]]):
    """The first node of the graph of a logical stream: references to rows, mixed from all sources.

    Before `next`, the packer calls `request` with the number of rows that the window lacks, so that
    no row after the end of the window is drawn. `next` returns a batch of references. If the
    mixture counts tokens, a batch holds a single reference, because the packer must report the
    tokens of a row with `count_tokens` before the source of the next row is known.
    """

    def __init__(self, config: DataConfig, cursors: Sequence[Cursor]) -> None:
        super().__init__()
        self._config = config
        self._cursors = cursors
        self._streaming = [cursor for cursor in cursors if isinstance(cursor, StreamingCursor)]
        self._only = _only_cursor(config, cursors)
        self._weights = [_weights(config, cursors), *(stage.weights for stage in config.stages)]
        self.mixes_by_content = config.mix_by != "conversations"
        """True if the source of the next draw depends on the tokens of the last row."""
        self._requested = 1

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Move all cursors to `initial_state`, the dict of a `Position` or `StreamState`."""
        super().reset(initial_state)
        zeros = (0,) * len(self._cursors)
        position = msgspec.convert(initial_state, Position) if initial_state else Position(drawn=zeros, mixed=zeros)
        self._mixed, self._stage = list(position.mixed), position.stage
        for source, cursor in enumerate(self._cursors):
            cursor.drawn = position.drawn[source]
            if isinstance(cursor, StreamingCursor):
                cursor.position = position.stripe_positions.get(source, StripePosition())

    def request(self, rows: int) -> None:
        """Set the largest number of rows in each of the next batches."""
        self._requested = rows

    def next(self) -> RowBatch[Ref]:
        most = min(self._requested, BATCH_ROWS) if not self.mixes_by_content else 1
        refs = self._draw_many(self._only, most) if self._only else list(islice(self._draw_each(), most))
        if not refs:
            raise StopIteration
        return RowBatch(refs, list(refs))

    def count_tokens(self, source: int, tokens: int, trained_tokens: int) -> None:
        """Count the tokens of the row drawn last, if the mixture counts tokens or trained
        tokens."""
        if self.mixes_by_content:
            self._mixed[source] += tokens if self._config.mix_by == "tokens" else trained_tokens

    @property
    def position(self) -> Position:
        """The position after the last drawn row."""
        return Position(
            drawn=tuple([cursor.drawn for cursor in self._cursors]),
            mixed=tuple(self._mixed),
            stripe_positions={
                source: cursor.position
                for source, cursor in enumerate(self._cursors)
                if isinstance(cursor, StreamingCursor)
            },
            stage=self._stage,
        )

    @property
    def last_streamed(self) -> list[Ref] | None:
        """For each streamed source, the row drawn last from the current stripe, if a row was drawn
        from the stripe; None if no source is streamed."""
        return [ref for cursor in self._streaming if (ref := cursor.last_drawn)] if self._streaming else None

    @property
    def rows_left(self) -> int | None:
        """Draws to come, at most; None if unknown or endless."""
        left = [cursor.rows_left for cursor in self._cursors]
        known = [rows for rows in left if rows is not None]
        return sum(known) if len(known) == len(left) else None

    @property
    def exhausted(self) -> bool:
        """True if no row is left."""
        return self._next_source() is None

    def get_state(self) -> dict[str, Any]:
        """Return `position` as a dict."""
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
    """Return the cursor of the only source if rows can be drawn many at a time, else None."""
    if len(cursors) > 1 or config.stages or config.mix_by != "conversations":
        return None
    return next((cursor for cursor in cursors if isinstance(cursor, IndexedCursor)), None)


def _weights(config: DataConfig, cursors: Sequence[Cursor]) -> list[float]:
    """Return the weights of the sources. The default is the number of rows drawn in an epoch.

    A streamed source has unknown size. The config requires a weight for a streamed source, unless
    it is the only source; then its weight has no effect.
    """
    return [
        (cursor.rows or 1) * source.repeat if source.weight is None else source.weight
        for source, cursor in zip(config.sources, cursors, strict=True)
    ]
