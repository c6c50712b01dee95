"""A run sends its steps by a process of its own; a tracker that fails or stalls does not touch the training."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
from commands import run
from runs import Job

from trainer.track.config import TrackerConfig, require_installed
from trainer.track.cursor import claimed, cursor_path
from trainer.track.main import main

ROOT = Path(__file__).resolve().parents[2]

FAKE = '''
"""A stand-in for trackio's store, which keeps lines by id, and fails or stalls while a file says so."""
import json, os, time
from pathlib import Path

class SQLiteStorage:
    @staticmethod
    def bulk_log(*, project, run, metrics_list, steps, timestamps, config, log_ids, run_id):
        root = Path(os.environ["TRACKIO_DIR"])
        root.mkdir(exist_ok=True)
        while (root / "stalls").exists():
            time.sleep(0.05)
        if (root / "down").exists():
            raise ConnectionError("connection refused")
        path = root / "stored.jsonl"
        held = {json.loads(line)["id"] for line in path.read_text().splitlines()} if path.exists() else set()
        with path.open("a") as file:
            for metrics, step, log_id in zip(metrics_list, steps, log_ids):
                if log_id not in held:
                    file.write(json.dumps({"id": log_id, "step": step, "run": run, **metrics}) + "\\n")
'''
TRACKERS: list[dict[str, Any]] = [{"kind": "trackio", "name": "tracked"}]


class Place:
    """A run's directory with a fake trackio in front of the path."""

    def __init__(self, directory: Path, tokenizer: str, **run: Any) -> None:
        self.directory, self.store = directory, directory / "store"
        self.store.mkdir()
        package = directory / "fake" / "trackio"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "sqlite_storage.py").write_text(FAKE)
        self.environment = {
            "PYTHONPATH": f"{package.parent}{os.pathsep}{ROOT}",
            "TRACKIO_DIR": str(self.store),
        }
        tables = runs.run_config(tokenizer, runs.sources(directory))
        tables["run"] |= run
        self.config: dict[str, Any] = tables | {"trackers": TRACKERS}

    def start(self) -> Job:
        return Job(self.directory, self.config, environment=self.environment)

    def sent(self) -> list[dict[str, Any]]:
        path = self.store / "stored.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def track(self, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trainer.track", "runs/run", *options]
        environment = os.environ | self.environment
        return subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, text=True, check=False, timeout=120
        )

    def wait_for_sender(self) -> None:
        """Wait until no process sends steps."""
        wait(lambda: not senders(self.directory))


def senders(directory: Path) -> list[int]:
    """Return the ids of processes that follow a run in the directory."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                inside = (process / "cwd").resolve() == directory.resolve()
            except OSError:
                continue
            if inside and b"trainer.track" in words:
                found.append(int(process.name))
    return found


def wait(condition: Callable[[], bool], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def place(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    found = Place(tmp_path, tokenizer)
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    return found


def test_a_killed_run_and_a_tracker_that_was_down_leave_each_step_once(place: Place) -> None:
    metrics = place.directory / "runs" / "run" / "metrics.jsonl"
    (place.store / "down").touch()
    job = place.start()
    runs.wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3, job)
    job.kill()
    job = place.start()
    assert job.finish() == 0
    assert "the last steps are not yet sent to trackio" in job.output()
    assert "python -m trainer.track runs/run" in job.output()
    failed = place.track()
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: trackio does not answer: connection refused; step 1 and later")
    (place.store / "down").unlink()
    caught_up = place.track()
    assert (caught_up.returncode, caught_up.stdout) == (0, "trackio: 10 steps sent, up to 10\n")
    with claimed(cursor_path(place.directory / "runs" / "run", TrackerConfig(**TRACKERS[0]))):
        busy = place.track()
    assert busy.returncode == 1
    assert "the run, or another command, is sending the steps to trackio" in busy.stderr
    assert place.track().stdout == "trackio: 0 steps sent, up to 10\n"
    assert json.loads(place.track("--json").stdout) == {"sent": [{"tracker": "trackio", "steps": 0, "last": 10}]}
    assert [line["step"] for line in place.sent()] == list(range(1, 11))
    losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    assert [line["loss"] for line in place.sent()] == losses
    assert {line["run"] for line in place.sent()} == {"tracked"}
    place.wait_for_sender()


@pytest.mark.slow
def test_the_run_sends_its_steps_itself_through_kills(place: Place) -> None:
    place.config["run"]["steps"] = 2000
    metrics = place.directory / "runs" / "run" / "metrics.jsonl"
    for _ in range(3):
        before = len(place.sent())
        job = place.start()
        wait(lambda before=before: len(place.sent()) > before)  # type: ignore[misc]
        job.kill()
    last = metrics.read_bytes().count(b"\n")
    place.config["run"]["steps"] = last + 20
    assert place.start().finish() == 0
    assert [line["step"] for line in place.sent()] == list(range(1, last + 21))


@pytest.mark.slow
def test_a_tracker_that_stalls_neither_changes_nor_holds_the_training(place: Place) -> None:
    (place.store / "stalls").touch()
    job = place.start()
    assert job.finish() == 0
    assert "the last steps are not yet sent to trackio" in job.output()
    assert senders(place.directory) == []
    stalled = runs.outcome(place.directory)
    (place.store / "stalls").unlink()
    assert place.track().returncode == 0
    assert [line["step"] for line in place.sent()] == list(range(1, 11))
    del place.config["trackers"]
    place.config["run"]["name"] = "plain"
    runs.run(place.directory, place.config)
    assert runs.outcome(place.directory, "plain")["metrics"] == stalled["metrics"]


def test_a_missing_package_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    missing = TrackerConfig(kind="wandb")
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(ValueError, match=r'needs the package wandb; install it with: pip install "sftstream\[wandb\]"'):
        require_installed((missing,))


@pytest.mark.parametrize(
    ("name", "there"),
    [("none", "does not exist"), ("file", "is not a directory"), ("empty", "holds no file of a run")],
)
def test_a_path_that_is_no_run_is_not_blamed_on_its_config(tmp_path: Path, name: str, there: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    refused = run(main, tmp_path / name)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr == f"error: '{tmp_path / name}' {there}; name the directory of a run, such as runs/first\n"


def test_a_run_without_trackers_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    command = [sys.executable, "-m", "trainer.track", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 1
    assert "its run had no tracker" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_no_tracker_and_no_torch_is_imported_by_the_command(tmp_path: Path) -> None:
    code = (
        "import sys, trainer.track.main, trainer.track.open, trainer.track.send, trainer.track.follow;"
        "print(sorted({'torch', 'mlflow', 'trackio', 'wandb', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"
