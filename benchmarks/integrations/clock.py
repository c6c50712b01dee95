"""Measure the CPU time to the first and to the last step."""

from __future__ import annotations

import time


class Clock:
    """CPU times of the first and the last step since `start`."""

    def __init__(self) -> None:
        self.start = time.process_time()
        self.first = self.last = 0.0

    def step(self) -> None:
        self.last = time.process_time() - self.start
        self.first = self.first or self.last
