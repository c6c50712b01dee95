"""Curves of any length in a bounded number of bins, equal for any portions."""

from __future__ import annotations

import math
import os
import random
from itertools import pairwise

import numpy as np
import pytest

from trainer.report.bins import MOST_BINS, Bins

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.randrange(10**9))
DRAWS = int(os.environ.get("SFTSTREAM_DRAWS") or 20)


def filled(steps: list[int], values: list[list[float]], cuts: list[int]) -> Bins:
    bins = Bins(len(values[0]))
    for first, last in pairwise([0, *cuts, len(steps)]):
        bins.add(np.array(steps[first:last], np.int64), np.array(values[first:last]).reshape(-1, len(values[0])))
    return bins


@pytest.mark.parametrize("number", range(DRAWS))
def test_bins_hold_mean_and_extremes_of_their_steps_however_the_steps_arrive(number: int) -> None:
    print(f"seed {SEED}, draw {number}")
    draw = random.Random(f"{SEED}/{number}")
    count = draw.choice([1, 3, 511, 512, 513, 1500, 5000])
    steps = sorted(draw.sample(range(1, count * draw.choice([1, 1, 3]) + 1), count))
    values = [[draw.choice([draw.gauss(0, 1), math.nan, 1e3, math.inf]), float(step)] for step in steps]
    cuts = sorted(draw.randrange(count + 1) for _ in range(draw.randrange(6)))
    bins = filled(steps, values, cuts)

    width = bins.width
    assert width & (width - 1) == 0
    assert width == 1 or steps[-1] > MOST_BINS * width // 2
    assert steps[-1] <= MOST_BINS * width
    found: dict[int, list[list[float]]] = {}
    for step, row in zip(steps, values, strict=True):
        found.setdefault((step - 1) // width, []).append(row)
    assert len(bins.last_steps) == max(found) + 1 <= MOST_BINS
    assert bins.last_steps[-1] == steps[-1]
    for curve in (0, 1):
        for index, (mean, low, high) in enumerate(
            zip(bins.means(curve), bins.lows(curve), bins.highs(curve), strict=True)
        ):
            known = [row[curve] for row in found.get(index, []) if math.isfinite(row[curve])]
            if not known:
                assert (mean, low, high) == (None, None, None)
                continue
            assert (low, high) == (min(known), max(known))
            assert mean == pytest.approx(math.fsum(known) / len(known), rel=1e-12)


def test_fewer_or_more_curves_than_before_leave_the_others_without_a_value() -> None:
    bins = Bins(0)
    for step, row in enumerate(([1.0, 2.0], [], [3.0], [4.0, 5.0, 6.0]), 1):
        bins.add(np.array([step]), np.array([row]))
    assert bins.means(0) == [1.0, None, 3.0, 4.0]
    assert bins.means(1) == [2.0, None, None, 5.0]
    assert bins.means(2) == [None, None, None, 6.0]


def test_a_million_steps_are_1024_or_fewer_numbers_for_each_curve() -> None:
    bins = Bins(1)
    for first in range(1, 10**6, 10**5):
        steps = np.arange(first, first + 10**5)
        bins.add(steps, steps[:, None].astype(float))
    assert (bins.width, len(bins.last_steps)) == (2048, 489)
    assert bins.means(0)[0] == 1024.5
    assert (bins.lows(0)[-1], bins.highs(0)[-1]) == (999_425, 1_000_000)
