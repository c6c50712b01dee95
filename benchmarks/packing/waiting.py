"""Simulate how long ranks wait for the rank with the largest sum of squared lengths.

    python benchmarks/packing/waiting.py

Packs of equal capacity cost equal matrix products, but attention costs the sum of squared lengths
of a pack's segments. With sharded weights every rank gathers every layer for every pack, so all
ranks wait for the heaviest of the packs that run at the same time. Plans packs from lengths of real
conversations if SFTSTREAM_REALDATA names a directory with them, else from log-normal lengths, and
draws the packs of each rank at random. Prints one table: the share of a step that a rank of a
Llama 3.1 8B waits, in the order of reading -> with each rank's packs of a step from the heaviest
to the lightest.
"""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray
from packing import benchmark_lengths

from sftstream.streaming.packing import plan_window

RANKS, PACKS = (8, 64, 512), (1, 4, 8)
WEIGHTS, LAYERS, WIDTH = 7.5e9, 32, 4096
"""Weights in matrices, layers and width of Llama 3.1 8B."""
ATTENTION_SPEED = 0.6
"""Assumed speed of attention kernels, relative to matrix products."""
PACKS_DRAWN = 20_000


def attention_of_packs(lengths: list[int], capacity: int, window: int = 256) -> NDArray[np.float64]:
    """Return the attention time of each planned pack, relative to the matrix products of a pack.

    A causal segment of n tokens takes 2 * n ** 2 * WIDTH operations in a layer, and 2.5 times as
    many in the backward pass.
    """
    sums, left = [], list[int]()
    for first in range(0, len(lengths), window):
        pool = [*left, *lengths[first : first + window]]
        plan = plan_window(pool, capacity, [False] * len(pool))
        sums += [sum(pool[index] ** 2 for index in pack) for pack in plan.packs]
        left = [pool[index] for index in plan.left]
    return np.array(sums) * 3.5 * 2 * WIDTH * LAYERS / ATTENTION_SPEED / (6 * WEIGHTS * capacity)


def waiting(attention: NDArray[np.float64], ranks: int, packs: int, *, sort: bool) -> float:
    """Return the mean share of a step that a rank waits, for `packs` packs of each rank."""
    draw = np.random.default_rng(0)
    steps = max(8, PACKS_DRAWN // (ranks * packs))
    drawn = draw.choice(attention, (steps, ranks, packs))
    if sort:
        drawn = np.sort(drawn, axis=2)
    slowest = 1 + drawn.max(axis=1)
    return float(1 - (1 + drawn.mean(axis=1)).sum() / slowest.sum())


def main() -> None:
    """Print the table."""
    lengths, kind = benchmark_lengths(12_000)
    random.Random(0).shuffle(lengths)
    print(f"{len(lengths):,} conversations ({kind})\n")
    columns = " | ".join(f"{packs} pack{'s' if packs > 1 else ''} of a rank" for packs in PACKS)
    print(f"| capacity | ranks | {columns} |\n|---|---|{'---|' * len(PACKS)}")
    for capacity in (8192, 16384):
        attention = attention_of_packs([length for length in lengths if length <= capacity], capacity)
        for ranks in RANKS:
            cells = [
                f"{waiting(attention, ranks, packs, sort=False):.1%} -> {waiting(attention, ranks, packs, sort=True):.1%}"
                for packs in PACKS
            ]
            print(f"| {capacity} | {ranks} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
