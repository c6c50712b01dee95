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
WAITS = b"w"
"""Byte from a run that ends and waits for its last steps."""

Wait = Callable[[float], float | None]
"""Function that waits up to a number of seconds. Returns None while the run goes on; after its end
the seconds that are left to send the last steps."""


def follow(run: Path, tracker: TrackerConfig, ended: Wait) -> bool:
    """Send the steps of a run until the run ends; return True if all of them are sent.

    A tracker that is down is tried again after pauses that double up to `LONGEST_PAUSE`. After the
    end of the run all is tried once more, and again for `PATIENCE` seconds if the run waits.
    """
    path = cursor_path(run, tracker)
    while True:
        with claimed(path) as alone:
            if alone:
                return _Following(run, tracker, ended).to_the_end()
        # The process of a launch before still sends its last steps.
        left = ended(PAUSE)
        if left is not None:
            if left < PAUSE:
                return False
            time.sleep(PAUSE)


class _Following:
    def __init__(self, run: Path, tracker: TrackerConfig, ended: Wait) -> None:
        self._sender = Sender(run, tracker, opener(run, tracker))
        self._name = tracker.kind
        self._ended = ended
        self._is_down = False

    def to_the_end(self) -> bool:
        pause = PAUSE
        while (left := self._ended(pause)) is None:
            pause = PAUSE if self._send(last=False) else min(2 * pause, LONGEST_PAUSE)
        while not self._send(last=True):
            left = self._ended(0.0)
            if left is None or left < PAUSE:
                return False
            time.sleep(PAUSE)
        return True

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

    The parent ends its run by the byte `WAITS` on the standard input of this process, or by its
    end if the parent does not wait. A parent that is killed is noticed by its process id as well,
    since its forked children may hold the other end.
    """
    until: float | None = None

    def ended(seconds: float) -> float | None:
        nonlocal until
        last = time.monotonic() + seconds
        while until is None:
            left = last - time.monotonic()
            if os.getppid() != parent:
                until = 0.0
            elif select.select([sys.stdin], [], [], min(max(left, 0.0), 1.0))[0]:
                waits = os.read(sys.stdin.fileno(), 1) == WAITS
                until = time.monotonic() + PATIENCE if waits else 0.0
            elif left <= 0:
                return None
        return until - time.monotonic()

    return ended
