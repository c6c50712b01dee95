"""Keep `report.html` of a run up to date while the run trains, and never stop or slow it."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import TracebackType

from sftstream import Door, one_line, write_page
from trainer.report.page import page
from trainer.report.read import RunReader

logger = logging.getLogger(__name__)

NAME = "report.html"
"""Name of the page in the run's directory."""
PAUSE = 500
"""Shortest pause between two updates, in durations of the update before: updates take at most 0.2 %
of the time."""


class ReportWriter:
    """The page of the run in `directory`, updated at most every `seconds`; no page if 0.

    An update reads the lines that were added to the run's files since the update before. A page
    that cannot be made or written is one warning, and the run goes on.
    """

    def __init__(self, directory: Path, seconds: float) -> None:
        self._directory = directory
        self._seconds = seconds
        self._reader: RunReader | None = None
        self._ended = 0.0
        """Monotonic time at the end of the last update."""
        self._cost = 0.0
        """Duration of the last update; 0 after the first, which also reads the steps of earlier
        launches."""
        self._warned = False

    def __enter__(self) -> ReportWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.update():
            self.update()  # else the page of a run that has ended would say that it is under way

    def after_step(self) -> None:
        """Update the page if the last update is long ago."""
        if self._seconds and time.monotonic() - self._ended >= max(self._seconds, PAUSE * self._cost):
            self.update()

    def after_checkpoint(self) -> None:
        """Update the page, unless updates would take more than their share of the time."""
        if self._seconds and time.monotonic() - self._ended >= PAUSE * self._cost:
            self.update()

    def update(self) -> bool:
        """Read the files, and replace the page. Returns False if the page could not be made.

        After a failure the next update reads all lines again.
        """
        if not self._seconds:
            return True
        began, is_first = time.perf_counter(), self._reader is None
        written = False
        try:
            with Door(f"{NAME} cannot be written"):
                self._write()
                written = True
        except (ValueError, RuntimeError) as error:
            self._reader = None  # it may have read lines that are in no figure
            if not self._warned:
                logger.warning("%s; the run goes on without an up-to-date report", one_line(error))
            self._warned = True
        self._cost = 0.0 if is_first and written else time.perf_counter() - began
        self._ended = time.monotonic()
        return written

    def _write(self) -> None:
        self._reader = self._reader or RunReader(self._directory)
        write_page(self._directory / NAME, page(self._reader.summary(is_alive=True)))
