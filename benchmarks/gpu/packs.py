"""Packs of random tokens for benchmarks that need no data."""

from __future__ import annotations

import numpy as np

from sftstream import Pack, Segment
from trainer.llama.model import LlamaConfig


def random_packs(shape: LlamaConfig, capacity: int, count: int) -> list[Pack]:
    """Return different packs of 1 to 64 conversations, 60 % of the tokens trained."""
    draw = np.random.default_rng(0)
    packs = []
    for number in range(count):
        cuts = np.sort(draw.permutation(capacity - 1)[: number % 64]) + 1
        borders = np.array([0, *cuts, capacity], np.int32)
        segments = tuple(Segment(0, row, length, 0) for row, length in enumerate(np.diff(borders).tolist()))
        ids = draw.integers(shape.vocab_size, size=capacity, dtype=np.int32)
        packs.append(Pack(ids, draw.random(capacity) < 0.6, borders, segments))
    return packs
