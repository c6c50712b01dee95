"""Promise 1: a run killed at any moment and resumed equals an unkilled run, bit for bit."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.randrange(10**9))
DRAWS = int(os.environ.get("SFTSTREAM_KILLS") or 12)
TOPOLOGIES = {"one process": (1, 1), "tp 2": (2, 2), "dp 2": (2, 1), "tp 2 x dp 2": (4, 2)}


def test_three_kills_in_a_row_leave_no_trace(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(tokenizer, runs.sources(tmp_path), data={"workers": 1})
    compare(tmp_path, config, processes=1, draw=random.Random(SEED), kills=3)


def test_kills_leave_no_trace_with_muon_and_a_decay_at_the_end(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(
        tokenizer,
        runs.sources(tmp_path),
        optimizer={"kind": "muon", "weight_decay": 0.1},
        schedule={"kind": "wsd", "warmup": 2, "decay": 3},
    )
    compare(tmp_path, config, processes=2, draw=random.Random(SEED + 3), kills=2)


def test_kills_leave_no_trace_in_float8(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(tokenizer, runs.sources(tmp_path), run={"float8": True}, parallel={"tp": 2})
    compare(tmp_path, config, processes=2, draw=random.Random(SEED + 4), kills=2)


@pytest.mark.parametrize(
    "run", [{"recompute": "full"}, {"recompute": "selective", "float8": True}], ids=["full", "selective, float8"]
)
def test_kills_leave_no_trace_in_compiled_layers(run: dict[str, Any], tmp_path: Path, tokenizer: str) -> None:
    sources = runs.sources(tmp_path)
    config = runs.run_config(
        tokenizer,
        sources,
        run={"compile": True, "deterministic": True} | run,
        model={"num_hidden_layers": 3},
        validation={"sources": [{"path": sources}], "every": 3},
    )
    compare(tmp_path, config, processes=1, draw=random.Random(SEED + 5), kills=2)


def test_a_kill_before_the_first_checkpoint_starts_the_same_run_again(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(tokenizer, runs.sources(tmp_path), checkpoint={"every": 100})
    whole = _whole(tmp_path / "whole", config)
    broken = _directory(tmp_path / "broken")
    job = runs.Job(broken, config)
    runs.wait_for(lambda: _lines(broken) >= 3, job)
    job.kill()
    runs.run(broken, config)
    assert runs.outcome(broken) == whole


def test_kills_leave_no_trace_in_a_run_over_epochs(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(
        tokenizer, runs.sources(tmp_path), schedule={"kind": "cosine", "over": "data", "warmup": 2}
    )
    del config["run"]["steps"]
    config["run"]["epochs"] = 2
    compare(tmp_path, config, processes=1, draw=random.Random(SEED + 1), kills=2)


def test_kills_leave_no_trace_with_a_streamed_source(tmp_path: Path, tokenizer: str) -> None:
    for number in range(3):
        tiny.write_jsonl(tmp_path / f"{number}.jsonl", tiny.rows(20, seed=number))
    source = {"path": f"{tmp_path}/*.jsonl", "streaming": True, "shuffle": "shards"}
    config = runs.run_config(tokenizer, data={"sources": [source], "workers": 1}) | {"schedule": {"warmup": 2}}
    del config["run"]["steps"]
    config["run"]["epochs"] = 2
    compare(tmp_path, config, processes=1, draw=random.Random(SEED + 2), kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(DRAWS))
def test_random_kills_leave_no_trace(number: int, tmp_path: Path, tokenizer: str) -> None:
    draw = random.Random(f"{SEED}/{number}")
    name = list(TOPOLOGIES)[number % len(TOPOLOGIES)] if len(TOPOLOGIES) <= DRAWS else draw.choice(list(TOPOLOGIES))
    processes, tp = TOPOLOGIES[name]
    workers, kills = draw.choice([0, 1, 2]), draw.randint(3, 5)
    compiled = processes <= 2 and draw.random() < 0.3
    recompute = draw.choice(["none", "selective", "full"])
    print(f"seed {SEED}, draw {number}: {name}, {workers} workers, {kills} kills, {compiled=}, recompute {recompute}")
    config = runs.run_config(
        tokenizer,
        runs.sources(tmp_path),
        run={"compile": compiled, "recompute": recompute},
        data={"workers": workers, "prefetch": draw.choice([1, 4])},
        parallel={"tp": tp},
        checkpoint={"every": draw.choice([1, 2, 3]), "background": draw.random() < 0.7},
    )
    compare(tmp_path, config, processes, draw, kills)


def compare(tmp_path: Path, config: dict[str, Any], processes: int, draw: random.Random, kills: int) -> None:
    """Assert that a run after `kills` kills equals an unkilled run."""
    began = time.monotonic()
    whole = _whole(tmp_path / "whole", config, processes)
    duration = time.monotonic() - began
    broken = _directory(tmp_path / "broken")
    for _ in range(kills):
        _killed(broken, config, processes, draw, duration)
    runs.run(broken, config, processes)
    assert runs.outcome(broken) == whole, f"seed {SEED}"


def _killed(directory: Path, config: dict[str, Any], processes: int, draw: random.Random, duration: float) -> None:
    """Start the run; kill it during a save, after some lines of metrics, or after a random time."""
    job = runs.Job(directory, config, processes)
    match draw.choice(["saving", "step", "time"]):
        case "saving":
            committed = set(_attempts(directory))
            runs.wait_for(lambda: bool(set(_attempts(directory)) - committed), job)
            time.sleep(draw.random() * 0.01)
        case "step":
            lines, more = _lines(directory), draw.randint(1, 3)
            runs.wait_for(lambda: _lines(directory) >= lines + more, job)
        case "time":
            time.sleep(draw.random() * duration)
    job.kill()


def _whole(directory: Path, config: dict[str, Any], processes: int = 1) -> dict[str, Any]:
    runs.run(_directory(directory), config, processes)
    return runs.outcome(directory)


def _directory(path: Path) -> Path:
    path.mkdir()
    return path


def _lines(directory: Path) -> int:
    path = directory / "runs" / "run" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _attempts(directory: Path) -> list[str]:
    """Return the checkpoint directories under way."""
    return [path.name for path in (directory / "runs" / "run" / "checkpoints").glob(".step-*")]
