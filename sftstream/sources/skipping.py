"""Skip a part of a file that can only be read forward, and log the progress."""

from __future__ import annotations

import logging
import time
from io import BufferedReader

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_MESSAGES = 5.0
_BYTES_AT_ONCE = 4 << 20


class Progress:
    """Logs how much of `count` units of a file is skipped, every `SECONDS_BETWEEN_MESSAGES`."""

    def __init__(self, display_name: str, count: int, unit: str) -> None:
        self._display_name, self._count, self._unit = display_name, count, unit
        self._last = time.monotonic()

    def report(self, done: int) -> None:
        """Log that `done` units are skipped, unless the last message was just before."""
        if time.monotonic() - self._last > SECONDS_BETWEEN_MESSAGES:
            self._last = time.monotonic()
            logger.warning(
                "%s: skipped %s of %s %s before the saved position",
                self._display_name,
                f"{done:,}",
                f"{self._count:,}",
                self._unit,
            )


def skip_bytes(file: BufferedReader, count: int, display_name: str) -> None:
    """Read `count` bytes of `file` without a use, or all bytes if there are fewer."""
    progress = Progress(display_name, count, "bytes")
    for done in range(0, count, _BYTES_AT_ONCE):
        progress.report(done)
        file.read(min(_BYTES_AT_ONCE, count - done))
