"""A value is computed in a process of its own, or in this process if that process ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from sftstream.streaming.beside import Beside


def computed_after(end: Callable[[], None]) -> tuple[int, int]:
    """Return the ids of this process and of the process that computed, which ends by `end`."""
    here = os.getpid()

    def compute() -> int:
        if os.getpid() != here:
            end()
        return os.getpid()

    return here, Beside(compute).result()


def test_the_value_comes_from_another_process() -> None:
    here, there = computed_after(lambda: None)
    assert here != there


def test_a_killed_process_is_replaced_by_this_process() -> None:
    here, there = computed_after(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert here == there


def test_an_error_is_raised_here_and_printed_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        Beside(lambda: 1 // 0).result()
    assert capfd.readouterr() == ("", "")


def test_closing_ends_the_process_at_once() -> None:
    beside = Beside(lambda: time.sleep(3600))
    beside.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
