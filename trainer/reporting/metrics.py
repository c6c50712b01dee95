"""Write a run's files: `metrics.jsonl`, `refused.jsonl`, the events, the ledger, TensorBoard."""

from __future__ import annotations

import logging
import math
import os
import sys
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

from sftstream import TOO_LONG, UNDECODABLE, LedgerWriter, one_line
from trainer.reporting.events import EventLog
from trainer.training.step_reader import LocatedRefusal

logger = logging.getLogger(__name__)

LONGEST_LINE = 1 << 14
"""Bytes at the end of a file in which its last line is looked for first."""
MOST_LOSS = math.log(sys.float_info.max)
"""Loss from which on its exponential is not finite."""

CURVES_BY_SOURCE = (
    "validation_loss_by_source",
    "validation_perplexity_by_source",
    "trained_tokens_by_source",
    "share_by_source",
    "wanted_share_by_source",
)
"""Fields of StepMetrics with a curve in TensorBoard for each source, such as
`validation_loss_by_source/0`."""
CURVES = (
    "loss",
    "perplexity",
    "z_loss",
    "validation_loss",
    "validation_perplexity",
    "exact_match",
    "score",
    "grad_norm",
    "learning_rate",
    "fill",
    "tokens_per_second",
    "gpu_tokens_per_second",
    "mfu",
    "peak_memory",
    "data_wait",
)
"""Fields of StepMetrics with a curve in TensorBoard."""


class StepMetrics(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of `metrics.jsonl`: a step, with counts over all ranks."""

    step: int
    """Number of the step, counted from 1."""
    loss: float
    """Mean cross-entropy over the trained tokens of the step, in nats."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    learning_rate: float
    """Learning rate of the step, the same for every group of parameters."""
    tokens: int
    """Tokens of the step, padding excluded."""
    trained_tokens: int
    """Tokens in the loss of the step."""
    rows: int
    """Conversations trained on, and rows refused or skipped, since the start of the run."""
    refused: int
    """Rows refused in the step."""
    refused_by_reason: dict[str, int]
    """Rows refused in the step, by reason."""
    fill: float
    """Tokens of the step divided by the capacity of its packs, in [0, 1]."""
    tokens_per_second: float
    """Tokens of the step, over all ranks, divided by `seconds`."""
    data_wait: float
    """Seconds of the step in which rank 0 waited for packs."""
    seconds: float
    """Duration of the step, without validation and checkpoint."""
    gpu_tokens_per_second: float
    """`tokens_per_second` divided by the number of ranks."""
    time: float
    """Unix time at the end of the step."""
    tokens_by_source: tuple[int, ...] | None = None
    """Tokens of the step from each source; left out in a run of one source, or of more than
    `MOST_SOURCES`."""
    trained_tokens_by_source: tuple[int, ...] | None = None
    """Tokens in the loss of the step from each source; left out where `tokens_by_source` is."""
    mixed_by_source: tuple[int, ...] | None = None
    """Conversations, tokens or trained tokens from each source, in the unit of `data.mix_by`, since
    the start of the run; left out where `tokens_by_source` is, and in a run that had one source."""
    share_by_source: tuple[float, ...] | None = None
    """`mixed_by_source` divided by its sum."""
    wanted_share_by_source: tuple[float, ...] | None = None
    """Share of each source by the weights of `data.sources`; left out in a run with `data.stages`,
    and if a streamed source has no weight."""
    mfu: float | None = None
    """Operations that the model needs for the step, divided by those of all GPUs at their bf16
    peak in the same time, in [0, 1]; left out on CPUs and GPUs of unknown peak. Counts the
    attention of each conversation exactly, the head for trained tokens only, and no operation that
    is repeated to save memory."""
    peak_memory: float | None = None
    """Largest allocated memory of rank 0's GPU since the start, in GiB; left out on a CPU."""
    batch_digest: str
    """Hash of the packs of all ranks, in order; equal for equal global batches."""
    validation_loss: float | None = None
    """Mean cross-entropy over the held-out trained tokens, in nats; left out after a step without
    validation."""
    validation_perplexity: float | None = None
    """Exponential of `validation_loss`; left out where `validation_loss` is."""
    validation_loss_by_source: tuple[float | None, ...] | None = None
    """Mean cross-entropy over the trained tokens of each held-out source, in nats, null for a
    source without a trained token; left out for one held-out source, or more than
    `MOST_SOURCES`."""
    validation_perplexity_by_source: tuple[float | None, ...] | None = None
    """Exponential of each number of `validation_loss_by_source`."""
    unapplied: bool = False
    """True if the update was not applied, since `loss` or `grad_norm` was not finite and is null;
    left out if False."""
    perplexity: float | None = None
    """Exponential of `loss`; left out if it exceeds the largest float."""
    exact_match: float | None = None
    """Share of the held-out questions whose answer equals the expected answer, in [0, 1]; left out
    after a step without evaluation."""
    score: float | None = None
    """Mean score of the answers by `evaluation.scorer`; left out without a scorer."""
    z_loss: float | None = None
    """Mean z-loss over the trained tokens of the step, which is trained on beside `loss` and not in
    it; left out without `optimizer.z_loss`."""


def perplexity(loss: float) -> float | None:
    """Return the exponential of `loss`, None if no finite float holds it."""
    return math.exp(loss) if loss < MOST_LOSS else None


class RunLog:
    """The files of a run, cut back to their lines up to `step`.

    Later lines were written after the checkpoint that the run resumes from; the repeated steps
    write them again. Raises ValueError if a file holds a line that no run wrote, OSError if a file
    cannot be opened.
    """

    def __init__(self, directory: Path, step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.events = EventLog(directory, step)
        self._metrics = Lines(directory / "metrics.jsonl", step)
        self._refused = Lines(directory / "refused.jsonl", step)
        self._curves = Curves(directory / "tensorboard", step)
        self.ledger = LedgerWriter(directory / "ledger", step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._curves.close()
        if error is not None:
            self.events.end(f"error: {one_line(error)}")
        self._sync_lines()
        self.ledger.end()

    def step(self, metrics: StepMetrics) -> None:
        """Append a step to `metrics.jsonl` and to the curves."""
        self._metrics.add(msgspec.to_builtins(metrics))
        self._curves.add(metrics)
        self.events.step = metrics.step

    def last_step(self) -> dict[str, Any]:
        """Return the last line of `metrics.jsonl`; {} without a line."""
        return self._metrics.last()

    def refused(self, step: int, refusals: list[LocatedRefusal]) -> None:
        """Append the refused rows of a step to `refused.jsonl`."""
        for refusal, location in refusals:
            names = ("source", "row", "epoch", "reason", "detail")
            self._refused.add({"step": step, "place": location} | {name: getattr(refusal, name) for name in names})

    def first_refused(self, source: int) -> str | None:
        """Return location, reason and detail of the first row of a source refused for another
        reason than its length; None if no such row is listed."""
        rows = (line for line in self._refused.read() if line["source"] == source and line["reason"] not in TOO_LONG)
        return next((f"{line['place']}: {line['reason']}: {line['detail']}" for line in rows), None)

    def refused_by_reason(self) -> Counter[str]:
        """Return the number of rows refused since the start of the run, by reason."""
        return Counter(line["reason"] for line in self._refused.read())

    def sync(self) -> None:
        """Force all lines to the disk and close the ledger's steps, before a checkpoint is written.

        Raises OSError if the disk does not take them.
        """
        self._sync_lines()
        self.ledger.close()

    def _sync_lines(self) -> None:
        self._metrics.sync()
        self._refused.sync()


class Curves:
    """A TensorBoard event file, which ends with a warning at the first failed write.

    Written in the calling thread. torch's SummaryWriter has a thread that a full disk ends with a
    traceback; a run with a full queue would then wait forever.
    """

    def __init__(self, directory: Path, step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{os.uname().nodename}.{os.getpid()}"
        self._file = (directory / name).open("wb", buffering=0)
        self._records: RecordWriter | None = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        # TensorBoard hides the events of earlier files from this step on.
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, metrics: StepMetrics) -> None:
        """Append a point to each curve."""
        values = {name: getattr(metrics, name) for name in CURVES}
        for name in CURVES_BY_SOURCE:
            values |= {f"{name}/{source}": value for source, value in enumerate(getattr(metrics, name) or ())}
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items() if value is not None]
        self._write(Event(step=metrics.step, summary=Summary(value=points)))

    def close(self) -> None:
        """Close the file."""
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
    """A file of JSON lines, cut back to its lines up to `step`.

    Bytes that a full disk does not take wait in memory for the next write, so that no line is lost
    or torn.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._file = _reopen(path, step)
        self._waiting = b""

    def add(self, line: dict[str, Any]) -> None:
        """Append a line, on disk at the latest after `sync`."""
        self._waiting += msgspec.json.encode(line) + b"\n"
        with suppress(OSError):  # the next write tries again, and sync raises the error
            self._write()

    def sync(self) -> None:
        """Write waiting lines and force all lines to the disk.

        Raises OSError if the disk does not take them.
        """
        self._write()
        os.fsync(self._file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """Return all lines on disk."""
        self._file.seek(0)
        return [msgspec.json.decode(line) for line in self._file]

    def last(self) -> dict[str, Any]:
        """Return the last line on disk; {} without a line."""
        size = self._file.seek(0, os.SEEK_END)
        length = LONGEST_LINE
        while True:
            self._file.seek(max(0, size - length))
            lines = self._file.read().splitlines()
            if len(lines) > 1 or length >= size:
                return msgspec.json.decode(lines[-1]) if lines else {}
            length *= 2

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[os.write(self._file.fileno(), self._waiting) :]


class _Numbered(msgspec.Struct):
    step: int


def _reopen(path: Path, step: int) -> BufferedRandom:
    """Open a file for appending, cut after the last line of `step`.

    Raises ValueError for a line without a step.
    """
    file = path.open("a+b")
    file.seek(0)
    end = 0
    for number, line in enumerate(file, 1):
        # A kill during a write leaves a torn last line; the resumed run repeats its step.
        if not line.endswith(b"\n"):
            break
        try:
            if msgspec.json.decode(line, type=_Numbered).step > step:
                break
        except UNDECODABLE as error:
            raise ValueError(
                f"{path}:{number} was not written by a run: {one_line(error)}; remove the line, or move the file away"
            ) from error
        end += len(line)
    file.truncate(end)
    return file
