"""What a run writes about itself: one line a step, TensorBoard, and the rows it refused."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from contextlib import suppress
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from trainer.training.step_reader import LocatedRefusal

logger = logging.getLogger(__name__)


CURVES = ("loss", "validation_loss", "grad_norm", "learning_rate", "fill", "tokens_per_second", "data_wait")


class StepMetrics(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
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
    validation_loss: float | None = None
    """Mean over the trained tokens that are held out, after the step; left out where it was not taken."""


class RunLog:
    """The files of a run. Opened at a step, they hold no line of a later one: those were written by a run that was killed
    before it saved, and come again."""

    def __init__(self, directory: Path, step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._metrics = Lines(directory / "metrics.jsonl", step)
        self._refused = Lines(directory / "refused.jsonl", step)
        self._curves = Curves(directory / "tensorboard", step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._curves.close()
        self.sync()

    def step(self, metrics: StepMetrics) -> None:
        """Append a step's line."""
        self._metrics.add(msgspec.to_builtins(metrics))
        self._curves.add(metrics)

    def refused(self, step: int, refusals: list[LocatedRefusal]) -> None:
        """Append the rows that were refused for a step."""
        for refusal, location in refusals:
            names = ("source", "row", "epoch", "reason", "detail")
            self._refused.add({"step": step, "place": location} | {name: getattr(refusal, name) for name in names})

    def refused_by_reason(self) -> Counter[str]:
        """Rows refused since the run's beginning."""
        return Counter(line["reason"] for line in self._refused.read())

    def sync(self) -> None:
        """Force all lines to the disk; before a checkpoint, so that none of its steps can be missing. OSError if it fails."""
        self._metrics.sync()
        self._refused.sync()


class Curves:
    """A file of TensorBoard's. It ends where a disk does not take it, and the run goes on.

    Written in this thread: torch's writer has one of its own, which a full disk ends with a traceback, and a run whose queue is
    full then would wait for it for ever.
    """

    def __init__(self, directory: Path, step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{os.uname().nodename}.{os.getpid()}"
        self._file = (directory / name).open("wb", buffering=0)
        self._records: RecordWriter | None = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        # What other files have from this step on is not shown.
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, metrics: StepMetrics) -> None:
        """A point on each curve."""
        values = {name: getattr(metrics, name) for name in CURVES}
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items() if value is not None]
        self._write(Event(step=metrics.step, summary=Summary(value=points)))

    def close(self) -> None:
        """Nothing is written after this."""
        self._file.close()

    def _write(self, event: Any) -> None:
        if self._records is None:
            return
        event.wall_time = time.time()
        try:
            self._records.write(event.SerializeToString())
        except OSError as error:
            self._records = None
            logger.warning("the curves in tensorboard/ end here: %s", error)


class Lines:
    """A file of JSON lines. What a full disk does not take waits in memory for the next try: no line is lost or torn."""

    def __init__(self, path: Path, step: int) -> None:
        self._file = _reopen(path, step)
        self._waiting = b""

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self._waiting += msgspec.json.encode(line) + b"\n"
        with suppress(OSError):  # `sync` raises it, where nothing may be missing any more.
            self._write()

    def sync(self) -> None:
        """Force all lines to the disk."""
        self._write()
        os.fsync(self._file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All lines that are in the file."""
        self._file.seek(0)
        return [msgspec.json.decode(line) for line in self._file]

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[os.write(self._file.fileno(), self._waiting) :]


class _Numbered(msgspec.Struct):
    step: int


def _reopen(path: Path, step: int) -> BufferedRandom:
    """The file for appending, cut after the last line of `step`."""
    file = path.open("a+b")
    file.seek(0)
    end = 0
    for number, line in enumerate(file, 1):
        # A run killed while it wrote leaves a torn last line; its step comes again.
        if not line.endswith(b"\n"):
            break
        try:
            if msgspec.json.decode(line, type=_Numbered).step > step:
                break
        except msgspec.MsgspecError as error:
            raise ValueError(
                f"{path}:{number} is no line of a run: {error}; take it out, or move the file away"
            ) from error
        end += len(line)
    file.truncate(end)
    return file
