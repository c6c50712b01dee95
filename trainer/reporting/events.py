"""Record the launches, checkpoints and ends of a run, with the times, in `events.jsonl`.

Events are never removed: a launch that a kill has ended is still an event of the run. This module
imports no torch, since the report reads the events in a fast command.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from trainer.whole_file import DAMAGED

logger = logging.getLogger(__name__)

EVENTS = "events.jsonl"
"""Name of the file in the run's directory."""
METRICS = "metrics.jsonl"
MOST_SOURCES = 256
"""Sources of a run up to which the metrics have the tokens of each."""
TAIL = 1 << 16
"""Bytes at the end of `metrics.jsonl` in which the last line is looked for."""
Count = Annotated[int, Meta(ge=0, le=2**53)]
Time = Annotated[float, Meta(ge=0, le=2**37)]
"""Unix time in seconds, up to the year 6325."""
COMPLETE, STOPPED = "complete", "stopped on request"
"""Reasons of an end, besides an error's message."""


class Launch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag="launch"):
    """A start of the run's command, new or resumed."""

    time: Time
    """Unix time of the first step's begin."""
    after: Count
    """Number of the last step before the launch; 0 for a new run."""
    reached: Count = 0
    """Number of the last step of the launch before; steps from `after + 1` on are repeated."""
    last_sign: Time | None = None
    """Unix time of the step `reached`; None in a new run."""
    mesh: dict[str, int] = {}
    """Sizes of the topology by name, for example `{"dp": 2, "tp": 1}`."""
    environment: dict[str, str] = {}
    """Host, device, workers and versions, by name."""
    config: dict[str, Any] = {}
    """The run's config, with the choices made for settings that are "auto"."""
    total_rows: Count | None = None
    """Rows of all epochs; None if the run has no epochs or a source is streamed."""


class Saved(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="checkpoint"):
    """A checkpoint that was taken."""

    time: Time
    step: Count
    seconds: float
    """Time that training waited for the checkpoint."""


class Unapplied(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="unapplied"):
    """A step whose update was not applied, since its loss or gradient was not finite."""

    time: Time
    step: Count
    cause: str
    """Loss, norm, parameters and conversations in words."""


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="end"):
    """The end of a launch that was not killed."""

    time: Time
    step: Count
    """Last finished step."""
    reason: str
    """`COMPLETE`, `STOPPED`, or the message of an error."""


Event = Launch | Saved | Unapplied | Ended


class _LastLine(msgspec.Struct):
    step: int
    time: float | None = None


class EventLog:
    """Writer of `events.jsonl`. Ends with a warning at the first failed write.

    Open the log before `metrics.jsonl` is cut back to `step`, the last step before the launch: the
    last line tells how far the launch before has come.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self.step = step
        """Last finished step."""
        self._before = _last_line(directory / METRICS)
        self._path = directory / EVENTS
        self._file = -1
        try:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
            content = self._path.read_bytes()
            os.ftruncate(self._file, content.rfind(b"\n") + 1)  # a kill during a write left a part of a line
        except OSError as error:
            self._warn(error)

    def launch(
        self, mesh: dict[str, int], environment: dict[str, str], config: dict[str, Any], total_rows: int | None
    ) -> None:
        """Append a launch that starts after the step of the constructor."""
        self._add(
            Launch(
                time=time.time(),
                after=self.step,
                reached=max(self.step, self._before.step),
                last_sign=self._before.time,
                mesh=mesh,
                environment=environment,
                config=config,
                total_rows=total_rows,
            )
        )

    def saved(self, seconds: float) -> None:
        """Append a checkpoint of the last finished step, for which training waited `seconds`."""
        self._add(Saved(time=time.time(), step=self.step, seconds=seconds))

    def unapplied(self, step: int, cause: str) -> None:
        """Append a step whose update was not applied."""
        self._add(Unapplied(time=time.time(), step=step, cause=cause))

    def end(self, reason: str) -> None:
        """Append the end of the launch, and close the file."""
        self._add(Ended(time=time.time(), step=self.step, reason=reason))
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _add(self, event: Event) -> None:
        if self._file < 0:
            return
        try:
            line = msgspec.json.encode(event) + b"\n"
            if os.write(self._file, line) < len(line):
                raise OSError(28, "No space left on device")
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        logger.warning("%s ends here, and the report shows no later event: %s", self._path, error)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _last_line(metrics: Path) -> _LastLine:
    """Return the last whole line of `metrics.jsonl`, with the file's time if the line has none.

    The step is 0 without a line that a run wrote.
    """
    try:
        with metrics.open("rb") as file:
            status = os.fstat(file.fileno())
            file.seek(max(0, status.st_size - TAIL))
            lines = file.read().split(b"\n")[:-1]
        last = msgspec.json.decode(lines[-1], type=_LastLine) if lines else _LastLine(0)
    except (OSError, *DAMAGED):
        return _LastLine(0)
    return _LastLine(last.step, last.time or status.st_mtime) if lines else last
