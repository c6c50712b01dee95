"""The work of a measured training step, the same for all systems: model, packs, clock, result."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from sftstream import Pack, Segment
from trainer.llama.lora.layers import LoraConfig

WARM_UP = 5
"""Steps before the measurement."""
PACKS = 4
"""Different packs of a rank, trained in turn."""
VOCABULARY = 128_256

LORA = LoraConfig(rank=16, alpha=32.0)
"""Adapters of the systems with "lora" in their names."""

SIZES = {
    "1b": (2048, 8192, 16, 32, True),
    "8b": (4096, 14336, 32, 32, False),
    "70b": (8192, 28672, 80, 64, False),
    "tiny": (64, 128, 2, 8, True),
}
"""Hidden size, size of the feed-forward, layers, query heads, tied embeddings: Llama 3.2 1B, Llama
3.1 8B and 70B, and a shape for tests."""


class Job(NamedTuple):
    """One system's measurement on `dp` x `tp` GPUs."""

    system: str
    shape: str
    layers: int | None
    capacity: int
    steps: int
    attention: str
    recompute: str = "none"
    dp: int = 1
    tp: int = 1
    accumulate: int = 1
    """Packs of a step on each data-parallel rank, for this trainer."""
    equal: bool = False
    """True if all data-parallel ranks train on the packs of the first, so that none waits for a
    longer pack of another."""

    @property
    def packs_a_step(self) -> int:
        """Packs of a step on each data-parallel rank: 1 for the peers."""
        return self.accumulate if self.system.startswith("ours") else 1


class Result(NamedTuple):
    """Median seconds of a step, peak of a GPU's allocated memory in bytes, attention kernel."""

    seconds: float
    peak: int
    attention: str


def sizes(shape: str, layers: int | None = None) -> dict[str, Any]:
    """Return the sizes of a model under the keys of `config.json`; `layers` are by default all."""
    hidden, inner, all_layers, heads, tied = SIZES[shape]
    return {
        "vocab_size": VOCABULARY if shape != "tiny" else 1024,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers or all_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "tie_word_embeddings": tied,
    }


def packs(job: Job, rank: int = 0) -> list[Pack]:
    """Return packs of conversations with log-normal lengths, filled to the capacity; each
    data-parallel `rank` has its own, unless `job.equal`."""
    draw = np.random.default_rng(0 if job.equal else rank)
    return [_pack(draw, job.capacity, sizes(job.shape)["vocab_size"]) for _ in range(PACKS)]


def _pack(draw: np.random.Generator, capacity: int, vocabulary: int) -> Pack:
    lengths: list[int] = []
    while (room := capacity - sum(lengths)) > 0:
        lengths.append(min(room, max(8, int(draw.lognormal(np.log(600) - 0.5, 1.0)))))
    trained = np.concatenate([np.arange(length) >= 0.4 * length for length in lengths])
    borders = np.cumsum([0, *lengths], dtype=np.int32)
    segments = tuple(Segment(0, row, length, 0) for row, length in enumerate(lengths))
    return Pack(draw.integers(vocabulary, size=capacity, dtype=np.int32), trained, borders, segments)


def measured(step: Callable[[int], None], steps: int, attention: str) -> Result:
    """Run steps; return the median of those after the warm-up, and the peak memory of this rank."""
    seconds = statistics.median(_timed(step, steps))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Result(seconds, peak, attention)


def _timed(step: Callable[[int], None], steps: int) -> Iterator[float]:
    """Yield the seconds from the end of a step to the end of the next, after the warm-up."""
    before = time.perf_counter()
    for number in range(WARM_UP + steps):
        step(number)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        before, began = time.perf_counter(), before
        if number >= WARM_UP:
            yield before - began
