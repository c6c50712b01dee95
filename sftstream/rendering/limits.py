"""Limits of time and memory for the code of a chat template."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sftstream.door import Door
from sftstream.refused import Refused
from sftstream.rendering.bounds import metered

SECONDS = 60.0
"""Time limit for one render, in seconds; a long conversation takes a few milliseconds.

A render above the limit ends the run. The row is not refused, because a faster machine would accept
the same row.
"""
MEMORY = 256 << 20
"""Largest number of bytes that the process may allocate while a template is probed: 256 MiB."""

# A template is a program: it may add None to a string, split a text at "", or divide by 0.
_RUNNING = Door("", error=lambda line: Refused("template raises", line.removeprefix(": ")))


@contextmanager
def bounded() -> Iterator[None]:
    """Raise `Refused` if the template raises an error or does too much work inside the body.

    Raises RuntimeError, which ends a run, if the body exceeds the time limit of `SECONDS`.
    """
    with _RUNNING, _alarm(), metered():
        yield


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


@contextmanager
def _alarm() -> Iterator[None]:
    # Python delivers signals to the main thread only, so other threads render without a time limit.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _too_late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _too_late(_number: int, _frame: FrameType | None) -> None:
    raise RuntimeError(
        f"the chat template did not print a conversation within {SECONDS:.0f} s; use another template, or lower "
        "max_row_bytes of the sources"
    )
