"""A value is computed in a process of its own, which may end without the value."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from sftstream import Beside
from sftstream.streaming import beside


def test_the_value_comes_from_another_process() -> None:
    assert Beside(os.getppid).result() == os.getpid()


def test_a_killed_process_gives_none() -> None:
    assert Beside(lambda: os.kill(os.getpid(), signal.SIGKILL)).result() is None


def test_an_error_gives_none_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert Beside(lambda: 1 // 0).result() is None
    assert capfd.readouterr() == ("", "")


def test_a_process_that_hangs_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "PATIENCE", 0.1)
    assert Beside(lambda: time.sleep(3600)).result() is None


ORPHAN = """
import os, signal, sys, time
from sftstream import Beside

def work() -> None:
    print(os.getpid(), flush=True)
    sum(range(10**12))  # native code that lets no other thread run

Beside(work)
time.sleep(2)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_whose_native_code_runs_ends_with_its_parent() -> None:
    ended = subprocess.run([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, timeout=60)  # until all have ended
    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout.strip().isdigit()


def test_an_interrupt_during_the_start_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    forked: list[int] = []

    def fork(process: BaseProcess) -> None:
        start(process)
        forked.append(process.pid or 0)
        os.kill(os.getpid(), signal.SIGINT)

    start = BaseProcess.start
    monkeypatch.setattr(BaseProcess, "start", fork)
    with pytest.raises(KeyboardInterrupt):
        Beside(lambda: time.sleep(3600))
    assert not Path("/proc", str(forked[0])).exists()


def test_closing_ends_the_process_at_once(tmp_path: Path) -> None:
    path = tmp_path / "process"

    def wait() -> None:
        path.write_text(str(os.getpid()))
        time.sleep(3600)

    running = Beside(wait)
    while not path.exists() or not path.read_text():
        time.sleep(0.01)
    running.close()
    assert not Path("/proc", path.read_text()).exists()
