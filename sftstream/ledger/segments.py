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
    parts = [_segments(index, pack) for index, pack in enumerate(packs) if pack.segments or pack.skipped]
    return np.concatenate(parts) if parts else NO_SEGMENTS


def _segments(index: int, pack: Pack) -> Segments:
    labels = pack.trained.copy()
    labels[pack.borders[:-1]] = False  # no token predicts the first token of a segment
    segments = (*pack.segments, *pack.skipped)
    result = np.empty(len(segments), SEGMENT)
    columns = zip(*[(s.source, s.row, s.length, s.epoch, s.part) for s in segments], strict=True)
    for name, column in zip(("source", "row", "tokens", "epoch", "part"), columns, strict=True):
        result[name] = column
    result["pack"] = index
    given = len(pack.segments)
    result["trained_tokens"][:given] = np.add.reduceat(labels, pack.borders[:-1], dtype=np.int32)[:given]
    result["trained_tokens"][given:] = SKIPPED
    return result


def given(segments: Segments) -> Segments:
    """Return the segments that are in packs, without the skipped segments."""
    chosen: Segments = segments[segments["trained_tokens"] != SKIPPED]
    return chosen


def skipped(segments: Segments) -> Segments:
    """Return the segments that `data.skip` has left out of packs."""
    chosen: Segments = segments[segments["trained_tokens"] == SKIPPED]
    return chosen
