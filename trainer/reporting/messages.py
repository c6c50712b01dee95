"""Compose messages about a run for its user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from trainer.distributed.mesh import Topology
from trainer.llama.lora.nf4 import count_weights
from trainer.training.progress import Progress


def model_message(directory: Path, model: nn.Module, total_rows: int | None, topology: Topology) -> str:
    """Return the first line of a run: directory, parameters, rows if known, ranks."""
    parameters = count_weights(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = f"{parameters:,} parameters" + (f", {trained:,} of them trained," if trained < parameters else "")
    rows = f" on {total_rows:,} conversations in all epochs" if total_rows else ""
    return f"{directory}: a Llama of {counted}{rows}; {topology.describe()}"


def damage_messages(rejected: Mapping[int, str], *, restarted: bool) -> list[str]:
    """Return a line for each damaged checkpoint in `rejected` (step -> reason).

    `restarted` adds a line: all checkpoints were damaged, and the run starts from step 0.
    """
    lines = [f"checkpoint of step {step} is damaged and was skipped: {why}" for step, why in rejected.items()]
    if rejected and restarted:
        lines.append(
            "all checkpoints are damaged, so the run starts from step 0; their files are kept under other names"
        )
    return lines


def progress_messages(progress: Progress, *, complete: bool) -> list[str]:
    """Return a line with the step from which a run continues, or [] for a new run."""
    if complete:
        return [
            f"finished after step {progress.step}; raise run.steps or run.epochs to train on, or give another run.name"
        ]
    if progress.step:
        return [f"resuming after step {progress.step}, {progress.rows:,} conversations in"]
    return []


def change_messages(changes: Sequence[str], next_step: int, rate: float) -> list[str]:
    """Return a line about settings changed at a resume, with the rate of the next step, or []."""
    if not changes:
        return []
    return [f"accepted: {'; '.join(changes)}; the learning rate of step {next_step} is {rate:.3g}"]


def extension_message(progress: Progress, rate: float) -> str:
    """Return the line of a finished run with further data: its packs and its learning rate."""
    return (
        f"the data goes on after its end at step {progress.step}: each row is trained once in each new epoch, in packs that "
        f"may differ from those of a run begun with more data; the learning rate goes on at {rate:.3g}"
    )


def refusals_message(refused: Counter[str], rows: int) -> str:
    """Return the number of refused rows by reason, most frequent first, among `rows` read."""
    listed = ", ".join(f"{reason}: {count:,}" for reason, count in refused.most_common())
    return f"refused {refused.total():,} of {rows:,} rows so far ({listed}); see refused.jsonl"
