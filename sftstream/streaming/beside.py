"""Compute a value in a process of its own, beside the work of this process."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

from sftstream.streaming.deferred_signals import deferred_signals
from sftstream.streaming.worker import begin_work

PATIENCE = 180.0
"""Seconds after which a process counts as hanging: it may have inherited a lock that no thread of
its own releases."""
PR_SET_PDEATHSIG = 1
"""Operation of Linux's `prctl`: the signal that a process gets when the parent's thread ends."""
T = TypeVar("T")


class Beside(Generic[T]):
    """A call of `compute` in a forked process, which begins at once.

    The process inherits all that `compute` reads, as a loader's workers do.
    """

    def __init__(self, compute: Callable[[], T]) -> None:
        fork = multiprocessing.get_context("fork")
        self._receiving, sending = fork.Pipe(duplex=False)
        self._process = fork.Process(target=_send, args=(sending, compute, os.getpid()), daemon=True)
        try:
            with deferred_signals():
                self._process.start()
        except BaseException:  # of a signal handler, at the end of the block
            self.close()
            raise
        finally:
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
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()
        self._receiving.close()


def _send(sending: Connection, compute: Callable[[], T], parent: int) -> None:
    # The thread of `begin_work` cannot end the process while native code holds the interpreter.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    begin_work(parent)
    try:
        sending.send(compute())
    finally:
        os._exit(0)  # before an error is printed
