"""The Triton kernels of `llama/loss.py`: each reads the logits once, for any number of tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096
"""Logits that a program holds at a time."""


# Triton reads the annotations: only its own types may stand here.
@triton.jit  # type: ignore[untyped-decorator]
def _statistics(
    logits: tl.tensor, column: tl.tensor, out: tl.tensor, rows: tl.tensor, width: tl.tensor, columns: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, columns)
    largest, total = -float("inf"), 0.0
    for start in range(0, width, columns):
        scores = tl.load(logits + row * width + start + offsets, mask=start + offsets < width, other=-float("inf"))
        scores = scores.to(tl.float32)
        new = tl.maximum(largest, tl.max(scores, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(scores - new), 0)
        largest = new
    label = tl.load(column + row)
    here = (label >= 0) & (label < width)
    picked = tl.load(logits + row * width + label, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row, largest)
    tl.store(out + rows + row, total)
    tl.store(out + 2 * rows + row, picked)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(
    logits: tl.tensor,
    column: tl.tensor,
    log_total: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    width: tl.tensor,
    has_factor: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * columns + tl.arange(0, columns)
    place, inside = logits + row * width + offsets, offsets < width
    scores = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    softmax = tl.exp(scores - tl.load(log_total + row))
    if has_factor:
        softmax = softmax * tl.load(factor + row)
    gradient = tl.where(offsets == tl.load(column + row), softmax - 1.0, softmax) * tl.load(scale + row)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(numbers: tl.tensor, factor: tl.tensor, count: tl.tensor, columns: tl.constexpr) -> None:
    offsets = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, columns)
    place, inside = numbers + offsets, offsets < count
    product = tl.load(place, mask=inside).to(tl.float32) * tl.load(factor)
    tl.store(place, product.to(numbers.dtype.element_ty), mask=inside)


def statistics(logits: Tensor, column: Tensor) -> Tensor:
    """Return `(3, n)` fp32, as `loss.plain_statistics` does."""
    rows, width = logits.shape
    out = torch.empty(3, rows, device=logits.device)
    _statistics[(rows,)](logits, column, out, rows, width, COLUMNS, num_warps=8)
    return out


def gradient(logits: Tensor, column: Tensor, log_total: Tensor, scale: Tensor, factor: Tensor | None) -> Tensor:
    """Return the gradient of `logits` in their memory, as `loss.plain_gradient` computes it."""
    rows, width = logits.shape
    given = scale if factor is None else factor  # a kernel needs a tensor, read only with `has_factor`
    _gradient[(rows, triton.cdiv(width, COLUMNS))](
        logits, column, log_total, scale, given, width, factor is not None, COLUMNS, num_warps=8
    )
    return logits


def multiply(numbers: Tensor, factor: Tensor) -> Tensor:
    """Return `numbers` in their memory, multiplied by the fp32 scalar `factor`.

    `mul_` of torch reads one number at a time here, because the dtypes differ: 0.9 ms more for the
    head's gradient in Llama 3.2 1B.
    """
    count = numbers.numel()
    _multiply[(triton.cdiv(count, COLUMNS),)](numbers, factor, count, COLUMNS, num_warps=8)
    return numbers
