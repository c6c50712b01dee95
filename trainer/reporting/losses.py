"""Say once for each source that many of its rows are refused."""

from __future__ import annotations

from collections.abc import Sequence

from sftstream import PackLoader, RowCounts
from trainer.reporting.display import Display
from trainer.reporting.metrics import RunLog


class LossReport:
    """The sources of a run with many refused rows, each said once."""

    def __init__(self, loader: PackLoader, log: RunLog, display: Display) -> None:
        self._paths = [source.path for source in loader.config.sources]
        self._sizes = loader.corpus.sizes
        self._log = log
        self._display = display
        self._said: set[int] = set()

    def check(self, counts: Sequence[RowCounts]) -> None:
        """Say the share and the first refused row of each further source that loses many rows.

        `counts` are the rows read from each source since the start of the run.
        """
        for number, (count, size) in enumerate(zip(counts, self._sizes, strict=True)):
            if number in self._said or not count.is_loud(size):
                continue
            self._said.add(number)
            first = self._log.first_refused(number)
            self._display.say(
                f"source {number} ({self._paths[number]}): {count.other:,} of {count.rows:,} rows are refused for other "
                f"reasons than their length{f', the first at {first}' if first else ''}; see refused.jsonl"
            )
