"""The Triton kernel of `llama/swiglu.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


# Triton reads the annotations: only its own types may stand here.
@triton.jit  # type: ignore[untyped-decorator]
def _gradient(
    gate_up: tl.tensor,
    upstream: tl.tensor,
    out: tl.tensor,
    inner: tl.tensor,
    block: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * columns
    offsets = tl.arange(0, columns)
    place = row * 2 * inner + (start // block) * 2 * block + start % block + offsets
    gate = tl.load(gate_up + place).to(tl.float32)
    up = tl.load(gate_up + place + block).to(tl.float32)
    arriving = tl.load(upstream + row * inner + start + offsets).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(out + place, (arriving * up * share * (1 + gate * (1 - share))).to(out.dtype.element_ty))
    tl.store(out + place + block, (arriving * gate * share).to(out.dtype.element_ty))


def gradient(gate_up: Tensor, upstream: Tensor, block: int, columns: int) -> Tensor:
    """Return the gradient of `gate_up`; `columns` is a power of two that divides `block`."""
    out = torch.empty_like(gate_up)
    rows, inner = upstream.shape
    _gradient[(rows, inner // columns)](gate_up, upstream, out, inner, block, columns)
    return out
