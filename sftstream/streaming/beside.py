"""Compute a value in a process of its own, beside the work of this process."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

from sftstream.streaming.deferred_signals import deferred_signals
from sftstream.streaming.worker import begin_work

PATIENCE = 180.0
"""Seconds after which a process counts as hanging: it may have inherited a lock that no thread of
its own releases."""
T = TypeVar("T")


class Beside(Generic[T]):
    """A call of `compute` in a forked process, which begins at once.

    The process inherits all that `compute` reads, as a loader's workers do.
    """

    def __init__(self, compute: Callable[[], T]) -> None:
        fork = multiprocessing.get_context("fork")
        self._receiving, sending = fork.Pipe(duplex=False)
        self._process = fork.Process(target=_send, args=(sending, compute, os.getpid()), daemon=True)
        with deferred_signals():
            self._process.start()
        sending.close()

    def result(self) -> T | None:
        """Wait for the value, at most `PATIENCE` seconds.

        None stands for a process that ended without the value, such as by an error, or that hangs.
        """
        try:
            value: T | None = self._receiving.recv() if self._receiving.poll(PATIENCE) else None
        except (EOFError, OSError):
            return None
        finally:
            self.close()
        return value

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._receiving.close()


def _send(sending: Connection, compute: Callable[[], T], parent: int) -> None:
    begin_work(parent)
    with suppress(BaseException):  # a panic of a Rust library is no Exception
        sending.send(compute())
