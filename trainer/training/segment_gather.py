"""Send each rank's segments of a step along with the step's counts, in the same collective.

The counts travel in an all_gather, which needs rows of equal length. A row has room for a number of
segments that all ranks change alike: if any rank announces more segments than there is room for,
all ranks gather once more and then have more room. So only the first steps gather twice.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sftstream import NO_SEGMENTS, SEGMENT, Segments

WORDS = SEGMENT.itemsize // 8
"""Number of 64-bit words of a segment."""


class SegmentGather:
    """Room in the row of counts for the segments of a rank: `[number, segment, segment, ...]`."""

    def __init__(self, room: int = 64) -> None:
        self.room = room
        """Number of segments that fit into a row, equal on all ranks."""

    def row(self, segments: Segments) -> Tensor:
        """Return the row of this rank, int64 `(1 + WORDS * room,)`.

        With too many segments the row has their number alone.
        """
        row = bytearray(8 * (1 + WORDS * self.room))
        row[:8] = len(segments).to_bytes(8, sys.byteorder)
        if len(segments) <= self.room:
            row[8 : 8 + segments.nbytes] = segments.tobytes()
        return torch.frombuffer(row, dtype=torch.int64)

    def gathered(self, rows: Tensor, local: Segments, *, first: bool) -> Segments:
        """Return the segments of all ranks on the first rank, and none elsewhere. Collective.

        `rows` holds the rows of all ranks, int64 `(ranks, 1 + WORDS * room)`; `local` are the
        segments of this rank.
        """
        table = rows.numpy()
        counts = table[:, 0].tolist()
        if (most := max(counts)) > self.room:
            self.room = most + most // 4
            row = self.row(local)
            gathered = [torch.empty_like(row) for _ in range(len(rows))]
            dist.all_gather(gathered, row)
            table = torch.stack(gathered).numpy()
        if not first:
            return NO_SEGMENTS
        return np.concatenate([row[1 : 1 + WORDS * n] for row, n in zip(table, counts, strict=True)]).view(SEGMENT)
