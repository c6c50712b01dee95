"""Plan packs from lengths alone, and build a pack from examples: pure functions."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import xxhash

from sftstream.records import Example, Pack, Refusal, Segment


def plan_packs(lengths: Sequence[int], capacity: int, urgent: Sequence[bool]) -> list[list[int]]:
    """Group indices into packs by best-fit decreasing, O(n log n). No length exceeds `capacity`.

    The longest example comes first and goes into the fullest pack with enough room; `urgent`
    examples come before all others.

    For lengths `[60, 30, 50, 40]`, capacity 100 and nothing urgent the packs are
    `[[0, 3], [2, 1]]`: 60 and 50 open a pack each, 40 fills the first, 30 goes into the second.
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
    """Concatenate examples."""
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
    """Concatenate `examples` and fill the rest of `capacity` with a padding segment of `pad_id`.

    The examples hold the tokens of `segments` in order; examples of several segments may be joined.

    For segments of 3 and 2 tokens and capacity 8 the borders are `[0, 3, 5, 8]`.
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
    """Return the number of examples in a stream's next window, after `windows` planned windows.

    The first window is an eighth of `window`, for an early first pack. The second window differs
    from stream to stream: otherwise all streams would read a window during a single step.
    """
    if windows == 0:
        return max(1, window // 8)
    if windows == 1:
        return max(1, window // 8 + (window - window // 8) * (stream + 1) // streams)
    return window
