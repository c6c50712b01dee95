"""A value is computed in a process of its own, which may end without the value."""

from __future__ import annotations

import os
import signal
import time
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
