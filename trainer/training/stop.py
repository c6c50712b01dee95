"""How a person or a scheduler ends a run early."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """While it is entered, SIGINT and SIGTERM ask the run to save and end after the step at hand.

    All of them: a Ctrl-C reaches a rank more than once, from the terminal and from torchrun.
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
