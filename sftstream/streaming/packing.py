"""Divide examples into packs by their lengths, and build a pack from examples: pure functions."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import xxhash

from sftstream.records import Example, Pack, Refusal, Segment


def plan_packs(lengths: Sequence[int], capacity: int, urgent: Sequence[bool]) -> list[list[int]]:
    """Divide the indices of `lengths` into packs: best-fit decreasing, O(n log n).

    Examples are placed from the longest to the shortest, `urgent` examples before all others. Each
    example goes into the fullest pack that has enough room, or else opens a new pack. No length may
    exceed `capacity`.

    Example: for the lengths `[60, 30, 50, 40]`, capacity 100 and no urgent examples, the result is
    `[[0, 3], [2, 1]]`. 60 opens the first pack, and 50 the second. 40 fills the first. 30 goes into
    the second.
    """
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, pack), sorted
    ranks = [length + (capacity if first else 0) for length, first in zip(lengths, urgent, strict=True)]
    for index in sorted(range(len(lengths)), key=ranks.__getitem__, reverse=True):
        length = lengths[index]
        at = bisect_left(free, (length, -1))
        if at < len(free):
            room, pack = free.pop(at)
            packs[pack].append(index)
        else:
            room, pack = capacity, len(packs)
            packs.append([index])
        insort(free, (room - length, pack))
    return packs


def joined(examples: Sequence[Example]) -> Example:
    """Return one example with the tokens of all `examples`, in order."""
    return Example(
        np.concatenate([example.tokens for example in examples]),
        np.concatenate([example.loss_mask for example in examples]),
        sum([example.targets for example in examples]),
    )


def example_digest(example: Example) -> int:
    """Return a 32-bit digest of an example's tokens and loss mask, in a microsecond for a pack."""
    seed = xxhash.xxh3_64_intdigest(np.ascontiguousarray(example.tokens).data)
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(example.loss_mask).data, seed) & 0xFFFFFFFF


def build_pack(
    examples: Sequence[Example],
    segments: Sequence[Segment],
    capacity: int,
    pad_id: int,
    refused: Sequence[Refusal] = (),
    exhausted: bool = False,
) -> Pack:
    """Return a pack with the tokens of `examples`, padded to `capacity` with `pad_id`.

    `examples` concatenated are the tokens of `segments`. An item of `examples` may be the joined
    tokens of several segments (see `joined`). For segments of 3 and 2 tokens and capacity 8, the
    borders are `[0, 3, 5, 8]`.
    """
    lengths = [segment.length for segment in segments]
    used = sum(lengths)
    if used < capacity:
        lengths.append(capacity - used)
    ids = np.full(capacity, pad_id, np.int32)
    trained = np.zeros(capacity, bool)
    if examples:
        np.concatenate([example.tokens for example in examples], out=ids[:used])
        np.concatenate([example.loss_mask for example in examples], out=trained[:used])
    borders = np.array([0, *accumulate(lengths)], np.int32)
    return Pack(ids, trained, borders, tuple(segments), tuple(refused), exhausted)


def window_size(window: int, windows: int, stream: int, streams: int) -> int:
    """Return the number of examples in a stream's window number `windows`, counted from 0.

    The first window is an eighth of `window`, so that the first pack comes early. The second window
    is different in each stream, because otherwise all streams would have to read a window in the
    same step. For `window = 256` and 2 streams: 32, 144, 256, 256, ... in stream 0, and 32, 256,
    256, ... in stream 1.
    """
    if windows == 0:
        return max(1, window // 8)
    if windows == 1:
        return max(1, window // 8 + (window - window // 8) * (stream + 1) // streams)
    return window
