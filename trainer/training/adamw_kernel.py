"""The Triton kernel of `adamw.py`."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 2048
"""Numbers of a weight that a program updates."""


# Triton reads the annotations: only its own types may stand here. It passes floats in 32 bits, too
# few for 1 - beta, which therefore is an argument beside beta.
@triton.jit  # type: ignore[untyped-decorator]
def _update(
    weight: tl.tensor,
    gradient: tl.tensor,
    mean: tl.tensor,
    square: tl.tensor,
    step: tl.tensor,
    divisor: tl.tensor,
    count: tl.tensor,
    rate: tl.tensor,
    decay: tl.tensor,
    eps: tl.tensor,
    beta2: tl.tensor,
    rest1: tl.tensor,
    rest2: tl.tensor,
    log1: tl.tensor,
    log2: tl.tensor,
    numbers: tl.constexpr,
) -> None:
    offsets = tl.program_id(0).to(tl.int64) * numbers + tl.arange(0, numbers)
    inside = offsets < count
    steps = tl.load(step).to(tl.float64)
    correction1 = (1 - tl.exp(steps * log1)).to(tl.float32)
    correction2 = tl.sqrt(1 - tl.exp(steps * log2)).to(tl.float32)
    g = tl.load(gradient + offsets, mask=inside).to(tl.float32) / tl.load(divisor)
    m = tl.load(mean + offsets, mask=inside).to(tl.float32)
    v = tl.load(square + offsets, mask=inside).to(tl.float32)
    w = tl.load(weight + offsets, mask=inside).to(tl.float32)
    m = m + (g - m) * rest1
    v = v * beta2 + g * g * rest2
    w = w * decay - rate / correction1 * m / (tl.sqrt(v) / correction2 + eps)
    tl.store(mean + offsets, m.to(mean.dtype.element_ty), mask=inside)
    tl.store(square + offsets, v.to(square.dtype.element_ty), mask=inside)
    tl.store(weight + offsets, w.to(weight.dtype.element_ty), mask=inside)


def update(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
    divisor: Tensor,
    *,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update a weight and its two running means in place, by its gradient over `divisor`.

    `step` is the number of this step, counted from 1, and `divisor` a number, both float32 scalars.
    """
    beta1, beta2 = betas
    logarithms = (math.log(beta) if beta else -math.inf for beta in betas)
    _update[(triton.cdiv(weight.numel(), NUMBERS),)](
        weight, gradient, mean, square, step, divisor, weight.numel(), rate, 1 - rate * weight_decay, eps,
        beta2, 1 - beta1, 1 - beta2, *logarithms, NUMBERS,
    )  # fmt: skip
