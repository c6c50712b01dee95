"""What a run writes about itself: one line a step, TensorBoard, and the rows it refused."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import msgspec
from torch.utils.tensorboard import SummaryWriter

from trainer.feed import PlacedRefusal


class StepMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `metrics.jsonl`. Counts are of this step over all ranks, padding excluded."""

    step: int
    loss: float
    """Mean over the trained tokens, in nats."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    tokens: int
    trained_tokens: int
    rows: int
    """Conversations given or refused so far."""
    refused: int
    """Rows refused in this step."""
    refused_by_reason: dict[str, int]
    fill: float
    """Share of the packs' slots that conversations take."""
    tokens_per_second: float
    data_wait: float
    """Seconds that the first rank waited for its packs."""
    seconds: float
    batch_digest: str
    """Hash of the step's packs over all ranks, in order."""


class RunLog:
    """The files of a run. Opened at a step, they hold no line of a later one: those were written by a run that was killed
    before it saved, and come again."""

    def __init__(self, directory: Path, step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._metrics = _reopen(directory / "metrics.jsonl", step)
        self._refused = _reopen(directory / "refused.jsonl", step)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sync()
        self._board.close()

    def step(self, metrics: StepMetrics) -> None:
        """Append a step's line."""
        self._write(self._metrics, msgspec.to_builtins(metrics))
        for name in ("loss", "grad_norm", "learning_rate", "fill", "tokens_per_second", "data_wait"):
            self._board.add_scalar(name, getattr(metrics, name), metrics.step)

    def refused(self, step: int, refusals: list[PlacedRefusal]) -> None:
        """Append the rows that were refused for a step."""
        for refusal, place in refusals:
            names = ("source", "row", "epoch", "reason", "detail")
            self._write(
                self._refused, {"step": step, "place": place} | {name: getattr(refusal, name) for name in names}
            )

    def refused_by_reason(self) -> Counter[str]:
        """Rows refused since the run's beginning."""
        self._refused.seek(0)
        return Counter(msgspec.json.decode(line)["reason"] for line in self._refused)

    def sync(self) -> None:
        """Force all lines to the disk; before a checkpoint, so that none of its steps can be missing."""
        for file in (self._metrics, self._refused):
            os.fsync(file.fileno())

    def _write(self, file: IO[bytes], line: dict[str, Any]) -> None:
        file.write(msgspec.json.encode(line) + b"\n")
        file.flush()


def _reopen(path: Path, step: int) -> IO[bytes]:
    """The file for appending, cut after the last line of `step`."""
    file = path.open("a+b")
    file.seek(0)
    end = 0
    for line in file:
        # A run killed while it wrote leaves a torn last line; its step comes again.
        if not line.endswith(b"\n") or msgspec.json.decode(line)["step"] > step:
            break
        end += len(line)
    file.truncate(end)
    return file
