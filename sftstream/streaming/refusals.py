"""Stop a run in which too many rows are refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sftstream.records import Pack
from sftstream.state import StreamState

MIN_ROWS_TO_JUDGE = 100
"""Rows read before the share of refused rows is compared with `max_refused`."""


@dataclass(frozen=True)
class RefusalLimit:
    """Numbers of accepted and refused rows, compared with the limit `data.max_refused`."""

    max_refused: float
    accepted: int
    refused: Mapping[str, int]
    """Reason -> number of refused rows."""

    @classmethod
    def of(cls, max_refused: float, streams: Collection[StreamState]) -> RefusalLimit:
        """Return the counts of `streams`, without refusals that the next packs will list."""
        refused = sum((Counter(stream.refused) for stream in streams), Counter[str]())
        refused.subtract(refusal.reason for stream in streams for refusal in stream.unlisted)
        return cls(max_refused, sum(stream.conversations for stream in streams), +refused)

    def counted(self, pack: Pack) -> RefusalLimit:
        """Return the counts after a pack.

        Raises ValueError if the share of refused rows is above `max_refused`.
        """
        refused = self.refused
        if pack.refused:
            refused = Counter(refused) + Counter(refusal.reason for refusal in pack.refused)
        after = RefusalLimit(self.max_refused, self.accepted + pack.conversations, refused)
        after._require_few_refused()
        return after

    def _require_few_refused(self) -> None:
        refused = sum(self.refused.values())
        rows = self.accepted + refused
        if rows >= MIN_ROWS_TO_JUDGE and refused > self.max_refused * rows:
            counts = Counter(self.refused).most_common()
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in counts)
            raise ValueError(
                f"{refused:,} of {rows:,} rows were refused, more than data.max_refused = "
                f"{self.max_refused} ({reasons}); correct the data, or raise data.max_refused"
            )
