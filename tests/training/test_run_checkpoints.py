"""A run keeps, places, refuses and restarts checkpoints by its config, also on a full disk."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from checkpoints import CheckpointStore
from trainer.checkpointing.full_disk import full_disk_explained


@pytest.fixture
def config(tmp_path: Path, tokenizer: str) -> dict[str, Any]:
    return runs.run_config(tokenizer, runs.sources(tmp_path))


def _store(directory: Path) -> CheckpointStore:
    return CheckpointStore(directory / "runs/run/checkpoints")


def test_the_newest_and_every_nth_checkpoint_stay(tmp_path: Path, config: dict[str, Any]) -> None:
    runs.run(tmp_path, config | {"checkpoint": {"every": 1, "keep": 2, "keep_every": 4}})
    assert _store(tmp_path).steps() == [4, 8, 9, 10]


def test_checkpoints_go_to_another_root_if_configured(tmp_path: Path, config: dict[str, Any]) -> None:
    elsewhere = tmp_path / "elsewhere"
    config["checkpoint"]["root"] = str(elsewhere)
    runs.run(tmp_path, config)
    assert CheckpointStore(elsewhere).steps() == [6, 8, 10]
    assert not (tmp_path / "runs/run/checkpoints").exists()
    config["run"]["steps"] = 12
    assert "resuming after step 10" in runs.run(tmp_path, config).output()


def test_the_second_start_of_a_running_run_is_refused_by_every_rank(tmp_path: Path, config: dict[str, Any]) -> None:
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
    assert first.finish() == 75


def _limit(job: runs.Job, size: int) -> None:
    """Let no process of the run write a file beyond `size` bytes, as on a full disk."""
    for pid in job.pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_stops_a_run_with_one_error_and_loses_nothing(
    tmp_path: Path, config: dict[str, Any], processes: int, background: bool
) -> None:
    runs.run(_directory(tmp_path / "whole"), config, processes)
    config["checkpoint"] |= {"background": background}
    job = runs.Job(_directory(tmp_path / "broken"), config, processes)
    runs.wait_for(lambda: _store(job.directory).steps() != [], job)
    _limit(job, 12_000)
    assert job.finish() == 1
    (line,) = (line for line in job.output().splitlines() if line.startswith("error: "))
    assert "[Errno 27] File too large" in line
    assert "Traceback" not in "".join(map(job.output, range(processes)))
    runs.run(job.directory, config, processes)
    assert runs.outcome(job.directory) == runs.outcome(tmp_path / "whole")


def test_a_disk_that_is_full_at_the_start_of_a_resume_is_named_with_the_remedy(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    runs.run(tmp_path, config | {"run": config["run"] | {"steps": 2}})
    job = runs.Job(tmp_path, config)
    _limit(job, (tmp_path / "runs/run/ledger/sessions.jsonl").stat().st_size)
    assert job.finish() == 1
    assert job.output().splitlines()[-1] == (
        "error: a file, probably in runs/run, cannot be written: File too large; raise the limit of the size of files "
        "(ulimit -f), then give the same command again"
    )
    _limit(job := runs.Job(tmp_path, config), resource.RLIM_INFINITY)
    assert job.finish() == 0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x/run.json"), "x/run.json cannot be written: No space left"),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            "a file, probably in runs/run, cannot be written: Disk quota exceeded; free",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "[Errno 13] Permission denied: 'x'"),
    ],
)
def test_the_error_of_a_full_disk_names_a_file_or_the_run_and_others_stay(error: OSError, line: str) -> None:
    with pytest.raises(OSError, match=re.escape(line)), full_disk_explained(Path("runs/run")):
        raise error


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_a_run_that_may_continue_over_a_full_disk_saves_again_once_there_is_room(
    tmp_path: Path, config: dict[str, Any], background: bool
) -> None:
    config["run"]["steps"] = 60
    config["checkpoint"] |= {"every": 1, "keep": 100, "background": background, "on_save_error": "continue"}
    runs.run(_directory(tmp_path / "whole"), config)
    job = runs.Job(_directory(tmp_path / "broken"), config)
    runs.wait_for(lambda: len(_store(job.directory).steps()) > 1, job)
    _limit(job, 12_000)
    runs.wait_for(lambda: job.output().count("going on without this checkpoint: ") > 2, job)
    _limit(job, resource.RLIM_INFINITY)
    assert job.finish() == 0, job.output()
    steps = _store(job.directory).steps()
    assert {1, 2, 60} < set(steps) < set(range(1, 61))
    assert len(steps) <= 60 - 3
    assert _store(job.directory).latest() == 60
    assert runs.outcome(job.directory) == runs.outcome(tmp_path / "whole")
    assert job.output().count("Traceback") == 0


def test_a_failed_last_checkpoint_is_an_error_under_any_policy(tmp_path: Path, config: dict[str, Any]) -> None:
    config["run"]["steps"] = 10_000
    config["checkpoint"] |= {"every": 10_000, "on_save_error": "continue"}
    job = runs.Job(tmp_path, config)
    runs.wait_for(lambda: (tmp_path / "runs/run/metrics.jsonl").exists(), job)
    _limit(job, 12_000)
    job.signal(signal.SIGTERM)
    assert job.finish() == 1
    assert job.output().splitlines()[-1].startswith("error: ")
    assert "File too large" in job.output()


def test_a_run_restarts_over_damaged_checkpoints_on_request_only_and_keeps_their_files(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    config["run"]["steps"] = 4
    job = runs.run(_directory(tmp_path / "broken"), config)
    whole = {"run": config["run"] | {"steps": 6}}
    runs.run(_directory(tmp_path / "whole"), config | whole)
    root = job.directory / "runs/run/checkpoints"
    for weights in root.glob("*/*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])
    damaged = _files(root)

    job = runs.Job(job.directory, config | whole)
    assert job.finish() == 1
    assert "or set checkpoint.fresh_start = true to start from step 0 and keep the damaged ones aside" in job.output()
    config["checkpoint"]["fresh_start"] = True
    endless = {"run": config["run"] | {"steps": 10_000}, "checkpoint": {"every": 10_000, "fresh_start": True}}
    job = runs.Job(job.directory, config | endless)
    runs.wait_for(lambda: "step 1 |" in job.output(), job)
    job.kill()
    assert _files(root) == damaged  # renamed by the first save of the new run only

    job = runs.run(job.directory, config | whole)
    assert (
        "all checkpoints are damaged, so the run starts from step 0; their files are kept under other names"
        in job.output()
    )
    assert runs.outcome(job.directory) == runs.outcome(tmp_path / "whole")
    assert _store(job.directory).steps() == [2, 4, 6]
    aside = {name.partition(".rejected-")[0]: files for name, files in _files(root).items() if ".rejected-" in name}
    assert aside == damaged
    job = runs.run(job.directory, config | {"run": config["run"] | {"steps": 8}})
    assert "resuming after step 6" in job.output()


def _files(root: Path) -> dict[str, dict[str, bytes]]:
    """Return the files of each step directory, renamed directories included."""
    return {path.name: {file.name: file.read_bytes() for file in path.iterdir()} for path in root.glob("step-*")}


def test_another_topology_reseeds_the_generators_and_the_run_says_so(tmp_path: Path, config: dict[str, Any]) -> None:
    config["run"] |= {"steps": 2, "seed": 5}
    runs.run(tmp_path, config)
    config["run"]["steps"] = 4
    job = runs.run(tmp_path, config, 2)
    assert "the random generators are seeded from seed, step and rank" in job.output()
    values = _store(tmp_path).values(4, "rng/")
    for rank in range(2):
        generator = torch.Generator().manual_seed((5 * 1_000_003 + 2) * 65_537 + rank)
        assert values[f"rng/{rank:05d}"]["cpu"] == generator.get_state().numpy().tobytes()
    config["run"]["steps"] = 6
    assert "random generators" not in runs.run(tmp_path, config, 2).output()


def _directory(path: Path) -> Path:
    path.mkdir()
    return path
