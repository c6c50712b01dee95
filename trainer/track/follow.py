"""Follow a run that trains, and send its steps as they are written."""

from __future__ import annotations

import logging
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sftstream import one_line
from trainer.track.config import TrackerConfig
from trainer.track.cursor import claimed, cursor_path
from trainer.track.open import opener
from trainer.track.send import Sender
from trainer.track.tracker import TrackerDown

logger = logging.getLogger(__name__)

PAUSE = 2.0
"""Seconds between two looks at `metrics.jsonl`."""
LONGEST_PAUSE = 60.0
"""Seconds between two tries while a tracker is down, at most."""
PATIENCE = 10.0
"""Seconds after the end of a run in which its last steps are sent."""

Wait = Callable[[float], bool]
"""Function that waits up to a number of seconds, and returns True if the run has ended."""


def follow(run: Path, tracker: TrackerConfig, ended: Wait) -> bool:
    """Send the steps of a run until the run ends; return True if all of them are sent.

    A tracker that is down is tried again after pauses that double up to `LONGEST_PAUSE`, and after
    the end of the run for `PATIENCE` seconds.
    """
    path = cursor_path(run, tracker)
    while True:
        with claimed(path) as alone:
            if alone:
                return _Following(run, tracker, ended).to_the_end()
        if ended(PAUSE):  # the process of a launch before still sends its last steps
            return False


class _Following:
    def __init__(self, run: Path, tracker: TrackerConfig, ended: Wait) -> None:
        self._sender = Sender(run, tracker, opener(run, tracker))
        self._name = tracker.kind
        self._ended = ended
        self._is_down = False

    def to_the_end(self) -> bool:
        pause, has_ended, until = PAUSE, False, float("inf")
        while True:
            if not has_ended and (has_ended := self._ended(pause)):
                until, pause = time.monotonic() + PATIENCE, PAUSE
            sent = self._send(last=has_ended)
            if has_ended and (sent or time.monotonic() + pause > until):
                return sent
            pause = PAUSE if sent else min(2 * pause, LONGEST_PAUSE)
            if has_ended:
                time.sleep(pause)

    def _send(self, *, last: bool) -> bool:
        try:
            self._sender.send()
            if last:
                self._sender.close()
        except (TrackerDown, OSError) as error:
            if not self._is_down:
                logger.warning(
                    "%s; the run goes on, and step %d and later are sent again", one_line(error), self._sender.sent + 1
                )
            self._is_down = True
            return False
        if self._is_down:
            logger.warning("%s answers again; the steps up to %d are sent", self._name, self._sender.sent)
        self._is_down = False
        return True


def parent_ended(parent: int) -> Wait:
    """Return the function that watches the process that started this process.

    The parent ends its run by the end of this process's standard input. A parent that is killed is
    noticed by its process id as well, since its forked children may hold the other end.
    """

    def ended(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while os.getppid() == parent:
            left = until - time.monotonic()
            if left <= 0:
                return False
            readable, _, _ = select.select([sys.stdin], [], [], min(left, 1.0))
            if readable:
                return True
        return True

    return ended
