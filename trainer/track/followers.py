"""Start a process for each tracker of a run, and end the processes with the run."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from trainer.track.config import TrackerConfig
from trainer.track.content import ABOUT, About
from trainer.track.follow import PATIENCE, WAITS
from trainer.whole_file import write_whole

GRACE = 5.0
"""Seconds beyond `PATIENCE` after which a process that is stuck in a library is killed."""


class Followers:
    """The processes that send the steps of a run, a process for each tracker.

    A run that ends by an error or is killed does not wait for its processes; they end themselves.
    """

    def __init__(self, run: Path, about: About, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._processes: list[tuple[TrackerConfig, subprocess.Popen[bytes]]] = []
        if about.trackers:
            (run / ABOUT).parent.mkdir(parents=True, exist_ok=True)
            write_whole(run / ABOUT, about)
        for index, tracker in enumerate(about.trackers):
            self._processes.append((tracker, _start(run, index)))

    def __enter__(self) -> Followers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, process in self._processes:
            assert process.stdin is not None
            with suppress(OSError):  # the process has ended by an error
                process.stdin.write(WAITS if error is None else b"")
                process.stdin.close()
        if error is not None:
            return
        until = time.monotonic() + PATIENCE + GRACE
        for tracker, process in self._processes:
            if _code(process, until):
                self._say(
                    f"the last steps are not yet sent to {tracker.kind}; send them with: "
                    f"python -m trainer.track {shlex.quote(str(self._run))}"
                )


def _start(run: Path, index: int) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that a Ctrl-C reaches the run alone."""
    command = [sys.executable, "-m", "trainer.track", str(run), "--follow", str(index)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def _code(process: subprocess.Popen[bytes], until: float) -> int:
    """Return the exit code of a process, which is killed if it runs beyond `until`."""
    try:
        return process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
