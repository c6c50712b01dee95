"""Average the last steps of a run, and foresee the time that is left."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from trainer.reporting.metrics import StepMetrics

PACED_STEPS = 50
"""Number of last steps whose speed foresees the time that is left."""


class Pace:
    """Speed of the last steps in wall time: validations and checkpoints included.

    The first step of a session, which compiles kernels and fills queues, only starts the clock.
    """

    def __init__(self) -> None:
        self.steps = 0
        """Steps of the session."""
        self._marks: deque[tuple[float, float]] = deque(maxlen=PACED_STEPS + 1)

    def add(self, share: float | None, now: float) -> None:
        """Count a step that ended at the time `now`, in seconds.

        `share` is the finished part of the run, None if unknown.
        """
        self.steps += 1
        if share is not None:
            self._marks.append((share, now))

    @property
    def left(self) -> float | None:
        """Seconds until the end of the run; None before the second step or without an end."""
        if len(self._marks) < 2:
            return None
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        return None if last <= first else (1 - last) * (ended - began) / (last - first)


def recent_metrics(steps: Sequence[StepMetrics]) -> StepMetrics:
    """Return the metrics of the last step, with speed, fill, trained tokens and wait of all steps.

    The first of several steps is left out, since the first step of a session warms up.
    """
    counted = steps if len(steps) == 1 else list(steps)[1:]
    seconds = sum(step.seconds for step in counted)
    tokens = sum(step.tokens for step in counted)
    uses = [step.mfu * step.seconds for step in counted if step.mfu is not None]
    return msgspec.structs.replace(
        steps[-1],
        tokens=tokens,
        trained_tokens=sum(step.trained_tokens for step in counted),
        seconds=seconds,
        data_wait=sum(step.data_wait for step in counted),
        fill=sum(step.fill for step in counted) / len(counted),
        tokens_per_second=tokens / seconds,
        mfu=sum(uses) / seconds if uses else None,
    )
