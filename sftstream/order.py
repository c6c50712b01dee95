"""Which row comes when. Pure functions of counters: there is no generator state to lose, and any place can be jumped to."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

from sftstream.config import Shuffle

ROUNDS, SMALL, ROUNDS_OF_SMALL = 8, 256, 24
"""Below some 100 indices 8 rounds leave steps between neighbours up to 8 % likelier than others; 16 show nothing, 24 are safe."""
_MASK = (1 << 64) - 1


@lru_cache(maxsize=1024)
def round_keys(*words: int | str) -> tuple[int, ...]:
    """64-bit keys for `permute`, drawn from `words` (a seed, what is permuted, an epoch, ...)."""
    digest = hashlib.shake_128("\0".join(map(str, words)).encode()).digest(8 * ROUNDS_OF_SMALL)
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def permute(index: int, size: int, keys: tuple[int, ...]) -> int:
    """The place of `index` in a keyed permutation of `range(size)`: O(1) memory, O(1) time.

    A Feistel network over Z_a x Z_b with a*b just above `size` (generalized as in Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002); the few values in a*b that exceed `size` are walked along their cycle.
    """
    a = math.isqrt(size - 1) + 1 if size > 1 else 1
    b = -(-size // a)
    rounds = ROUNDS_OF_SMALL if size < SMALL else ROUNDS
    while True:
        left, right = index % a, index // a
        for i in range(0, rounds, 2):
            left = (left + _mix(right, keys[i])) % a
            right = (right + _mix(left, keys[i + 1])) % b
        index = right * a + left
        if index < size:
            return index


def _mix(value: int, key: int) -> int:
    # The finalizer of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit.
    value = (value * 0x9E3779B97F4A7C15 + key) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def next_source(amounts: Sequence[int], weights: Sequence[float], open_sources: Iterable[int]) -> int | None:
    """The source to draw from next, given how much was drawn of each; None where none is open.

    Sainte-Lague's method: the largest weight / (2 * amount + 1) is next. With conversations as amounts and sizes as
    weights all sources end an epoch together, and after any number of draws each is within one conversation of its share.
    Sources of weight 0 come when all others have ended.
    """
    return max(open_sources, key=lambda i: (weights[i] / (2 * amounts[i] + 1), -i), default=None)


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
        epoch, place = divmod(draw, self.rows)
        if self._shuffle == "shards":
            return self._in_shards(place, epoch), epoch
        if self._shuffle:
            return permute(place, self.rows, round_keys("row", *self._words, epoch)), epoch
        return place, epoch

    def _in_shards(self, place: int, epoch: int) -> int:
        if epoch != self._epoch:
            self._lay_out(epoch)
        index = bisect_right(self._ends, place)
        return self._starts[index] + place - self._ends[index] + self._sizes[index]

    def _lay_out(self, epoch: int) -> None:
        """The shards in the order of an epoch: their sizes, where each begins in the source, where it ends in the epoch."""
        count, keys = len(self._shards), round_keys("shard", *self._words, epoch)
        order = [permute(i, count, keys) for i in range(count)]
        starts = list(accumulate(self._shards, initial=0))
        self._starts = [starts[shard] for shard in order]
        self._sizes = [self._shards[shard] for shard in order]
        self._ends = list(accumulate(self._sizes))
        self._epoch = epoch
