"""Matrix products in float8 with one scale for each tensor (Micikevicius et al. 2022,
arXiv:2209.05433).

A tensor is multiplied by the factor that brings its largest absolute number to the limit of the
format, rounded, and multiplied as 8-bit numbers; the product is divided by both factors. Factors
come from the tensor itself (dynamic scaling), so that nothing is kept from step to step.

| product         | left, format   | right, format |
|-----------------|----------------|---------------|
| output          | input, e4m3    | weight, e4m3  |
| input gradient  | upstream, e5m2 | weight, e4m3  |
| weight gradient | upstream, e5m2 | input, e4m3   |

Example: the numbers 1, -2 and 7 have the factor 448 / 7 = 64 in e4m3, and become 64, -128 and 448,
without rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.llama.config import LlamaConfig, uneven

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""Sizes of a matrix must be multiples of this for the GPU's float8 products."""
CAPABILITY = (8, 9)
"""First compute capability of a GPU with float8 products."""
SMALLEST = 1e-12
"""Least largest number of a tensor that counts, so that a tensor of zeros has a finite factor."""


class Scaled(NamedTuple):
    """A matrix in float8, and the float32 scalar by which its numbers are to be multiplied."""

    values: Tensor
    scale: Tensor


def require_device(device: torch.device) -> None:
    """Raise ValueError for a GPU without float8 products."""
    if device.type == "cuda" and (has := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise ValueError(
            f"run.float8 needs a GPU of compute capability {_dotted(CAPABILITY)}, such as an H100, and "
            f"{torch.cuda.get_device_name(device)} has {_dotted(has)}; remove run.float8"
        )


def require_multiples(config: LlamaConfig, tp: int) -> None:
    """Raise ValueError if a matrix of the layers on a rank of `tp` has no size for float8."""
    # Rows: of gate and up twice the columns of down, of qkv these more than the heads' columns.
    keys_and_values = 2 * config.num_key_value_heads * config.head_size // tp
    rows = {"2 x num_key_value_heads x head_dim / tp": keys_and_values}
    if sizes := uneven(config.columns(tp) | rows, MULTIPLE):
        raise ValueError(
            f"run.float8 needs multiples of {MULTIPLE}: {sizes}; remove run.float8"
            + (", or lower parallel.tp" if tp > 1 else "")
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return the product of `x`, `(T, columns)`, with `weight`, `(rows, columns)`: `(T, rows)`.

    The result has the dtype of `x`. The columns and rows of `weight` are multiples of 16.
    """
    product: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Fast sums have fewer bits: exact enough for outputs, but not for gradients, as in torchao.
        return _product(quantize(x, E4M3), _transposed(quantize(weight, E4M3)), x.dtype, fast_sums=True)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        down = quantize(_padded(upstream), E5M2)
        x_gradient = weight_gradient = None
        if wants_x:
            x_gradient = _product(down, _by_columns(quantize(weight, E4M3)), x.dtype)[: len(x)]
        if wants_weight:
            right = _by_columns(quantize(_padded(x), E4M3))
            weight_gradient = _product(_transposed(_by_columns(down)), right, weight.dtype)
        return x_gradient, weight_gradient


def quantize(x: Tensor, dtype: torch.dtype) -> Scaled:
    """Return `x` in float8, with the numbers spread over the range of `dtype`.

    A number in `x` that is not finite makes every product with the result NaN.
    """
    limit = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=SMALLEST) / limit
    return Scaled((x.float() / scale).clamp(-limit, limit).to(dtype), scale)


def _product(left: Scaled, right: Scaled, dtype: torch.dtype, *, fast_sums: bool = False) -> Tensor:
    """Return the matrix product of `left`, stored by rows, and `right`, stored by columns."""
    # Not F.scaled_mm, which torch 2.11 cannot compile.
    found: Tensor = torch._scaled_mm(
        left.values, right.values, left.scale, right.scale, out_dtype=dtype, use_fast_accum=fast_sums
    )
    return found


def _transposed(matrix: Scaled) -> Scaled:
    return Scaled(matrix.values.t(), matrix.scale)


def _by_columns(matrix: Scaled) -> Scaled:
    """Return the same matrix, stored by columns."""
    return Scaled(matrix.values.t().contiguous().t(), matrix.scale)


def _padded(x: Tensor) -> Tensor:
    """Return `x` with rows of zeros up to a multiple of 16."""
    return F.pad(x, (0, 0, 0, -len(x) % MULTIPLE))
