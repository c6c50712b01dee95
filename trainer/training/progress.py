"""Counts since the start of a run: steps, rows, tokens."""

from __future__ import annotations

import math

import msgspec

from trainer.training.step import StepResult
from trainer.training.step_reader import StepTotals


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Counts over all ranks since the start of a run, as stored in checkpoints."""

    step: int = 0
    """Finished steps."""
    rows: int = 0
    """Conversations trained on, and rows refused or skipped."""
    tokens: int = 0
    """Tokens of the conversations, padding excluded."""
    trained_tokens: int = 0
    """Tokens in the loss."""
    loss: float | None = None
    """Mean loss of the last step, in nats; None before the first step."""
    exhausted: bool = msgspec.field(name="finished", default=False)
    """True after the last step of the data."""

    def after(self, totals: StepTotals, result: StepResult) -> Progress:
        """Return the progress after one more step.

        Raises ValueError if the step's loss or gradient norm is not a finite number.
        """
        step = self.step + 1
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise ValueError(
                f"step {step}: the loss is {result.loss} and the gradient's norm {result.grad_norm}; lower "
                'optimizer.learning_rate, and once there is a checkpoint, set run.accept_changed = ["optimizer"] as well'
            )
        return Progress(
            step=step,
            rows=self.rows + totals.rows,
            tokens=self.tokens + totals.tokens,
            trained_tokens=self.trained_tokens + totals.trained_tokens,
            loss=result.loss,
            exhausted=totals.unexhausted_shards == 0,
        )

    def is_complete(self, steps: int | None) -> bool:
        """Return True if the data is exhausted or `steps` (`run.steps`) are taken."""
        return self.exhausted or (steps is not None and self.step >= steps)

    def share(self, total_rows: int | None, steps: int | None) -> float | None:
        """Return the finished part of the run in [0, 1].

        Counts rows out of `total_rows` and steps out of `steps` (`run.steps`), and returns the
        larger part, since the run ends at the earlier end. Returns None if both are None.
        """
        parts = [done / total for done, total in ((self.rows, total_rows), (self.step, steps)) if total]
        return min(1.0, max(parts)) if parts else None
