"""Stop a run early, by SIGINT (Ctrl-C) or SIGTERM (a scheduler)."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """A context that turns SIGINT and SIGTERM into `asked`, read after each step.

    Repeated signals are harmless: a Ctrl-C reaches a rank from the terminal and again from
    torchrun.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
