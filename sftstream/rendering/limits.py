"""Limits of time and memory for the code of a chat template."""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType, TracebackType

from sftstream.door import Door
from sftstream.refused import Refused
from sftstream.rendering.bounds import start_meter, stop_meter

SECONDS = 60.0
"""CPU time limit for all renders of one conversation, in seconds; a long one takes some
milliseconds.

More time ends the run. The row is not refused, because a faster machine would accept the same row.
The time in which the process is suspended does not count.
"""
MEMORY = 256 << 20
"""Largest number of bytes that the process may allocate while a template is probed: 256 MiB."""

# A template is a program: it may add None to a string, split a text at "", or divide by 0.
_RUNNING = Door("", error=lambda line: Refused("template raises", line.removeprefix(": ")))


class Bounded:
    """A context that raises `Refused` if the template raises an error or does too much work inside.

    Raises RuntimeError, which ends a run, if the body exceeds the time limit of `SECONDS`. A class,
    not a generator, since a conversation is rendered in 40 us.
    """

    __slots__ = ("_limit", "_meter")

    def __enter__(self) -> None:
        """Start the time limit, unless it runs already, and a new count of work units."""
        self._limit = None if _LIMITED.get() else _TimeLimit()
        if self._limit:
            self._limit.start(sys._getframe(1))
        self._meter = start_meter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the count and the time limit, and turn an error of the template into `Refused`."""
        stop_meter(self._meter)
        if self._limit:
            self._limit.__exit__()
        _RUNNING.__exit__(kind, error, trace)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Let the process allocate at most `MEMORY` more bytes of address space inside the body.

    A template that needs more raises MemoryError before it exhausts the machine's memory.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound if before[1] < 0 else min(bound, before[1]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def time_limit() -> _TimeLimit:
    """Raise RuntimeError, which ends a run, if the body takes more than `SECONDS` of CPU time.

    The body has to stand in the function that calls `time_limit`, after `with`. A limit inside the
    body of another one changes nothing: the renders of one conversation share a limit. Python
    delivers signals to the main thread only, so other threads render without a limit.
    """
    return _TimeLimit()


class _TimeLimit:
    """The context of `time_limit`."""

    __slots__ = ("_before", "_began", "_body")

    def __enter__(self) -> None:
        self.start(sys._getframe(1))

    def start(self, body: FrameType) -> None:
        """Start the limit of the code in the frame `body`."""
        self._body: FrameType | None = None
        if _LIMITED.get() or threading.current_thread() is not threading.main_thread():
            return
        self._body, self._began = body, time.thread_time()
        # Whenever `_LIMITED` is true a timer runs, also after an interrupt between two lines.
        self._before = signal.signal(signal.SIGALRM, self._look)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        _LIMITED.set(True)

    def __exit__(self, *_error: object) -> None:
        if self._body is not None:
            self._end()

    def _end(self) -> None:
        _LIMITED.set(False)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)
        self._body = None

    def _look(self, _number: int, frame: FrameType | None) -> None:
        left = SECONDS - (time.thread_time() - self._began)
        if left > 0:
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001))
            return
        while frame is not None and frame is not self._body:
            frame = frame.f_back
        if frame is None:  # an interrupt by the user fell into `__exit__`, and the body has ended
            self._end()
            return
        raise RuntimeError(
            f"the chat template did not print a conversation within {SECONDS:.0f} s; use another template, or lower "
            "max_row_bytes of the sources"
        )


_LIMITED: ContextVar[bool] = ContextVar("limited", default=False)
