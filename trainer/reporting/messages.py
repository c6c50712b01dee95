"""Sentences about a run for its user. Nothing here prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from trainer.distributed.mesh import Topology
from trainer.training.progress import Progress


def model_message(directory: Path, model: nn.Module, total_rows: int | None, topology: Topology) -> str:
    """Return the first line of a run: its directory, the model's size, the data's size if known, the ranks."""
    parameters = sum(p.numel() for p in model.parameters())
    rows = f" on {total_rows:,} conversations in all epochs" if total_rows else ""
    return f"{directory}: a Llama of {parameters:,} parameters{rows}; {topology.describe()}"


def damage_messages(rejected: Mapping[int, str], *, restarted: bool) -> list[str]:
    """Return a line for each damaged checkpoint in `rejected` (step -> reason), and one if none was whole."""
    lines = [f"checkpoint of step {step} is damaged and was passed over: {why}" for step, why in rejected.items()]
    if rejected and restarted:
        lines.append("no checkpoint is whole, so the run begins anew; the damaged ones are left aside")
    return lines


def progress_messages(progress: Progress, *, complete: bool) -> list[str]:
    """Return a line about the step that a run continues from; none for a new run."""
    if complete:
        return [f"finished after step {progress.step}; give it another run.name to train again"]
    if progress.step:
        return [f"resuming after step {progress.step}, {progress.rows:,} conversations in"]
    return []


def refusals_message(refused: Counter[str], rows: int) -> str:
    """Return the count of refused rows by reason, the most frequent reason first, beside all `rows` so far."""
    listed = ", ".join(f"{reason}: {count:,}" for reason, count in refused.most_common())
    return f"refused {refused.total():,} of {rows:,} rows so far ({listed}); see refused.jsonl"
