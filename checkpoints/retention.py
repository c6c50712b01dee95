"""Which steps stay when a new one is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """The newest stay, multiples of a number, and the best."""

    keep: int = 3
    """Newest steps that stay, 1 or more."""
    keep_every: int | None = None
    """Multiples of it stay as well."""
    keep_best: int | None = None
    """As many of those with the lowest validation loss stay as well; of equal ones the older."""

    def __post_init__(self) -> None:
        for name in ("keep", "keep_every", "keep_best"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")

    def surplus(self, steps: Sequence[int], good: int, loss: Callable[[int], float | None]) -> list[int]:
        """What of `steps`, oldest first, may go: nothing from `good` on, the newest that is known to be whole.

        `loss` gives a step's validation loss, None for one without; it is asked only where that matters.
        """
        old = [step for step in steps[: -self.keep] if step < good and (not self.keep_every or step % self.keep_every)]
        if not old or self.keep_best is None:
            return old
        judged = [(value, step) for step in steps if (value := loss(step)) is not None]
        best = {step for _, step in sorted(judged)[: self.keep_best]}
        return [step for step in old if step not in best]
