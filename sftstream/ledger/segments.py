"""Describe the segments of a step's packs as a NumPy array with an entry for each segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftstream.records import Pack

SEGMENT = np.dtype(
    [
        ("row", "<i8"),
        ("pack", "<i4"),
        ("source", "<i4"),
        ("epoch", "<i4"),
        ("part", "<i4"),
        ("tokens", "<i4"),
        ("trained_tokens", "<i4"),
    ]
)
"""An entry of 32 bytes for a segment: the fields of a `Segment`, the place of the pack in the step,
counted from 0, and the number of labels of the segment that count in the loss. `trained_tokens` is
`SKIPPED` for a segment that `data.skip` has left out of the pack."""
SKIPPED = -1
"""Value of `trained_tokens` of a skipped segment."""

Segments = NDArray[Any]
"""One-dimensional array of the type `SEGMENT`."""
NO_SEGMENTS: Segments = np.empty(0, SEGMENT)


def segments_of(packs: Sequence[Pack]) -> Segments:
    """Return the segments of `packs` in order; their field `pack` is the index in `packs`. The
    skipped segments of a pack follow its other segments."""
    rows = [
        (s.row, index, s.source, s.epoch, s.part, s.length, SKIPPED)
        for index, pack in enumerate(packs)
        for s in (*pack.segments, *pack.skipped)
    ]
    if not rows:
        return NO_SEGMENTS
    result = np.array(rows, SEGMENT)
    counts, at = result["trained_tokens"], 0
    for pack in packs:
        count = len(pack.segments)
        counts[at : at + count] = _trained_tokens(pack)[:count]
        at += count + len(pack.skipped)
    return result


def _trained_tokens(pack: Pack) -> NDArray[np.int32]:
    """Return the number of labels of each segment, padding included."""
    starts = pack.borders[:-1]
    # No token predicts the first token of a segment.
    counts: NDArray[np.int32] = np.add.reduceat(pack.trained, starts, dtype=np.int32) - pack.trained[starts]
    return counts


def given(segments: Segments) -> Segments:
    """Return the segments that are in packs, without the skipped segments."""
    chosen: Segments = segments[segments["trained_tokens"] != SKIPPED]
    return chosen


def skipped(segments: Segments) -> Segments:
    """Return the segments that `data.skip` has left out of packs."""
    chosen: Segments = segments[segments["trained_tokens"] == SKIPPED]
    return chosen
