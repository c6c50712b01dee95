"""Compute the order of rows from counters alone, so that any draw can be computed directly.

A *draw* is the choice of the next row of a source. The draws of a source are numbered from 0, over
all logical streams and epochs. Stream `s` of `S` makes the draws `s, s + S, s + 2S, ...`.

Example: a source of 3 rows, not shuffled, and 2 streams:

    draw     0  1  2  3  4  5
    epoch    0  0  0  1  1  1
    row      0  1  2  0  1  2
    stream   0  1  0  1  0  1
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftstream.config import Shuffle
from sftstream.state import DataState, PastOrder

ROUNDS, SMALL, ROUNDS_OF_SMALL = 8, 256, 24
"""Rounds of the Feistel network (see `permute`): 8, and 24 for permutations of fewer than 256
indices. With 8 rounds and about 100 indices, some distances between consecutive rows occur up to
8 % too often or too rarely. With 16 rounds no bias was measured; 24 rounds leave a margin."""

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]
Network = Callable[[Words, np.uint64, np.uint64, int, tuple[int, ...]], Words]
"""`network(values, a, b, size, keys)` permutes `range(a * b)`."""


@lru_cache(maxsize=1024)
def round_keys(*words: int | str) -> tuple[int, ...]:
    """Return 64-bit keys for `permute`, computed from `words` (a seed, a label, an epoch, ...)."""
    return tuple(_random_words(ROUNDS_OF_SMALL, words).tolist())


def _random_words(count: int, words: Iterable[int | str]) -> Words:
    """Return `count` random 64-bit integers: the SHAKE-128 hash of `words`."""
    bits = hashlib.shake_128("\0".join(map(str, words)).encode()).digest(8 * count)
    return np.frombuffer(bits, "<u8")


def permute(indices: Integers, size: int, keys: tuple[int, ...]) -> Integers:
    """Map each index through a keyed permutation of `range(size)`, in O(1) time and memory.

    The permutation is a Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002). A network permutes `range(a * b)`; here `a` is the square root of `size`,
    rounded up, and `b` is `size / a`, rounded up. An output of `size` or more is mapped again until
    the output is below `size` ("cycle walking").

    Example for `size = 5`: a = 3 and b = 2, so the network permutes `range(6)`. With
    `keys = round_keys("example")`, the indices `[0, 1, 2, 3, 4]` become `[2, 1, 3, 0, 4]`.
    """
    return _walk(_network, indices, size, keys)


def _network(values: Words, a: np.uint64, b: np.uint64, size: int, keys: tuple[int, ...]) -> Words:
    left, right = values % a, values // a
    for i in range(0, ROUNDS_OF_SMALL if size < SMALL else ROUNDS, 2):
        left = (left + _mix(right, keys[i]) % a) % a
        right = (right + _mix(left, keys[i + 1]) % b) % b
    return right * a + left


def unpermute(outputs: Integers, size: int, keys: tuple[int, ...]) -> Integers:
    """Return the index of each output of `permute` with the same `size` and `keys`."""
    return _walk(_inverse_network, outputs, size, keys)


def _walk(network: Network, values: Integers, size: int, keys: tuple[int, ...]) -> Integers:
    """Apply a network to each value, and again to each result of `size` or more."""
    a, b = _sides(size)
    walked = values.astype(np.uint64)
    outside = np.full(len(walked), True)
    while outside.any():
        walked[outside] = network(walked[outside], a, b, size, keys)
        outside = walked >= np.uint64(size)
    return walked.astype(np.int64)


def _inverse_network(values: Words, a: np.uint64, b: np.uint64, size: int, keys: tuple[int, ...]) -> Words:
    left, right = values % a, values // a
    for i in reversed(range(0, ROUNDS_OF_SMALL if size < SMALL else ROUNDS, 2)):
        right = (right + b - _mix(left, keys[i + 1]) % b) % b
        left = (left + a - _mix(right, keys[i]) % a) % a
    return right * a + left


def _sides(size: int) -> tuple[np.uint64, np.uint64]:
    """Return `a` and `b` of the network for a permutation of `range(size)`."""
    a = math.isqrt(size - 1) + 1 if size > 1 else 1
    return np.uint64(a), np.uint64(-(-size // a))


def _mix(values: Words, key: int) -> Words:
    # The finalizer of splitmix64 (Steele, Lea, Flood 2014): each input bit affects each output bit.
    values = values * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shuffled(count: int, *words: int | str) -> list[int]:
    """Return a permutation of `range(count)` computed from `words`, by sorting random numbers.

    Needs O(count) memory, so it is meant for short lists, such as the packs of a window.
    """
    order: list[int] = _random_words(count, words).argsort(kind="stable").tolist()
    return order


@lru_cache(maxsize=256)
def permutation_of_few(size: int, keys: tuple[int, ...]) -> Integers:
    """Return `permute` of all indices below a small `size`. Cached, since all streams need it."""
    return permute(np.arange(size), size, keys)


def next_source(amounts: Sequence[int], weights: Sequence[float], open_sources: Iterable[int]) -> int | None:
    """Return the number of the source to draw from next, or None if `open_sources` is empty.

    `amounts` holds the amount drawn from each source so far, for example the number of its
    conversations. The next source has the largest `weight / (2 * amount + 1)` (Sainte-Lague's
    method), and among sources with the same value the lowest number.
    If amounts are conversations and weights are sizes, all sources end an epoch together. A source
    with weight 0 is drawn only if all other sources are exhausted.

    Example: with the weights 2 and 1 the order is 0, 1, 0, 0, 1, 0, ...

        amounts 0, 0: values 2/1 and 1/1, so source 0
        amounts 1, 0: values 2/3 and 1/1, so source 1
        amounts 1, 1: values 2/3 and 1/3, so source 0
    """
    found, most = None, -1.0
    for source in open_sources:
        share = weights[source] / (2 * amounts[source] + 1)
        if share > most:
            found, most = source, share
    return found


def draws_of_source(rows: int, repeat: float, epochs: int) -> int:
    """Return the number of draws in all epochs from a source with `rows` rows.

    The product is computed with `repeat` as a decimal fraction, because `100 * 0.57` in binary
    floating point is slightly below 57.
    """
    return int(rows * epochs * Fraction(str(repeat)))


def rows_in_all_epochs(state: DataState) -> int | None:
    """Return the number of rows that the run of `state` draws in all its epochs.

    Returns None if the run is endless or a source is streamed.
    """
    sources, epochs = state.identity.sources, state.identity.epochs
    sizes = [(source.rows, source.repeat) for source in sources if source.rows is not None]
    if epochs is None or len(sizes) < len(sources):
        return None
    return sum(draws_of_source(rows, repeat, epochs) for rows, repeat in sizes)


def draws_of_stream(draws: int, stream: int, streams: int) -> int:
    """Return how many of the draws `0, 1, ..., draws - 1` stream `stream` of `streams` makes."""
    return max(0, -(-(draws - stream) // streams))


class RowOrder:
    """The row and the epoch of each draw of a source, in all epochs.

    Draws are numbered through all epochs, so logical streams enter an epoch without waiting for
    each other, and even a source with fewer rows than streams provides rows to every stream.
    `file_sizes` holds the number of rows of each file of the source, in order.

    `past` holds the orders of epochs that were begun before the source's files changed. Example: a
    file had 2 rows in epoch 0 and has 3 rows now, so `past = [PastOrder(epochs=1, files=((2,
    0),))]`: before epoch 1, the source had one file of 2 rows, and the first of them is row 0
    today. Without shuffling, the draws 0 and 1 are the rows 0 and 1 of epoch 0, and the draws 2,
    3 and 4 are the rows 0, 1 and 2 of epoch 1.
    """

    def __init__(
        self, file_sizes: Sequence[int], seed: int, source: int, shuffle: Shuffle, past: Sequence[PastOrder] = ()
    ) -> None:
        self.rows = sum(file_sizes)
        self._orders: list[_Stretch] = []
        draw = epoch = 0
        for order in past:
            sizes = [rows for rows, _ in order.files]
            starts = np.array([first for _, first in order.files], np.int64)
            moves: Integers = starts - (np.cumsum(sizes, dtype=np.int64) - np.array(sizes, np.int64))
            self._orders.append(_Stretch(draw, epoch, EpochOrder(sizes, seed, source, shuffle), moves))
            draw += (order.epochs - epoch) * sum(sizes)
            epoch = order.epochs
        self._orders.append(_Stretch(draw, epoch, EpochOrder(file_sizes, seed, source, shuffle), None))

    def at(self, draw: int) -> tuple[int, int]:
        """Return `(row, epoch)` of a draw."""
        (row,), epoch = self.stretch(draw, 1, 1)
        return row, epoch

    def stretch(self, first: int, step: int, most: int) -> tuple[list[int], int]:
        """Return the rows of the draws `first, first + step, ...`, and the epoch of `first`.

        Returns at most `most` rows, all of one epoch.
        """
        begun = next(order for order in reversed(self._orders) if order.draw <= first)
        order = begun.order
        epoch, index = divmod(first - begun.draw, order.rows)
        count = min(most, -(-(order.rows - index) // step))
        rows = order.at(np.arange(index, index + count * step, step), epoch + begun.epoch)
        if begun.moves is not None:
            rows = rows + begun.moves[order.files_of(rows)]
        return rows.tolist(), epoch + begun.epoch

    def draws_of(self, rows: Integers, epoch: int) -> Integers:
        """Return the draw of each row in an epoch with the present files.

        Raises ValueError for an epoch that was begun before the source's files changed.
        """
        begun = self._orders[-1]
        if epoch < begun.epoch:
            raise ValueError(f"epoch {epoch} had other files than epoch {begun.epoch}; give a later epoch")
        return begun.draw + (epoch - begun.epoch) * begun.order.rows + begun.order.indices_of(rows, epoch)

    def draws(self, repeat: float, epochs: int) -> int:
        """Return the number of draws in `epochs * repeat` passes over the source.

        `epochs` is `data.epochs`. Elsewhere in this class, an epoch is a single pass over
        the source.
        """
        passes = Fraction(str(repeat)) * epochs
        last = next(order for order in reversed(self._orders) if order.epoch <= passes)
        return last.draw + int((passes - last.epoch) * last.order.rows)

    def first_epoch_after(self, draw: int) -> int:
        """Return the first epoch of which all draws are at or after `draw`."""
        begun = next(order for order in reversed(self._orders) if order.draw <= draw)
        return begun.epoch - (begun.draw - draw) // begun.order.rows


class EpochOrder:
    """The order of a source's rows in each epoch."""

    def __init__(self, file_sizes: Sequence[int], seed: int, source: int, shuffle: Shuffle) -> None:
        self.rows = sum(file_sizes)
        self._file_sizes = file_sizes
        self._words = seed, source
        self._shuffle = shuffle
        self._epoch = -1

    def files_of(self, rows: Integers) -> Integers:
        """Return the index of the file of each row."""
        files: Integers = np.cumsum(self._file_sizes).searchsorted(rows, "right")
        return files

    def at(self, indices: Integers, epoch: int) -> Integers:
        """Return the rows at positions `indices` in the order of an epoch."""
        if self._shuffle == "shards":
            return self._in_shards(indices, epoch)
        if not self._shuffle:
            return indices
        keys = round_keys("row", *self._words, epoch)
        return permutation_of_few(self.rows, keys)[indices] if self.rows < SMALL else permute(indices, self.rows, keys)

    def indices_of(self, rows: Integers, epoch: int) -> Integers:
        """Return the position of each row in the order of an epoch, the inverse of `at`."""
        if self._shuffle == "shards":
            self._lay_out(epoch)
            file = self._places[self.files_of(rows)]
            indices: Integers = rows - self._starts[file] + self._ends[file] - self._sizes[file]
            return indices
        return unpermute(rows, self.rows, round_keys("row", *self._words, epoch)) if self._shuffle else rows

    def _in_shards(self, indices: Integers, epoch: int) -> Integers:
        if epoch != self._epoch:
            self._lay_out(epoch)
        file = self._ends.searchsorted(indices, "right")
        rows: Integers = self._starts[file] + indices - self._ends[file] + self._sizes[file]
        return rows

    def _lay_out(self, epoch: int) -> None:
        """Compute for each file, in the order of an epoch: the size, the first row, and the index
        at which the file ends. Also compute the place of each file in that order."""
        sizes = np.array(self._file_sizes)
        keys = round_keys("shard", *self._words, epoch)
        order = permute(np.arange(len(sizes)), len(sizes), keys)
        self._starts = (sizes.cumsum() - sizes)[order]
        self._sizes = sizes[order]
        self._ends = self._sizes.cumsum()
        self._places = np.argsort(order)
        self._epoch = epoch


class _Stretch(NamedTuple):
    """Epochs with the same files: first draw, first epoch, order of rows, and for each file the
    distance from its old to its present row numbers (None for the present files)."""

    draw: int
    epoch: int
    order: EpochOrder
    moves: Integers | None
