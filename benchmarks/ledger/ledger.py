"""Measure the share of a training run's step time that the ledger takes.

Trains the run of a TOML file in this process with the real trainer, and measures each function that
exists for the ledger alone: describing the segments of a step's packs, sending and receiving the
segments of all ranks, writing the journal, closing steps into Parquet files, and gathering the
states of the streams at a checkpoint. All times are CPU times of the calling thread, and torch has
a single thread, so that other work on the machine has little effect.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch

import trainer.run
import trainer.training.step_reader
from sftstream import LedgerWriter
from trainer.main import main as train
from trainer.training.segment_gather import SegmentGather

ROOT = Path(__file__).resolve().parents[2]


def timed(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    """Return the function; each call appends its CPU time in seconds to `times`."""

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        began = time.thread_time()
        try:
            return function(*args, **options)
        finally:
            times.append(time.thread_time() - began)

    return call


PLACES: dict[str, tuple[Any, str]] = {
    "describe the segments": (trainer.training.step_reader, "segments_of"),
    "row for the collective": (SegmentGather, "row"),
    "segments of all ranks": (SegmentGather, "gathered"),
    "order the segments": (trainer.training.step_reader, "ordered_by_pack"),
    "journal": (LedgerWriter, "add"),
    "close steps": (LedgerWriter, "close"),
    "gather states of streams": (trainer.run, "gather_streams"),
}
"""Name of a part of the ledger -> module or class, and attribute."""
STEP = (trainer.run, "_take_step")
"""The whole step, in the main thread."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "demo.toml")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("overrides", nargs="*", help="section.key=value, as for the trainer")
    options = parser.parse_args()
    config = options.config.resolve()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in (*PLACES, "step")}
    for name, (holder, attribute) in {**PLACES, "step": STEP}.items():
        setattr(holder, attribute, timed(getattr(holder, attribute), times[name]))
    os.chdir(ROOT)
    with TemporaryDirectory() as directory:
        fixed = [f"run.root={directory}", "run.name=run", f"run.steps={options.steps}"]
        code = train([str(config), *fixed, *options.overrides])
        if code:
            raise SystemExit(code)
        lines = (Path(directory) / "run" / "metrics.jsonl").read_bytes().splitlines()
    conversations = msgspec.json.decode(lines[-1])["rows"] / len(lines)
    step = statistics.median(times["step"])
    print(f"\n{len(lines)} steps of {conversations:.0f} conversations; median of a step {1e3 * step:.1f} ms\n")
    print("| part of the ledger | calls | median of a call, ms | all calls, ms per step |")
    print("|---|---|---|---|")
    for name in PLACES:
        calls = times[name]
        middle = statistics.median(calls) if calls else 0.0
        print(f"| {name} | {len(calls)} | {1e3 * middle:.3f} | {1e3 * sum(calls) / len(lines):.3f} |")
    total = sum(sum(times[name]) for name in PLACES) / len(lines)
    print(f"\nshare of the ledger in the time of a step: {total / step:.3%}")


if __name__ == "__main__":
    main()
