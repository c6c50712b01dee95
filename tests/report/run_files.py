"""Files of a run, written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def step(number: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl: 100 tokens, 40 of them trained, in 2 s from the second 1000 on."""
    line = {
        "step": number,
        "loss": 4.0 - number,
        "grad_norm": 1.0,
        "learning_rate": 0.1,
        "tokens": 100,
        "trained_tokens": 40,
        "rows": 10 * number,
        "refused": 0,
        "refused_by_reason": {},
        "fill": 0.5,
        "tokens_per_second": 50.0,
        "data_wait": 0.5,
        "seconds": 2.0,
        "gpu_tokens_per_second": 50.0,
        "time": 1000.0 + 2 * number,
        "batch_digest": "ab",
    }
    return line | changes


OLD = ("gpu_tokens_per_second", "time")
"""Fields that version 0.1.0 did not write."""


def launch(after: int, time: float, **changes: Any) -> dict[str, Any]:
    return {"event": "launch", "time": time, "after": after, "mesh": {"dp": 1, "tp": 1}} | changes


def saved(number: int, time: float) -> dict[str, Any]:
    return {"event": "checkpoint", "time": time, "step": number, "seconds": 0.25}


def end(number: int, time: float, reason: str) -> dict[str, Any]:
    return {"event": "end", "time": time, "step": number, "reason": reason}


def write(directory: Path, metrics: list[Any], events: Sequence[Any] = (), refused: Sequence[Any] = ()) -> Path:
    """Write the files of a run; a line that is no dict is written as it is, without a line end."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {"metrics.jsonl": metrics, "events.jsonl": events, "refused.jsonl": refused}
    for name, lines in files.items():
        if lines:
            texts = (json.dumps(line) + "\n" if isinstance(line, dict) else line for line in lines)
            (directory / name).write_text("".join(texts))
    return directory
