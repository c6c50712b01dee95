"""Which row comes when. Pure functions of counters: there is no generator state to lose, and any place can be jumped to."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sftstream.config import Shuffle

ROUNDS, SMALL, ROUNDS_OF_SMALL = 8, 256, 24
"""Below some 100 indices 8 rounds leave steps between neighbours up to 8 % likelier than others; 16 show nothing, 24 are safe."""

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]


@lru_cache(maxsize=1024)
def round_keys(*words: int | str) -> tuple[int, ...]:
    """64-bit keys for `permute`, drawn from `words` (a seed, what is permuted, an epoch, ...)."""
    return tuple(_drawn(ROUNDS_OF_SMALL, words).tolist())


def _drawn(count: int, words: Iterable[int | str]) -> Words:
    """So many random 64-bit words, always the same for these `words`."""
    bits = hashlib.shake_128("\0".join(map(str, words)).encode()).digest(8 * count)
    return np.frombuffer(bits, "<u8")


def permute(indices: Integers, size: int, keys: tuple[int, ...]) -> Integers:
    """The places of `indices` in a keyed permutation of `range(size)`: O(1) memory and time each.

    A Feistel network over Z_a x Z_b with a*b just above `size` (generalized as in Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002); the few values in a*b that exceed `size` are walked along their cycle.
    """
    a = math.isqrt(size - 1) + 1 if size > 1 else 1
    b = -(-size // a)
    positions = indices.astype(np.uint64)
    outside = np.full(len(positions), True)
    while outside.any():
        positions[outside] = _network(positions[outside], np.uint64(a), np.uint64(b), size, keys)
        outside = positions >= np.uint64(size)
    return positions.astype(np.int64)


def _network(values: Words, a: np.uint64, b: np.uint64, size: int, keys: tuple[int, ...]) -> Words:
    left, right = values % a, values // a
    for i in range(0, ROUNDS_OF_SMALL if size < SMALL else ROUNDS, 2):
        left = (left + _mix(right, keys[i]) % a) % a
        right = (right + _mix(left, keys[i + 1]) % b) % b
    return right * a + left


def _mix(values: Words, key: int) -> Words:
    # The finalizer of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit.
    values = values * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shuffled(count: int, *words: int | str) -> list[int]:
    """An order of so few things that each can be given 64 bits drawn from `words`, by which they are sorted."""
    order: list[int] = _drawn(count, words).argsort(kind="stable").tolist()
    return order


@lru_cache(maxsize=256)
def permutation_of_few(size: int, keys: tuple[int, ...]) -> Integers:
    """All places at once, where several streams share the few rows of an epoch."""
    return permute(np.arange(size), size, keys)


def next_source(amounts: Sequence[int], weights: Sequence[float], open_sources: Iterable[int]) -> int | None:
    """The source to draw from next, given how much was drawn of each; None where none is open.

    Sainte-Lague's method: the largest weight / (2 * amount + 1) is next. With conversations as amounts and sizes as
    weights all sources end an epoch together, and after any number of draws each is within one conversation of its share.
    Sources of weight 0 come when all others have ended.
    """
    found, most = None, -1.0
    for source in open_sources:
        share = weights[source] / (2 * amounts[source] + 1)
        if share > most:
            found, most = source, share
    return found


def draws_of_source(rows: int, repeat: float, epochs: int) -> int:
    """How many rows all epochs draw of a source. `repeat` counts as it is written: as floats 100 * 0.57 is less than 57."""
    return int(rows * epochs * Fraction(str(repeat)))


def draws_of_stream(draws: int, stream: int, streams: int) -> int:
    """How many of a source's `draws` fall to one logical stream."""
    return len(range(stream, draws, streams))


class RowOrder:
    """Which row each draw of a source takes, draws being counted over all streams and epochs.

    Stream `s` of `S` takes the draws `s, s + S, s + 2S, ...`: it passes from one epoch to the next without waiting for
    others, and sources smaller than `S` still reach every stream. `shards` are the sizes of those that the rows lie in.
    """

    def __init__(self, shards: Sequence[int], seed: int, source: int, shuffle: Shuffle) -> None:
        self.rows = sum(shards)
        self._shards = shards
        self._words = seed, source
        self._shuffle = shuffle
        self._epoch = -1

    def at(self, draw: int) -> tuple[int, int]:
        """`(row, epoch)` of a draw."""
        (row,), epoch = self.stretch(draw, 1, 1)
        return row, epoch

    def stretch(self, first: int, step: int, most: int) -> tuple[list[int], int]:
        """Rows of the draws `first`, `first + step`, ..., and their epoch: `most` of them, or as many as that has."""
        epoch, position = divmod(first, self.rows)
        count = min(most, -(-(self.rows - position) // step))
        return self._rows(np.arange(position, position + count * step, step), epoch).tolist(), epoch

    def _rows(self, positions: Integers, epoch: int) -> Integers:
        if self._shuffle == "shards":
            return self._in_shards(positions, epoch)
        if not self._shuffle:
            return positions
        keys = round_keys("row", *self._words, epoch)
        return (
            permutation_of_few(self.rows, keys)[positions] if self.rows < SMALL else permute(positions, self.rows, keys)
        )

    def _in_shards(self, positions: Integers, epoch: int) -> Integers:
        if epoch != self._epoch:
            self._lay_out(epoch)
        index = self._ends.searchsorted(positions, "right")
        rows: Integers = self._starts[index] + positions - self._ends[index] + self._sizes[index]
        return rows

    def _lay_out(self, epoch: int) -> None:
        """The shards in the order of an epoch: their sizes, where each begins in the source, where it ends in the epoch."""
        sizes = np.array(self._shards)
        order = permute(np.arange(len(sizes)), len(sizes), round_keys("shard", *self._words, epoch))
        self._starts = (sizes.cumsum() - sizes)[order]
        self._sizes = sizes[order]
        self._ends = self._sizes.cumsum()
        self._epoch = epoch
