"""Delay signal handlers while processes are started or ended."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Delay signals: if a signal arrives inside the block, call its handler after the block ends.

    A handler may raise, as Ctrl-C does. Inside the constructor of a process the exception would
    leave a process that no object owns; inside `__del__` Python would print and drop the exception.
    Python calls handlers in the main thread only, so in another thread the block is unchanged.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # torch installs its handler of SIGCHLD itself when it starts a worker.
    numbers = signal.valid_signals() - {signal.SIGCHLD}
    handlers: dict[int, Handler] = {n: h for n in numbers if callable(h := signal.getsignal(n))}
    received: list[tuple[int, FrameType | None]] = []
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: received.append((number, frame)))
        yield
    finally:
        _restore(handlers)
        for number, frame in received:
            handlers[number](number, frame)


def _restore(handlers: Mapping[int, Handler]) -> None:
    """Install `handlers`; if a handler raises meanwhile, install all of them before raising."""
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    except BaseException:
        _restore(handlers)
        raise
