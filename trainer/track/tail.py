"""Read the steps of a run from `metrics.jsonl` while the run writes them, and cuts them back."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from trainer.report.lines import LineReader
from trainer.reporting.events import METRICS
from trainer.track.content import Step, step_of


class Tail:
    """The steps in `metrics.jsonl`, in batches.

    A resume cuts the file back to its checkpoint, maybe in the middle of a reading. Steps that do
    not follow each other, or a damaged line, start the reading from the beginning of the file.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / METRICS
        self._lines = self._open()
        self._damaged = 0

    def batch(self, after: int, most: int) -> list[Step]:
        """Return further steps with numbers above `after`, of about `most` values; [] if there are
        none. Steps are in increasing order, each of them once.

        Raises OSError if the file cannot be read.
        """
        steps = self._take(after, most)
        if self._lines.damaged == self._damaged and _follow(after, steps):
            return steps
        self._lines = self._open()
        steps = self._take(after, most)
        self._damaged = self._lines.damaged
        return steps

    def _take(self, after: int, most: int) -> list[Step]:
        steps: list[Step] = []
        values, last = 0, after
        for line in self._lines.new():
            number = line.get("step")
            if not isinstance(number, int) or number <= last:
                continue
            step = step_of(line)
            steps.append(step)
            last, values = number, values + len(step.values)
            if values >= most:
                break
        return steps

    def _open(self) -> LineReader[dict[str, Any]]:
        return LineReader(self._path, dict[str, Any])


def _follow(after: int, steps: list[Step]) -> bool:
    numbers = [after, *(step.number for step in steps)]
    return all(next_ == number + 1 for number, next_ in pairwise(numbers))
