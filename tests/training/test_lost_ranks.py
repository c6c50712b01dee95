"""A rank that stops or ends gives one line on every other rank, with rank, step and the work."""

from __future__ import annotations

import re
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import gloo_ranks
import pytest
import runs
import torch
import torch.distributed as dist

from checkpoints import CheckpointStore
from trainer.distributed.mesh import ParallelConfig, data_and_tensor_mesh, wait_longer


@pytest.fixture
def config(tmp_path: Path, tokenizer: str) -> dict[str, Any]:
    config = runs.run_config(tokenizer, runs.sources(tmp_path), run={"steps": 100_000})
    config["parallel"] = {"timeout": "4s"}
    return config


def error_line(job: runs.Job, rank: int) -> str:
    """Wait for the error line of a rank."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = [line for line in job.output(rank).splitlines() if line.startswith("error: ")]
        if lines:
            return lines[0]
        time.sleep(0.1)
    raise TimeoutError(job.output(rank))


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_lost_rank_is_an_error_with_rank_and_step(
    tmp_path: Path, config: dict[str, Any], number: signal.Signals, rank: int, tp: int
) -> None:
    config["parallel"]["tp"] = tp
    job = runs.Job(tmp_path, config, 2)
    store = CheckpointStore(tmp_path / "runs/run/checkpoints")
    runs.wait_for(lambda: store.steps() != [], job)
    job.signal(number, rank)
    line = error_line(job, 1 - rank)
    job.kill()
    assert re.match(rf"error: (rank {1 - rank}, step \d+: |saving step \d+: a rank has ended)", line), line
    assert "Traceback" not in job.output(1 - rank)


def _limits(rank: int) -> list[float]:
    """Return the seconds after which operations of each group of a mesh fail."""
    parallel = ParallelConfig(replicas=2, timeout="4s")
    mesh = data_and_tensor_mesh("cpu", parallel)
    wait_longer(mesh, timedelta(seconds=parallel.timeout_seconds))
    groups = [dist.group.WORLD, *(mesh[name].get_group() for name in ("dp", "replicate", "shard", "tp"))]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_operations_of_all_groups_fail_after_the_limit_of_the_run() -> None:
    assert gloo_ranks.run_ranks(4, _limits) == [[64.0] * 5] * 4


def test_work_within_the_limit_of_time_goes_on(tmp_path: Path, config: dict[str, Any]) -> None:
    config["run"]["steps"] = 3
    config["parallel"]["timeout"] = "20s"
    runs.run(tmp_path, config, 2)


@pytest.mark.parametrize("text", ["0s", "soon", "30"])
def test_a_limit_of_another_form_is_refused(config: dict[str, Any], text: str) -> None:
    from trainer.config_file import parse_config

    with pytest.raises(ValueError, match="is no time above 0"):
        parse_config(config | {"parallel": {"timeout": text}})
