"""Compose messages about a run for its user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from trainer.config import TrainConfig
from trainer.training.progress import Progress


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


def progress_message(progress: Progress, config: TrainConfig) -> str:
    """Return the line with the step from which a run starts or continues.

    A complete run is told how to train on: each end that it has reached has to move.
    """
    directory = config.run.directory
    ends = {
        "run.steps": config.run.steps is not None and progress.step >= config.run.steps,
        "run.epochs": progress.exhausted,
        "validation.patience": progress.ends_early(config.patience),
    }
    if raised := [key for key, reached in ends.items() if reached]:
        accepted = ' with data.accept_changed = ["data.epochs"]' if progress.exhausted else ""
        return (
            f"run      {directory}: finished after step {progress.step}; raise {' and '.join(raised)}{accepted} to train on, "
            "or give another run.name"
        )
    if progress.step:
        return f"run      {directory}: resuming after step {progress.step}, {progress.rows:,} conversations in"
    return f"run      {directory}: a new run, from step 1"


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


def early_end_message(progress: Progress, config: TrainConfig) -> str:
    """Return the line of a run whose patience is used up."""
    assert config.validation is not None
    assert progress.lowest is not None
    if config.validation.best_by == "answers":
        missed = f"evaluations had no score above {1 - progress.lowest:.4f}"
    else:
        missed = f"validations had no loss below {progress.lowest:.4f}"
    return (
        f"the run ends early after step {progress.step}: the last {config.patience} {missed}; the newest weights are "
        "exported, and checkpoint.keep_best keeps the best"
    )


def refusals_message(refused: Counter[str], rows: int) -> str:
    """Return the number of refused rows by reason, most frequent first, among `rows` read."""
    listed = ", ".join(f"{reason}: {count:,}" for reason, count in refused.most_common())
    return f"refused {refused.total():,} of {rows:,} rows so far ({listed}); see refused.jsonl"
