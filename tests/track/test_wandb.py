"""The wandb library against a server of its protocol: a session goes on after the last step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_wandb import FakeWandb, fake_wandb

pytest.importorskip("wandb")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SESSION = """
import os, sys
from pathlib import Path
from trainer.track.config import TrackerConfig
from trainer.track.content import About, Step
from trainer.track.wandb_run import WandbRun
url, first, last, ends = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
about = About(token="abcd1234", name="run", trackers=(), settings={}, texts={}, digests={})
run = WandbRun(TrackerConfig(kind="wandb", project="entity/project", url=url), about, Path("."))
print("held", run.held, flush=True)
run.send([Step(number=n, time=float(n), values={"loss": 1 / n}) for n in range(first, last + 1)], 0)
if ends == "kill":
    os.kill(0, 9)
run.close(complete=None)
"""


def session(server: FakeWandb, directory: Path, first: int, last: int, *, kill: bool = False) -> int:
    """Send the steps `first` to `last`; return the last step that the server held before.

    `kill` kills the process, and that of the library, once the steps are handed over.
    """
    ran = subprocess.run(
        [sys.executable, "-c", SESSION, server.url, str(first), str(last), "kill" if kill else "close"],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "WANDB_API_KEY": "a" * 40},
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )
    assert (ran.returncode == -9) if kill else (ran.returncode == 0), ran.stderr
    (held,) = (int(line.split()[1]) for line in ran.stdout.splitlines() if line.startswith("held "))
    return held


def test_a_session_goes_on_after_the_last_step_that_the_server_holds(tmp_path: Path) -> None:
    with fake_wandb() as server:
        assert session(server, tmp_path, 1, 5) == 0
        assert server.steps == [1, 2, 3, 4, 5]
        assert session(server, tmp_path, 6, 8) == 5
        assert server.steps == [1, 2, 3, 4, 5, 6, 7, 8]
        session(server, tmp_path, 9, 12, kill=True)
        held = session(server, tmp_path, len(server.steps) + 1, 14)
        assert held in range(8, 13)
        assert server.steps == list(range(1, 15))
