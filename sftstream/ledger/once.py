"""Prove that each drawn row is trained, skipped, refused or waiting, once in each epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftstream.config import DataConfig
from sftstream.ledger.segments import SKIPPED, Segments
from sftstream.records import Ref, Segment
from sftstream.sources import Corpus, FileSet
from sftstream.state import DataState, PastOrder, StripePosition
from sftstream.streaming.order import RowOrder
from sftstream.streaming.sampler import StripeOrder, row_order

Integers = NDArray[np.int64]


class Draws(NamedTuple):
    """The draws from a source that a data state counts: for each draw, the key of the row (see
    `row_keys`) and the stream that drew the row."""

    keys: Integers
    streams: Integers


class Listed(NamedTuple):
    """All segments up to some step, trained and skipped, and the step of each segment."""

    steps: Integers
    segments: Segments

    def of_source(self, source: int) -> Listed:
        """Return the segments of a source."""
        chosen = self.segments["source"] == source
        return Listed(self.steps[chosen], self.segments[chosen])

    def at(self, index: int) -> str:
        """Return the step and the pack of a segment in words."""
        left_out = " (skipped)" if self.segments["trained_tokens"][index] == SKIPPED else ""
        return f"step {self.steps[index]}, pack {self.segments['pack'][index]}{left_out}"


def repeated(listed: Listed) -> str | None:
    """Return a line on the first example listed twice in an epoch; None if there is none."""
    segments = listed.segments
    names = ("part", "row", "epoch", "source")
    order = np.lexsort([listed.steps, *(segments[name] for name in names)])
    ordered = segments[order]
    same = np.ones(max(len(order) - 1, 0), bool)
    for name in names:
        same &= ordered[name][1:] == ordered[name][:-1]
    found = np.flatnonzero(same)
    if not len(found):
        return None
    # Of all repetitions, the repetition in the earliest step.
    first = found[np.argmin(listed.steps[order[found + 1]])]
    one, other = order[first], order[first + 1]
    segment = segments[one]
    part = f", part {segment['part']}," if segment["part"] else ""
    return (
        f"row {segment['row']} of source {segment['source']}{part} is trained twice in epoch {segment['epoch']}: in "
        f"{listed.at(one)}, and in {listed.at(other)}"
    )


def unbalanced(source: int, listed: Listed, refused: Sequence[Ref], state: DataState, draws: Draws) -> Iterator[str]:
    """Yield a line for each kind of contradiction between the drawn rows of a source and its
    trained, skipped, refused and waiting rows.

    Each drawn row must be exactly one of the four.
    """
    own = listed.of_source(source)
    waiting = _waiting(source, state)
    left_out = keys([(ref.row, ref.epoch) for ref in _refused(source, refused, state)])
    own_keys = row_keys(own.segments["row"], own.segments["epoch"])
    seen = np.concatenate([own_keys, keys([(s.row, s.epoch) for s in waiting])])
    parts = np.concatenate([own.segments["part"], np.array([s.part for s in waiting], np.int32)])
    yield from _incomplete_parts(source, seen, parts)
    if len(both := np.intersect1d(left_out, own_keys)):
        yield f"{_row(source, both[0])} is in a pack, but is listed as refused too"
    if len(left_out) > len(np.unique(left_out)):
        values, counts = np.unique(left_out, return_counts=True)
        yield f"{_row(source, values[counts > 1][0])} is listed as refused {counts.max()} times"
    known = np.unique(np.concatenate([seen, left_out]))
    drawn = sum(stream.drawn[source] for stream in state.streams.values())
    if drawn != len(draws.keys):  # rows lost at the end of a streamed file
        yield f"source {source}: {drawn:,} rows were drawn, but {len(draws.keys):,} are in packs, refused or waiting"
    if len(lost := np.setdiff1d(draws.keys, known)):
        yield (
            f"{_row(source, lost[0])} was drawn, but is in no pack, and neither refused nor waiting; "
            f"{len(lost):,} such rows"
        )
    if len(foreign := np.setdiff1d(known, draws.keys)):
        (places,) = np.nonzero(own_keys == foreign[0])
        where = f"in {own.at(int(places[0]))}" if len(places) else "waiting or refused"
        yield f"{_row(source, foreign[0])} is {where}, but was not drawn; {len(foreign):,} such rows"


def astray(source: int, listed: Listed, draws: Draws, streams: int, global_batch: int) -> str | None:
    """Return a line on the first row in a pack of a stream that did not draw the row, or None."""
    own = listed.of_source(source)
    order = np.argsort(draws.keys)
    at = np.searchsorted(draws.keys[order], row_keys(own.segments["row"], own.segments["epoch"]))
    drew = draws.streams[order[np.minimum(at, len(order) - 1)]] if len(order) else np.empty(0)
    packed = ((own.steps - 1) * global_batch + own.segments["pack"]) % streams
    if len(drew) != len(packed) or not len(wrong := np.flatnonzero(drew != packed)):
        return None
    index = int(wrong[0])
    return (
        f"row {own.segments['row'][index]} of source {source} was drawn by stream {drew[index]}, but is in a pack of stream "
        f"{packed[index]}: {own.at(index)}"
    )


def draws_of(
    source: int, config: DataConfig, corpus: Corpus, state: DataState, listed: Listed, refused: Sequence[Ref]
) -> Draws:
    """Return the draws from a source that `state` counts.

    The files of a streamed source have unknown sizes. They end with the last row in `listed`, in
    `refused` or in the waiting rows.
    """
    opened = corpus.sources[source]
    if isinstance(opened, FileSet):
        return _indexed_draws(source, row_order(opened.file_sizes, config, source, state.orders.get(source, ())), state)
    rows = [
        *listed.of_source(source).segments["row"].tolist(),
        *(segment.row for segment in _waiting(source, state)),
        *(ref.row for ref in _refused(source, refused, state)),
    ]
    return _streamed_draws(source, StripeOrder(opened.file_count, config, source), opened.file_count, state, rows)


def _indexed_draws(source: int, order: RowOrder, state: DataState) -> Draws:
    count = state.identity.streams
    parts, owners = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for stream, stream_state in state.streams.items():
        done, drawn = 0, stream_state.drawn[source]
        while done < drawn:
            rows, epoch = order.stretch(stream + done * count, count, drawn - done)
            parts.append(row_keys(np.array(rows, np.int64), np.full(len(rows), epoch)))
            owners.append(np.full(len(rows), stream))
            done += len(rows)
    return Draws(np.concatenate(parts), np.concatenate(owners))


def _streamed_draws(source: int, order: StripeOrder, files: int, state: DataState, seen: Sequence[int]) -> Draws:
    """Return the rows of the stripes that each stream has read, and of the stripe that it reads."""
    sizes = np.zeros(files, np.int64)
    np.maximum.at(sizes, np.array(seen, np.int64) % files, np.array(seen, np.int64) // files + 1)
    parts, owners = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for stream, stream_state in state.streams.items():
        position = stream_state.stripe_positions.get(source, StripePosition())
        for number in range(position.stripes + 1):
            stripe = order.at(stream + number * state.identity.streams)
            end = sizes[stripe.file] if number < position.stripes else stripe.first + position.rows * stripe.step
            indices = np.arange(stripe.first, end, stripe.step)
            parts.append(row_keys(indices * files + stripe.file, np.full(len(indices), stripe.epoch)))
            owners.append(np.full(len(indices), stream))
    return Draws(np.concatenate(parts), np.concatenate(owners))


def _waiting(source: int, state: DataState) -> list[Segment]:
    return [s for stream in state.streams.values() for s in stream.waiting if s.source == source]


def _refused(source: int, refused: Sequence[Ref], state: DataState) -> list[Ref]:
    """Return the refused rows of a source, with the refusals of `state` that no step lists yet."""
    unlisted = (Ref(r.source, r.row, r.epoch) for stream in state.streams.values() for r in stream.unlisted)
    return [ref for ref in (*refused, *unlisted) if ref.source == source]


def moved(past: Sequence[PastOrder]) -> bool:
    """Return True if an accepted change of files gave rows other numbers. `past` holds the orders
    of the source's rows before accepted changes."""
    for order in past:
        sizes = np.array([rows for rows, _ in order.files])
        if ([first for _, first in order.files] != np.cumsum(sizes) - sizes).any():
            return True
    return False


_EPOCH_BITS = 20


def row_keys(rows: NDArray[np.integer], epochs: NDArray[np.integer]) -> Integers:
    """Return a number for each pair of row and epoch, ordered by row.

    Raises ValueError for an epoch above a million or a row above 8 trillion.
    """
    if len(rows) and (int(epochs.max()) >> _EPOCH_BITS or int(rows.max()) >> (63 - _EPOCH_BITS)):
        raise ValueError(
            f"row {rows.max()} in epoch {epochs.max()} is too large a number for this command; audit "
            "a run of fewer rows and epochs"
        )
    result: Integers = (rows.astype(np.int64) << _EPOCH_BITS) + epochs.astype(np.int64)
    return result


def keys(pairs: Sequence[tuple[int, int]]) -> Integers:
    """Return `row_keys` of pairs of row and epoch."""
    table = np.array(pairs, np.int64).reshape(-1, 2)
    return row_keys(table[:, 0], table[:, 1])


def _incomplete_parts(source: int, seen: Integers, parts: NDArray[np.int32]) -> Iterator[str]:
    """Yield a line on the first row without all parts from 0 to its last part."""
    if not parts.any():
        return
    values, inverse, counts = np.unique(seen, return_inverse=True, return_counts=True)
    last = np.zeros(len(values), np.int64)
    np.maximum.at(last, inverse, parts)
    if len(wrong := np.flatnonzero(last + 1 > counts)):
        index = wrong[0]
        yield f"{_row(source, values[index])} has part {last[index]}, but only {counts[index]} parts in all"


def _row(source: int, key: int) -> str:
    return f"row {int(key) >> _EPOCH_BITS} of source {source} in epoch {int(key) & ((1 << _EPOCH_BITS) - 1)}"
