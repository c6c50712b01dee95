"""The benchmark of the pipeline runs, and compares what it measures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
        [sys.executable, ROOT / "benchmarks" / "pipeline.py", *options, "--here", "--no-peers"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SFTSTREAM_REALDATA": str(tmp_path / "nothing")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    for first in ("sftstream, 2 workers", "pairs.parquet", "`loader.state`, all streams", "private memory of a worker"):
        assert first in rows
