"""Parts of the benchmarks that start the real trainer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from trainer.reporting.metrics import StepMetrics


def sources(paths: Iterable[str]) -> str:
    """Return files of conversations as the elements of `data.sources`, in TOML."""
    return ", ".join(f'{{ path = "{Path(path).resolve()}" }}' for path in paths)


def metrics(directory: Path) -> list[StepMetrics]:
    """Return the metrics of each step of the run named "run" that was started in `directory`."""
    lines = (directory / "runs" / "run" / "metrics.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line, type=StepMetrics) for line in lines]
