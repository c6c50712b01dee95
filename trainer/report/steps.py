"""Fold the lines of `metrics.jsonl` into totals and curves, step by step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.report.bins import Bins
from trainer.report.lines import LineReader
from trainer.report.records import Best, Curve, StepLine
from trainer.reporting.events import METRICS

CURVES = (
    "loss",
    "validation_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "gpu_tokens_per_second",
    "mfu",
    "fill",
    "trained_share",
    "data_wait",
    "peak_memory",
    "time",
    "trained_tokens",
)
"""Names of the curves. `data_wait` is a share of the step, `trained_tokens` the sum so far."""
PORTION = 4096
"""Lines that are folded into the curves at once."""


class Steps:
    """The steps of a run so far: sums and curves. Each step counts once."""

    def __init__(self, directory: Path, marked: Collection[int]) -> None:
        self.lines = LineReader[StepLine](directory / METRICS, StepLine)
        self.last: StepLine | None = None
        """Last step."""
        self.times: dict[int, float] = {}
        """Unix time of each step in `marked`."""
        self.loss: float | None = None
        """Last finite loss."""
        self.validation_loss: float | None = None
        self.best: Best | None = None
        self.without_loss = self.tokens = self.trained_tokens = self.refused = 0
        self.seconds = self.waited = 0.0
        self.mfu_seconds = self.mfu_weighted = 0.0
        self.gpu_tokens = 0.0
        """Tokens for each rank, summed over the steps that tell it."""
        self.peak_memory: float | None = None
        self.filled = self.fill_steps = 0.0
        self.reasons = Counter[str]()
        self.source_tokens: tuple[int, ...] = ()
        self._bins = Bins(len(CURVES))
        self._mixture = Bins(1)
        self._held_out = Bins(0)
        self._marked = marked

    def read(self) -> None:
        """Read further lines. Raises OSError if the file cannot be read."""
        lines = self._in_order()
        while portion := list(islice(lines, PORTION)):
            steps = np.array([line.step for line in portion], np.int64)
            rows = [self._fold(line) for line in portion]
            self._bins.add(steps, np.array(rows, np.float64))  # None becomes NaN
            self._mix(portion, steps)
            self._hold_out(portion, steps)

    def curves(self) -> dict[str, Curve]:
        """Return the curves that have a value."""
        found = {name: _curve(self._bins, number) for number, name in enumerate(CURVES)}
        return {name: curve for name, curve in found.items() if any(value is not None for value in curve.mean)}

    def held_out(self) -> tuple[Curve, ...]:
        """Return the validation loss of each held-out source."""
        return tuple(_curve(self._held_out, source) for source in range(self._held_out.curves))

    def mixture(self) -> list[tuple[float | None, ...]]:
        """Return the share of each source in the tokens of each bin of the curves."""
        sums = self._mixture.sums()
        totals = sums.sum(1)
        return [
            tuple(float(part / total) if total else None for part, total in zip(sums[:, source], totals, strict=True))
            for source in range(len(self.source_tokens))
        ]

    def _in_order(self) -> Iterator[StepLine]:
        for line in self.lines.new():
            before = self.last.step if self.last else 0
            if line.step <= before:
                self.lines.note(f"step {line.step} comes after step {before}")
                continue
            self.last = line
            yield line

    def _fold(self, line: StepLine) -> tuple[float | None, ...]:
        """Add a step to the sums, and return its values of the curves, None for a missing value."""
        self._count(line)
        self._judge(line)
        wait = line.data_wait / line.seconds if line.data_wait is not None and line.seconds else None
        trained = line.trained_tokens / line.tokens if line.tokens else None
        return (
            line.loss,
            line.validation_loss,
            line.learning_rate,
            line.grad_norm,
            line.tokens_per_second,
            line.gpu_tokens_per_second,
            line.mfu,
            line.fill,
            trained,
            wait,
            line.peak_memory,
            line.time,
            self.trained_tokens,
        )

    def _count(self, line: StepLine) -> None:
        self.tokens += line.tokens
        self.trained_tokens += line.trained_tokens
        self.refused += line.refused
        if line.refused_by_reason:
            self.reasons.update(line.refused_by_reason)
        if line.step in self._marked and line.time is not None:
            self.times[line.step] = line.time
        seconds = line.seconds or 0.0
        self.seconds += seconds
        self.waited += line.data_wait or 0.0
        self.gpu_tokens += (line.gpu_tokens_per_second or 0.0) * seconds
        if line.mfu is not None:
            self.mfu_seconds += seconds
            self.mfu_weighted += line.mfu * seconds
        if line.fill is not None:
            self.filled += line.fill
            self.fill_steps += 1

    def _judge(self, line: StepLine) -> None:
        if line.loss is not None and math.isfinite(line.loss):
            self.loss = line.loss
        else:
            self.without_loss += 1
        if line.peak_memory is not None:
            self.peak_memory = max(self.peak_memory or 0.0, line.peak_memory)
        validated = line.validation_loss
        if validated is not None and math.isfinite(validated):
            self.validation_loss = validated
            if self.best is None or validated < self.best.loss:
                self.best = Best(line.step, validated)

    def _hold_out(self, portion: list[StepLine], steps: NDArray[np.int64]) -> None:
        losses = [line.validation_loss_by_source or () for line in portion]
        table = np.full((len(portion), max(map(len, losses))), np.nan)
        for row, line in zip(table, losses, strict=True):
            row[: len(line)] = line  # None becomes NaN
        self._held_out.add(steps, table)

    def _mix(self, portion: list[StepLine], steps: NDArray[np.int64]) -> None:
        count = max((len(line.tokens_by_source or ()) for line in portion), default=0)
        count = max(count, len(self.source_tokens))
        if not count:
            return
        table = np.zeros((len(portion), count))
        for row, line in zip(table, portion, strict=True):
            row[: len(line.tokens_by_source or ())] = line.tokens_by_source or ()
        self._mixture.add(steps, table)
        before = np.zeros(count)
        before[: len(self.source_tokens)] = self.source_tokens
        self.source_tokens = tuple((before + table.sum(0)).astype(int).tolist())


def _curve(bins: Bins, number: int) -> Curve:
    return Curve(
        steps=tuple(bins.last_steps),
        mean=tuple(bins.means(number)),
        low=tuple(bins.lows(number)),
        high=tuple(bins.highs(number)),
    )
