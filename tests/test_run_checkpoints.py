"""What a run does with its checkpoints beyond going on from them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import runs

from checkpoints import CheckpointStore


@pytest.fixture
def config(tmp_path: Path, tokenizer: str) -> dict[str, Any]:
    return runs.run_config(tokenizer, runs.sources(tmp_path))


def _store(directory: Path) -> CheckpointStore:
    return CheckpointStore(directory / "runs/run/checkpoints")


def test_the_newest_and_every_nth_checkpoint_stay(tmp_path: Path, config: dict[str, Any]) -> None:
    runs.run(tmp_path, config | {"checkpoint": {"every": 1, "keep": 2, "keep_every": 4}})
    assert _store(tmp_path).steps() == [4, 8, 9, 10]


def test_a_run_that_is_started_twice_is_refused_the_second_time_by_every_rank(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    config["run"]["steps"] = 10_000
    first = runs.Job(tmp_path, config)
    runs.wait_for(lambda: _store(tmp_path).steps() != [], first)
    (tmp_path / "second").mkdir()
    os.symlink(tmp_path / "runs", tmp_path / "second" / "runs")
    second = runs.Job(tmp_path / "second", config, 2)
    assert second.finish() == 1
    assert f"checkpoints is in use by process {first.pids[0]} on {os.uname().nodename} (since " in second.output()
    assert "Traceback" not in second.output() + second.output(1)
    assert first.alive
    first.signal(signal.SIGTERM)
    assert first.finish() == 0
