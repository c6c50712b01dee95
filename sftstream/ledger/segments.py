"""Describe the segments of a step's packs as a NumPy array with an entry for each segment."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftstream.records import Pack, Segment

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
_ENTRY = struct.Struct("<qiiiiii")
"""An entry of `SEGMENT` as bytes."""
SKIPPED = -1
"""Value of `trained_tokens` of a skipped segment."""

Segments = NDArray[Any]
"""One-dimensional array of the type `SEGMENT`."""
NO_SEGMENTS: Segments = np.empty(0, SEGMENT)


def segments_of(packs: Sequence[Pack], places: Iterable[int] | None = None) -> Segments:
    """Return the segments of `packs` in order. The skipped segments of a pack follow its other
    segments.

    Their field `pack` is the index in `packs`. `places`, if given, has the field for each pack, but
    for empty packs at the end.
    """
    numbered = zip(itertools.count() if places is None else places, packs, strict=False)
    # A structured array made of bytes takes half the time of one made of tuples.
    content = b"".join(
        _ENTRY.pack(s.row, place, s.source, s.epoch, s.part, s.length, trained)
        for place, pack in numbered
        for s, trained in _described(pack)
    )
    return np.frombuffer(content, SEGMENT) if content else NO_SEGMENTS


def _described(pack: Pack) -> list[tuple[Segment, int]]:
    """Return each segment with its number of labels that count in the loss, or `SKIPPED`."""
    trained, borders = pack.trained.tobytes(), pack.borders.tolist()
    # No token predicts the first token of a segment.
    counts = [trained.count(1, start + 1, end) for start, end in itertools.pairwise(borders)]
    return [*zip(pack.segments, counts, strict=False), *((segment, SKIPPED) for segment in pack.skipped)]


def given(segments: Segments) -> Segments:
    """Return the segments that are in packs, without the skipped segments."""
    chosen: Segments = segments[segments["trained_tokens"] != SKIPPED]
    return chosen


def skipped(segments: Segments) -> Segments:
    """Return the segments that `data.skip` has left out of packs."""
    chosen: Segments = segments[segments["trained_tokens"] == SKIPPED]
    return chosen
