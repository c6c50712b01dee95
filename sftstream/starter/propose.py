"""Choose the first settings of a run from a sample of its data and from the hardware."""

from __future__ import annotations

import math
import re
from pathlib import Path

import msgspec

from sftstream.starter.hardware import Hardware
from sftstream.starter.look import Look

MODELS = (
    ("Qwen/Qwen2.5-7B-Instruct", 7.6e9),
    ("Qwen/Qwen2.5-1.5B-Instruct", 1.5e9),
    ("Qwen/Qwen2.5-0.5B-Instruct", 0.5e9),
)
"""Models with an open licence that the trainer loads, the largest first, with their parameters."""
CPU_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BYTES_PER_PARAMETER = 22
"""Memory of a run for each parameter: 16 bytes for weights, gradients and optimizer, and room for
activations. Only chooses a model; the trainer's estimate then decides whether it fits."""
LEAST_CAPACITY, MOST_CAPACITY = {False: 512, True: 8192}, {False: 4096, True: 32768}
"""Limits of the capacity without and with a GPU. A GPU needs large packs to be busy."""
LONG = 0.995
"""Share of the conversations that should fit into a pack."""
STEPS_OF_AN_EPOCH = 50
"""Optimizer steps that an epoch should have at least."""
FEW_ROWS = 10_000
"""Rows below which three epochs are proposed instead of two."""


class Proposal(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a first config."""

    name: str
    model: str
    capacity: int
    global_batch: int
    epochs: int
    workers: int
    tp: int
    learning_rate: float
    warmup: int
    every: int
    """Steps between checkpoints."""
    max_refused: float | None
    """None for the default of `data.max_refused`."""


def choose_model(hardware: Hardware) -> str:
    """Return the largest model of `MODELS` that the GPUs should hold, or a small one for a CPU."""
    if not hardware.gpus:
        return CPU_MODEL
    fitting = (name for name, size in MODELS if size * BYTES_PER_PARAMETER <= hardware.total)
    return next(fitting, MODELS[-1][0])


def propose(look: Look, model: str, context: int | None, width: int | None, hardware: Hardware, tp: int) -> Proposal:
    """Return the settings for a source.

    `context` is the number of positions that the model was made for, `width` the size of its hidden
    state; None if its config does not tell.
    """
    ranks = max(1, hardware.gpus // tp)
    capacity = _capacity(look, context, gpu=bool(hardware.gpus))
    packs = max(1, look.tokens // capacity)
    global_batch = _batch(packs, ranks)
    epochs = 3 if look.rows < FEW_ROWS else 2
    steps = max(1, packs * epochs // global_batch)
    share = len(look.refused) / look.sampled
    return Proposal(
        name=_name(look.path),
        model=model,
        capacity=capacity,
        global_batch=global_batch,
        epochs=epochs,
        workers=2 if hardware.gpus else 1,
        tp=tp,
        learning_rate=1e-5 if (width or 0) >= 4096 else 2e-5 if (width or 0) >= 1024 else 1e-4,
        warmup=max(1, min(100, steps // 20)),
        every=max(1, min(200, steps // 5)),
        max_refused=min(1.0, math.ceil(share * 12.5) / 10) if share > 0.05 else None,
    )


def _capacity(look: Look, context: int | None, *, gpu: bool) -> int:
    """Return the smallest power of two that holds nearly all conversations and several of most."""
    least, most = LEAST_CAPACITY[gpu], MOST_CAPACITY[gpu]
    if context is not None:
        most = max(16, min(most, 2 ** int(math.log2(context))))
    wanted = max(look.length(LONG), 4 * look.length(0.5), least)
    return int(min(most, 2 ** math.ceil(math.log2(wanted))))


def _batch(packs: int, ranks: int) -> int:
    """Return a multiple of `ranks` of at most 64 packs that leaves an epoch enough steps."""
    batch = ranks
    while 2 * batch <= min(64, packs // STEPS_OF_AN_EPOCH):
        batch *= 2
    return batch


def _name(path: str) -> str:
    stem = Path(path.rstrip("/")).name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:40] or "run"
