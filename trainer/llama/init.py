"""Initial weights with equal bits on every topology and device."""

from __future__ import annotations

import hashlib
import math

import torch

from trainer.llama.lora.layers import A, B
from trainer.llama.model import Llama
from trainer.llama.sharding import local, window


@torch.no_grad()
def init_weights(model: Llama, seed: int) -> None:
    """Set norms to 1, biases to 0, and matrices to draws from normal(0, initializer_range).

    Adapters stay as they are.

    The draws of a matrix depend only on `seed` and on the name of the parameter. Each rank draws
    the full tensor on the CPU and keeps its shard, so the bits do not depend on topology or
    device. The cost is host memory for one full tensor at a time.
    """
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in (A, B):
            continue
        full = torch.full(parameter.shape, 0.0 if name.endswith(".bias") else 1.0)
        if parameter.ndim > 1:
            full.normal_(0.0, model.config.initializer_range, generator=_generator(seed, name))
        local(parameter).copy_(full[window(parameter)])


@torch.no_grad()
def init_adapters(model: Llama, seed: int) -> None:
    """Set each `lora_B` to 0, and each `lora_A` to draws from uniform(-1/sqrt(n), 1/sqrt(n)).

    `n` is the number of columns, so that the distribution is peft's. Drawn as in `init_weights`.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(f".{B}"):
            local(parameter).zero_()
        elif name.endswith(f".{A}"):
            bound = 1 / math.sqrt(parameter.shape[1])
            full = torch.empty(parameter.shape).uniform_(-bound, bound, generator=_generator(seed, name))
            local(parameter).copy_(full[window(parameter)])


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
