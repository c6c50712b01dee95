"""Count the refused rows of each source over all streams, and stop a run above a limit.

The counts are judged at the end of a step. There, the states of all streams are the same on any
topology, so a run stops at the same step on any topology.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sftstream.config import DataConfig
from sftstream.records import Refusal
from sftstream.state import StreamState

TOO_LONG = frozenset({"longer than capacity", "row too large"})
"""Reasons that count for `max_too_long`; all other reasons count for `max_refused`."""
MIN_ROWS_TO_JUDGE = 100
"""Number of rows of a source at and above which the shares of refused rows are judged."""
LOUD_SHARE = 0.1
"""Share of rows refused for other reasons than their length, above which the trainer prints a
message."""


class RowCounts(NamedTuple):
    """Rows read from a source: accepted, refused for their length, refused for other reasons."""

    accepted: int = 0
    too_long: int = 0
    other: int = 0

    @property
    def rows(self) -> int:
        """All rows read."""
        return sum(self)

    def is_loud(self, size: int | None) -> bool:
        """Return True if more than `LOUD_SHARE` of the rows read are refused for other reasons than
        their length.

        Returns False before `MIN_ROWS_TO_JUDGE` rows, or all `size` rows of a smaller source, are
        read. `size` is None for a streamed source.
        """
        return self.rows >= min(MIN_ROWS_TO_JUDGE, size or MIN_ROWS_TO_JUDGE) and self.other > LOUD_SHARE * self.rows


def row_counts(stream: StreamState) -> tuple[RowCounts, ...]:
    """Return the counts of rows read by a stream, for each source."""
    return tuple(
        RowCounts(amount.conversations, too_long, sum(refused.values()) - too_long)
        for amount, refused in zip(stream.accepted, stream.refused, strict=True)
        for too_long in [sum(count for reason, count in refused.items() if reason in TOO_LONG)]
    )


def sum_row_counts(streams: Iterable[Sequence[RowCounts]]) -> tuple[RowCounts, ...]:
    """Return the sum of the counts of several streams, for each source."""
    return tuple(RowCounts(*map(sum, zip(*source, strict=True))) for source in zip(*streams, strict=True))


class Limit(NamedTuple):
    """A limit on the share of refused rows."""

    key: str
    """Key of the limit in the `[data]` table."""
    refused: str
    """Description of the counted rows, which follows "rows are" in an error message."""
    remedy: str


OTHER = Limit(
    "max_refused",
    "refused for other reasons than their length",
    "correct the rows, or raise data.max_refused (data.max_too_long is the limit for lengths)",
)
TOO_LONG_ROWS = Limit(
    "max_too_long",
    "too long",
    "raise data.capacity, set data.overflow, or raise data.max_too_long (data.max_refused is the limit for other "
    "reasons)",
)


def limit_of(reason: str) -> Limit:
    """Return the limit that counts a row refused for `reason`."""
    return TOO_LONG_ROWS if reason in TOO_LONG else OTHER


def exceeded_limits(
    config: DataConfig, sizes: Sequence[int | None], counts: Sequence[RowCounts]
) -> list[tuple[int, Limit]]:
    """Return the number of each source with too large a share of refused rows, and the limit.

    `sizes` holds the number of rows of each source, None if streamed; `counts` holds for each
    source the sum over all streams at the end of a step.
    """
    return [
        (number, limit)
        for number, (size, count) in enumerate(zip(sizes, counts, strict=True))
        for limit, refused in ((OTHER, count.other), (TOO_LONG_ROWS, count.too_long))
        if count.rows >= MIN_ROWS_TO_JUDGE and refused > _most(getattr(config, limit.key), count.rows, size)
    ]


def _most(share: float, rows: int, size: int | None) -> float:
    """Return the largest number of refused rows among `rows` read rows under a limit of `share`.

    Until all `size` rows of the source are read, a share above the limit may be chance, so three
    standard deviations are added. A limit of 0.1 allows 19 refused rows of 100, and 1,090 of
    10,000.
    """
    whole = size is not None and rows >= size
    return share * rows + (0 if whole else 3 * math.sqrt(share * (1 - share) * rows))


def require_few_refused(
    config: DataConfig,
    sizes: Sequence[int | None],
    counts: Sequence[RowCounts],
    located: Iterable[tuple[Refusal, str]] = (),
) -> None:
    """Raise ValueError naming the first source with too large a share of refused rows.

    `sizes` and `counts` are the arguments of `exceeded_limits`. `located` holds refused rows with
    their locations; the message names the first row that counts for the limit.
    """
    for number, limit in exceeded_limits(config, sizes, counts):
        count = counts[number]
        refused, size = count.other if limit is OTHER else count.too_long, sizes[number]
        passes = f", read in several passes over its {size:,}," if size is not None and count.rows > size else ""
        examples = (
            f" (one is {where}: {r.reason}: {r.detail})"
            for r, where in located
            if r.source == number and limit_of(r.reason) is limit
        )
        raise ValueError(
            f"source {number} ({config.sources[number].path}): {refused:,} of {count.rows:,} rows{passes} are {limit.refused}, "
            f"more than data.{limit.key} = {getattr(config, limit.key)}{next(examples, '')}; {limit.remedy}"
        )
