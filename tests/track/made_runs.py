"""Directories of runs with trackers, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from trainer.track.config import TrackerConfig
from trainer.track.content import ABOUT, About

TOKEN = "00112233445566778899aabbccddeeff"


def line(step: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    numbers = {"step": step, "loss": 10.0 - step, "refused": 1, "refused_by_reason": {"too_long": 1}}
    return numbers | {"time": 1000.0 + step, "batch_digest": "ab"} | changes


def write_lines(run: Path, steps: range, **changes: Any) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line(step, **changes)) + "\n" for step in steps))


def made_run(directory: Path, *trackers: TrackerConfig, steps: int = 0, token: str = TOKEN) -> Path:
    """Write a run of `steps` steps, and return its directory."""
    (directory / "trackers").mkdir(parents=True, exist_ok=True)
    about = About(
        token=token,
        name="first",
        trackers=trackers,
        settings={"run.seed": 7, "data.shuffle": True},
        texts={"data.sources.0.path": "/home/me/dialogues.jsonl"},
        digests={"data": "d1"},
    )
    (directory / ABOUT).write_bytes(msgspec.json.encode(about))
    write_lines(directory, range(1, steps + 1))
    return directory
