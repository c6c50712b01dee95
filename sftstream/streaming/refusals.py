"""The limit on refused rows of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from sftstream.records import Pack
from sftstream.state import StreamState

MIN_ROWS_TO_JUDGE = 100
"""Rows read before the share of refused rows is compared with `max_refused`."""


class RefusalLimit:
    """Counts accepted and refused rows, and stops a run with too many refusals."""

    def __init__(self, max_refused: float, streams: Collection[StreamState]) -> None:
        self._max_refused = max_refused
        self._accepted = sum(stream.conversations for stream in streams)
        self._refused = sum((Counter(stream.refused) for stream in streams), Counter[str]())

    def count(self, pack: Pack) -> None:
        """Add a pack's rows; raises ValueError if the share of refused rows is above the limit."""
        self._accepted += pack.conversations
        self._refused.update(refusal.reason for refusal in pack.refused)
        refused = self._refused.total()
        rows = self._accepted + refused
        if rows >= MIN_ROWS_TO_JUDGE and refused > self._max_refused * rows:
            counts = self._refused.most_common()
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in counts)
            raise ValueError(
                f"{refused:,} of {rows:,} rows were refused, more than data.max_refused = "
                f"{self._max_refused} ({reasons}); correct the data, or raise data.max_refused"
            )
