"""Limits on the steps under a root."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """Limits on old steps: the newest stay, multiples of a number, and the best.

    Example: of the steps 10, 20, 30, 40, 50 with the validation losses 3.0, 1.5, 2.0, 2.5, 2.2,
    `Retention(keep=2, keep_every=30, keep_best=1)` keeps 40 and 50 (newest), 30 (a multiple of 30)
    and 20 (the lowest loss), and deletes 10.

    Raises ValueError if a limit is below 1.
    """

    keep: int = 3
    """Number of newest steps to keep."""
    keep_every: int | None = None
    """Also keep multiples of this number. None: no further steps."""
    keep_best: int | None = None
    """Also keep this number of steps with the lowest validation loss; of equal, the older."""

    def __post_init__(self) -> None:
        for name in ("keep", "keep_every", "keep_best"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")

    def surplus(self, steps: Sequence[int], good: int, loss: Callable[[int], float | None]) -> list[int]:
        """Return the steps to delete, out of `steps` (oldest first).

        `good` is the newest step known to be undamaged; neither `good` nor a later step is ever
        returned. `loss` returns the validation loss of a step, or None, and is called only if
        needed.
        """
        old = [step for step in steps[: -self.keep] if step < good and (not self.keep_every or step % self.keep_every)]
        if not old or self.keep_best is None:
            return old
        judged = [(value, step) for step in steps if (value := loss(step)) is not None]
        best = {step for _, step in sorted(judged)[: self.keep_best]}
        return [step for step in old if step not in best]
