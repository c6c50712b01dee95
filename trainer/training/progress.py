"""Counts since the start of a run: steps, rows, tokens."""

from __future__ import annotations

import msgspec

from trainer.config import ValidationConfig
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
    """Mean loss of the last step with an update, in nats; None before the first."""
    unapplied_in_a_row: int = 0
    """Last steps without an update, since loss or gradient was not finite."""
    lowest: float | None = None
    """Lowest validation loss, in nats; None before the first validation and without
    `validation.patience`."""
    without_lowest: int = 0
    """Last validations in a row without a new lowest loss."""
    exhausted: bool = msgspec.field(name="finished", default=False)
    """True after the last step of the data."""

    def after(self, totals: StepTotals, result: StepResult) -> Progress:
        """Return the progress after one more step.

        The tokens of a step without an update, since its loss or gradient is not finite, do not
        count as trained.
        """
        applied = result.is_finite
        return msgspec.structs.replace(
            self,
            step=self.step + 1,
            rows=self.rows + totals.rows,
            tokens=self.tokens + totals.tokens,
            trained_tokens=self.trained_tokens + (totals.trained_tokens if applied else 0),
            loss=result.loss if applied else self.loss,
            unapplied_in_a_row=0 if applied else self.unapplied_in_a_row + 1,
            exhausted=totals.unexhausted_shards == 0,
        )

    def validated(self, loss: float, validation: ValidationConfig) -> Progress:
        """Return the progress after a validation with the judged loss `loss`, in nats."""
        if validation.patience is None:
            return msgspec.structs.replace(self, lowest=None, without_lowest=0)
        if self.lowest is None or loss < self.lowest - validation.min_improvement:
            return msgspec.structs.replace(self, lowest=loss, without_lowest=0)
        return msgspec.structs.replace(self, without_lowest=self.without_lowest + 1)

    def is_complete(self, steps: int | None, patience: int | None = None) -> bool:
        """Return True if the data is exhausted, `steps` (`run.steps`) are taken, or `patience`
        (`validation.patience`) is used up."""
        return self.exhausted or (steps is not None and self.step >= steps) or self.ends_early(patience)

    def ends_early(self, patience: int | None) -> bool:
        """Return True if the last `patience` validations had no new lowest loss."""
        return patience is not None and self.without_lowest >= patience

    def share(self, total_rows: int | None, steps: int | None) -> float | None:
        """Return the finished part of the run in [0, 1].

        Counts rows out of `total_rows` and steps out of `steps` (`run.steps`), and returns the
        larger part, since the run ends at the earlier end. Returns None if both are None.
        """
        parts = [done / total for done, total in ((self.rows, total_rows), (self.step, steps)) if total]
        return min(1.0, max(parts)) if parts else None
