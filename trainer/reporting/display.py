"""Show a run: a live line on a terminal, or a line every 10 s in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from checkpoints import printable
from trainer.reporting.metrics import StepMetrics

SECONDS_BETWEEN_LINES = 10
"""Shortest time between two lines in a log."""


class Display:
    """The output of a run on rank 0; silent if `quiet`."""

    def __init__(self, *, quiet: bool) -> None:
        self.console = Console(quiet=quiet, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task("waiting for the first packs", total=1.0)
        self._last_line = 0.0

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a lasting line, above the live line."""
        self.console.print(printable(text), markup=False, soft_wrap=True)

    def step(self, metrics: StepMetrics, share: float | None, *, last: bool) -> None:
        """Show a finished step. `share` is the finished part of the run in [0, 1], None if unknown.

        `last` prints the step in a log, however short the time since the line before.
        """
        line = summary(metrics)
        self._bar.update(self._task, description=line, completed=share or 0.0)
        if metrics.validation_loss is not None:
            self.say(f"step {metrics.step} | validation loss {metrics.validation_loss:.4f}")
        if not self.console.is_terminal and (last or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line = time.monotonic()
            self.say(line if share is None else f"{line} | {share:.0%} done")


def summary(metrics: StepMetrics) -> str:
    """Return a step in one line.

    `trained` is the share of the step's tokens in the loss, `wait` the share of its time spent on
    waiting for packs. On a GPU the line ends with the use of the GPU (MFU) and its peak memory.
    """
    trained = metrics.trained_tokens / max(metrics.tokens, 1)
    gpu = "" if metrics.mfu is None else f" | MFU {metrics.mfu:.1%}"
    gpu += "" if metrics.peak_memory is None else f" | {metrics.peak_memory:.1f} GiB"
    return (
        f"step {metrics.step} | loss {metrics.loss:.4f} | {metrics.tokens_per_second:,.0f} tokens/s | fill {metrics.fill:.1%} | "
        f"trained {trained:.0%} | wait {metrics.data_wait / metrics.seconds:.1%}{gpu}"
    )
