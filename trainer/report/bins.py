"""Keep curves of any number of steps in a fixed number of bins, with mean and extremes of each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_BINS = 512
"""Number of bins above which neighbouring bins are joined in pairs."""

LARGEST = 1e100
"""Larger values are left out, so that sums and axes stay finite."""

Values = NDArray[np.float64]


class Bins:
    """Curves over the steps 1, 2, ... in bins of `width` steps, a power of two.

    Bin `i` holds the steps `i * width + 1` to `(i + 1) * width`. The bins of a run depend on the
    run's steps alone, not on the portions in which steps arrive. Memory is bounded.
    """

    def __init__(self, curves: int) -> None:
        self.width = 1
        """Steps in a bin."""
        self.steps = 0
        """Last step."""
        self._count = np.zeros((0, curves))
        self._sum = np.zeros((0, curves))
        self._low = np.zeros((0, curves))
        self._high = np.zeros((0, curves))

    def add(self, steps: NDArray[np.int64], values: Values) -> None:
        """Add further steps, ascending. `values` is `(steps, curves)`.

        NaN, and values of `LARGEST` and more, are left out. More curves than before have no value
        in earlier steps, and fewer leave the last curves without a value.
        """
        if not len(steps):
            return
        self.steps = int(steps[-1])
        while self.steps > MOST_BINS * self.width:
            self._join_pairs()
        self._widen((self.steps - 1) // self.width + 1, values.shape[1])
        values = np.pad(values, ((0, 0), (0, self.curves - values.shape[1])), constant_values=np.nan)
        index = (steps - 1) // self.width
        starts = np.flatnonzero(np.diff(index, prepend=-1))
        at = index[starts]
        known = np.abs(values) < LARGEST
        self._count[at] += np.add.reduceat(known, starts, axis=0, dtype=np.float64)
        self._sum[at] += np.add.reduceat(np.where(known, values, 0.0), starts, axis=0)
        low, high = np.where(known, values, np.inf), np.where(known, values, -np.inf)
        self._low[at] = np.minimum(self._low[at], np.minimum.reduceat(low, starts, axis=0))
        self._high[at] = np.maximum(self._high[at], np.maximum.reduceat(high, starts, axis=0))

    @property
    def curves(self) -> int:
        """Number of curves."""
        return self._count.shape[1]

    @property
    def last_steps(self) -> list[int]:
        """Last step of each bin."""
        return [min((index + 1) * self.width, self.steps) for index in range(len(self._count))]

    def means(self, curve: int) -> list[float | None]:
        """Return the mean of each bin, None for a bin without a value."""
        count = self._count[:, curve]
        return _listed(self._sum[:, curve] / np.maximum(count, 1), count)

    def lows(self, curve: int) -> list[float | None]:
        """Return the smallest value of each bin."""
        return _listed(self._low[:, curve], self._count[:, curve])

    def highs(self, curve: int) -> list[float | None]:
        """Return the largest value of each bin."""
        return _listed(self._high[:, curve], self._count[:, curve])

    def sums(self) -> Values:
        """Return the sum of each bin and curve."""
        return self._sum

    def _widen(self, bins: int, curves: int) -> None:
        more = ((0, max(0, bins - len(self._count))), (0, max(0, curves - self._count.shape[1])))
        self._count, self._sum = (np.pad(part, more) for part in (self._count, self._sum))
        self._low = np.pad(self._low, more, constant_values=np.inf)
        self._high = np.pad(self._high, more, constant_values=-np.inf)

    def _join_pairs(self) -> None:
        odd = len(self._count) % 2
        self._widen(len(self._count) + odd, 0)
        pairs: list[Any] = [
            part.reshape(len(part) // 2, 2, part.shape[1]) for part in (self._count, self._sum, self._low, self._high)
        ]
        self._count, self._sum = pairs[0].sum(1), pairs[1].sum(1)
        self._low, self._high = pairs[2].min(1), pairs[3].max(1)
        self.width *= 2


def _listed(values: Values, count: Values) -> list[float | None]:
    return [float(value) if known else None for value, known in zip(values, count, strict=True)]
