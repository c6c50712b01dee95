"""Stop a run early: by SIGINT (Ctrl-C), SIGTERM or SIGUSR1 (a scheduler), or after a time."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from trainer.process import is_first

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to stop."""


class StopRequest:
    """A context that turns SIGINT, SIGTERM and SIGUSR1 into `asked`, read after each step.

    `seconds` after construction the run is asked as well; infinity asks never. Repeated signals are
    harmless: a Ctrl-C reaches a rank from the terminal and again from torchrun.
    """

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._signalled = False
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """True once the run shall stop."""
        return self._signalled or time.monotonic() >= self._deadline

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        if not self._signalled and is_first():
            os.write(2, b"\nstopping: the step is finished and a checkpoint saved first\n")  # safe inside a handler
        self._signalled = True
