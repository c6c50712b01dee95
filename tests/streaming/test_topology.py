"""Promise 2: on other hardware the sequence of global batches is the same, and the losses agree to rounding."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import runs

from checkpoints import CheckpointStore

TOLERANCE = 2e-4
"""Relative, of the losses of ten steps at a high learning rate: only the order of fp32 sums differs."""


def _hop(directory: Path, config: dict[str, Any], steps: int, dp: int, tp: int = 1, workers: int = 0) -> None:
    tables = config | {
        "run": config["run"] | {"steps": steps},
        "data": config["data"] | {"workers": workers},
        "parallel": {"tp": tp},
    }
    runs.run(directory, tables, processes=dp * tp)


def _straight(directory: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    directory.mkdir()
    runs.run(directory, config)
    return runs.metrics(directory)


def test_other_data_parallel_sizes_and_workers_go_on_with_the_same_global_batches(
    tmp_path: Path, tokenizer: str
) -> None:
    config = runs.run_config(tokenizer, runs.sources(tmp_path))
    straight = _straight(tmp_path / "straight", config)
    for steps, dp, workers in ((3, 1, 0), (5, 2, 2), (7, 4, 1), (10, 1, 1)):
        _hop(tmp_path, config, steps, dp, workers=workers)
    _assert_same_run(runs.metrics(tmp_path), straight)


def test_other_tensor_parallel_sizes_go_on_with_the_same_global_batches(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(tokenizer, runs.sources(tmp_path))
    straight = _straight(tmp_path / "straight", config)
    for steps, dp, tp in ((4, 1, 2), (7, 1, 1), (10, 2, 1)):
        _hop(tmp_path, config, steps, dp, tp)
    _assert_same_run(runs.metrics(tmp_path), straight)


def test_the_end_of_the_data_comes_at_the_same_step_on_every_topology(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(tokenizer, runs.sources(tmp_path, count=40))
    del config["run"]["steps"]
    config["run"]["epochs"] = 1
    straight = _straight(tmp_path / "straight", config)
    wide = tmp_path / "wide"
    wide.mkdir()
    runs.run(wide, config, processes=4)
    _assert_same_run(runs.metrics(wide), straight)
    assert straight[-1]["rows"] == 42


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_rank_saves_and_ends_all_of_them(
    tmp_path: Path, tokenizer: str, number: signal.Signals
) -> None:
    config = runs.run_config(tokenizer, runs.sources(tmp_path), run={"steps": 400}, checkpoint={"every": 1000})
    config["data"]["workers"] = 1
    job = runs.Job(tmp_path, config, processes=2)
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    runs.wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2, job)
    job.signal(number, rank=1)
    assert job.finish() == 75
    step = runs.metrics(tmp_path)[-1]["step"]
    assert step < 400
    assert f"stopped after step {step} and saved its checkpoint; go on with: " in job.output()
    assert CheckpointStore(tmp_path / "runs" / "run" / "checkpoints").steps() == [step]
    again = runs.run(tmp_path, config | {"run": config["run"] | {"steps": step + 2}}, processes=2)
    assert f"resuming after step {step}" in again.output()
    assert [line["step"] for line in runs.metrics(tmp_path)] == list(range(1, step + 3))


def _assert_same_run(hopped: list[dict[str, Any]], straight: list[dict[str, Any]]) -> None:
    for name in ("step", "batch_digest", "tokens", "trained_tokens", "rows", "refused"):
        assert [line[name] for line in hopped] == [line[name] for line in straight]
    assert [line["loss"] for line in hopped] == pytest.approx([line["loss"] for line in straight], rel=TOLERANCE)
