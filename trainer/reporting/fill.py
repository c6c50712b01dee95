"""Watch how full a run's packs are, and name the cause and the remedy of a low fill."""

from __future__ import annotations

from collections import deque

from sftstream import DataConfig
from trainer.training.step_reader import StepTotals

STEPS = 20
"""Steps over which the fill is judged."""
LOW = 0.9
"""Share of filled slots under which a message is due."""
FEW_CONVERSATIONS = 4
"""Conversations of mean length in a full pack up to which lengths leave room: of more, one fits."""


class FillWatch:
    """The fill of the last steps. A message comes once until the fill has recovered."""

    def __init__(self, data: DataConfig, streams: int) -> None:
        self._data = data
        self._streams = streams
        self._steps = deque[StepTotals](maxlen=STEPS)
        self._said = False

    def after(self, totals: StepTotals, *, last: bool) -> str | None:
        """Return a message if the last `STEPS` steps are less than `LOW` full, else None.

        At the run's last step fewer steps are judged.
        """
        self._steps.append(totals)
        if len(self._steps) < STEPS and not last:
            return None
        slots = len(self._steps) * self._data.global_batch * self._data.capacity
        fill = self._tokens / slots
        if fill >= LOW:
            self._said = False
            return None
        if self._said:
            return None
        self._said = True
        number = "last step is" if len(self._steps) == 1 else f"last {len(self._steps)} steps are"
        return f"the {number} {fill:.1%} full: {self._cause()}"

    @property
    def _tokens(self) -> int:
        """Tokens planned for the packs; `run.skip` leaves slots empty on purpose."""
        return sum(step.tokens + step.skipped_tokens for step in self._steps)

    def _cause(self) -> str:
        packs = len(self._steps) * self._data.global_batch
        filled = sum(step.filled_packs for step in self._steps)
        tokens = self._tokens
        conversations = sum(step.rows - step.refused for step in self._steps)
        capacity, streams = self._data.capacity, self._streams
        if not filled or tokens / (filled * capacity) >= LOW:
            fewer = f"fewer data.streams (now {streams}) or a smaller" if streams > 1 else "a smaller"
            return (
                f"{packs - filled:,} of {packs:,} packs are empty, since streams have reached the end of the data; "
                f"{fewer} data.global_batch leaves fewer in the next run"
            )
        if tokens * FEW_CONVERSATIONS > capacity * conversations:
            return (
                f"a pack holds {conversations / filled:.1f} conversations of {tokens / conversations:,.0f} tokens, and no "
                f"further one fits; raise data.capacity = {capacity}, in a run under way with "
                'data.accept_changed = ["data.capacity"]'
            )
        return (
            f"each of {streams} streams ends with a partly filled pack; a new run with fewer data.streams, or with "
            'data.streams = "auto", has fewer'
        )
