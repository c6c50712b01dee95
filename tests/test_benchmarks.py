"""The benchmarks run, and print what they measure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEAST = {
    "rows": 24,
    "rows-of-a-file": 8,
    "rounds": 1,
    "capacity": 256,
    "gigabytes": 0.0001,
    "patience": 0,
    "seconds": 0.2,
}


def test_the_pipeline_benchmark_prints_its_tables(tmp_path: Path) -> None:
    options = [f"--{name}={value}" for name, value in LEAST.items()]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "pipeline" / "pipeline.py", *options, "--here", "--no-peers"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SFTSTREAM_REALDATA": str(tmp_path / "nothing")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    for first in ("sftstream, 2 workers", "pairs.parquet", "`loader.state`, all streams", "private memory of a worker"):
        assert first in rows


@pytest.mark.slow
def test_the_benchmark_of_other_trainers_prints_a_row_for_each(tmp_path: Path) -> None:
    options = ["--rows=24", "--rounds=1", "--capacity=256"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "integrations" / "integrations.py", *options],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SFTSTREAM_REALDATA": str(tmp_path / "nothing")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _head, _line, *rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 6
    for trainer in ("TRL SFTTrainer", "transformers Trainer", "Lightning"):
        assert sum(row.startswith(trainer) for row in rows) == 2, rows  # prepared by itself and by sftstream


def test_the_benchmark_of_the_bounded_state_prints_a_row_for_each_position() -> None:
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "benchmarks" / "bounded" / "bounded.py",
            "--rows=3000",
            "--streams=2",
            "--capacity=256",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[4:]]
    assert [row[0] for row in rows] == ["100", "1,500", "3,000"]
    assert all(0 < int(row[1].replace(",", "")) <= 4096 for row in rows)


@pytest.mark.parametrize(
    "ranks", [*[pytest.param(ranks, marks=pytest.mark.slow) for ranks in ("--dp=1", "--tp=2")], "--dp=2"]
)
def test_the_benchmark_of_the_wait_for_data_trains_and_prints_its_table(ranks: str) -> None:
    small = ["--device=cpu", "--layers=1", "--hidden=64", "--capacity=256", "--steps=2", "--vocabulary=4096"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu" / "data_wait.py", *small, ranks],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    layers, speed, median, whole, milliseconds = done.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert layers == "1"
    assert int(speed.replace(",", "")) > 0
    assert 0 <= float(median.rstrip("%")) < 100 > float(whole.rstrip("%")) >= 0
    assert float(milliseconds) >= 0


def test_the_benchmark_of_several_gpus_prints_a_row_for_each_division_of_the_ranks() -> None:
    small = ["--gpus=2", "--shapes=tiny", "--steps=1", "--peers"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu" / "scaling.py", *small],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| tiny")]
    full, sharded, adapters = (
        "sftstream, bf16 weights, deterministic, compiled",
        "sftstream, bf16 weights, deterministic, compiled, sharded over dp",
        "sftstream, LoRA on a bf16 model, deterministic, compiled",
    )
    assert [tuple(row[1:3]) for row in rows] == [
        (full, "dp 1 x tp 1"),
        (full, "dp 2 x tp 1"),
        (full, "dp 1 x tp 2"),
        (sharded, "dp 2 x tp 1"),
        (adapters, "dp 1 x tp 1"),
        (adapters, "dp 2 x tp 1"),
    ]
    assert all(float(row[4].replace(",", "")) > 0 for row in rows)
    assert [row[8] == "1.00" for row in rows if row[2] == "dp 1 x tp 1"] == [True, True]


@pytest.mark.slow
def test_the_benchmark_of_losses_prints_a_row_for_each_run_of_fine_tuning() -> None:
    rows = str(ROOT / "examples" / "demo" / "data" / "messages.jsonl")
    small = ["--tiny", "--vocabulary=2000", "--steps=3", "--seeds=0", "--trained-on", rows, "--trained-steps=2"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu" / "curves.py", *small, "--variants", "bf16", "float8"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows_of_runs = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows_of_runs] == [["bf16", "0"], ["float8", "0"]]
    assert rows_of_runs[0][4] == "+0.0000"
    assert all(0 < float(loss) < 10 for row in rows_of_runs for loss in row[2:4])


def test_the_packing_benchmark_prints_a_row_for_each_capacity(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "packing" / "packing.py", "--conversations=300"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SFTSTREAM_REALDATA": str(tmp_path / "nothing")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ")[0] for line in done.stdout.splitlines() if "us" in line]
    assert rows == ["| 2048", "| 4096", "| 8192", "| 16384"]
