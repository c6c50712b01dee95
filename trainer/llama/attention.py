"""Causal attention inside each segment of a pack; the only file that knows attention kernels.

`attend` checks the inputs and calls the kernel in `KERNELS` for the device:

| device | kernel                                             | dtypes           | head sizes     |
|--------|----------------------------------------------------|------------------|----------------|
| cpu    | torch scaled_dot_product_attention on each segment | fp32, fp64, bf16 | any            |
| cuda   | flash-attn's varlen function if installed          | bf16, fp16       | 8, 16, ... 256 |
| cuda   | torch varlen_attn otherwise                        | bf16, fp16       | 8, 16, ... 256 |

To add a kernel, write a function `(q, k, v, segments) -> out` with the shapes of `attend`, and
make the function the `run` of a device's `Kernel` in `KERNELS`, with dtypes and head sizes. Between
several kernels of a device the import decides, as for "cuda". A kernel must guarantee:

- Segments are isolated: no bit of an output or gradient depends on another segment, and a query
  reads no later key. For `cu_seqlens = [0, 3, 5]` query 4 reads keys 3 and 4, query 3 reads key 3.
- The backward pass is deterministic when `torch.use_deterministic_algorithms(True)` is set: equal
  inputs give equal bits.
- Query head `h` reads key and value head `h // (Hq / Hkv)`; scores are scaled by `1 / sqrt(D)`.
- Memory grows with the pack, not with the square of the pack: no `(T, T)` mask.
- The entry in `KERNELS` states every supported dtype and head size: `attend` raises ValueError for
  the rest, without a fallback to a slower kernel.

tests/llama/test_attention.py checks these guarantees on a CPU, tests/training/test_gpu.py on a GPU.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

# The name flash_attn alone proves nothing: the package of the cute kernels installs into the same
# namespace, without the interface below.
_HAS_FLASH_ATTN = bool(
    importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.flash_attn_interface")
)
if _HAS_FLASH_ATTN:
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

# torch 2.11 has the kernel but not the argument; key and value heads are repeated for that version.
_VARLEN_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True, eq=False)
class Segments:
    """The segment borders of a pack, made once and shared by all layers.

    `cu_seqlens` is int32 `(n + 1,)`, `[0, l1, l1 + l2, ..., T]`, on the device of the model.
    `max_seqlen` is the length of the longest segment in tokens.
    """

    cu_seqlens: Tensor
    max_seqlen: int

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each segment. For CPU kernels only: on a GPU the copy waits for the device."""
        lengths: list[int] = self.cu_seqlens.diff().tolist()
        return lengths


class Kernel(NamedTuple):
    """An attention function for one device, with its limits."""

    run: Callable[[Tensor, Tensor, Tensor, Segments], Tensor]
    dtypes: tuple[torch.dtype, ...]
    head_sizes: range


# Excluded from compilation: borders differ from pack to pack, and would compile the model again.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Return causal attention computed within each segment, `(T, Hq, D)`.

    `q` is `(T, Hq, D)`, `k` and `v` are `(T, Hkv, D)` with `Hq` a multiple of `Hkv`. The cost is
    the sum of the squared segment lengths.

    Raises ValueError if the device has no kernel, or if the kernel does not support the dtype or
    the head size.
    """
    device, head_size = q.device.type, q.shape[-1]
    if device not in KERNELS:
        raise ValueError(f"attention has kernels for {' and '.join(KERNELS)}, not for {device}: move the model to one")
    kernel = KERNELS[device]
    if q.dtype not in kernel.dtypes:
        raise ValueError(
            f"attention on {device} computes in {', '.join(map(_dtype_name, kernel.dtypes))}, not in "
            f"{_dtype_name(q.dtype)}: set the compute dtype to one of these"
        )
    if head_size not in kernel.head_sizes:
        sizes = kernel.head_sizes
        raise ValueError(
            f"attention on {device} takes head sizes {sizes[0]}, {sizes[1]}, ..., {sizes[-1]}, not {head_size}: "
            "train this model on a CPU"
        )
    return kernel.run(q, k, v, segments)


def _sdpa_per_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    # split, not slicing: the backward pass of split is one concatenation, while each slice would
    # fill a zero tensor of the size of the pack.
    by_segment = zip(*(t.split_with_sizes(segments.lengths) for t in (q, k, v)), strict=True)
    return torch.cat([_sdpa(*heads) for heads in by_segment])


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))  # (1, H, n, D)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    deterministic = torch.are_deterministic_algorithms_enabled()
    out = flash_attn_varlen_func(q, k, v, *_borders(segments), causal=True, deterministic=deterministic)
    return cast(Tensor, out)


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    causal = (-1, 0)  # a window without limit to the left, closed to the right
    if _VARLEN_TAKES_GROUPS:
        return cast(Tensor, varlen_attn(q, k, v, *_borders(segments), window_size=causal, enable_gqa=True))
    k, v = repeat_heads(k, q), repeat_heads(v, q)
    return cast(Tensor, varlen_attn(q, k, v, *_borders(segments), window_size=causal))


def _borders(segments: Segments) -> tuple[Tensor, Tensor, int, int]:
    """Return borders and longest segment of queries and keys, the arguments of varlen kernels."""
    return segments.cu_seqlens, segments.cu_seqlens, segments.max_seqlen, segments.max_seqlen


KERNELS = {
    "cpu": Kernel(
        run=_sdpa_per_segment,
        dtypes=(torch.float32, torch.float64, torch.bfloat16),
        head_sizes=range(1, sys.maxsize),
    ),
    "cuda": Kernel(
        run=_flash_attn if _HAS_FLASH_ATTN else _torch_varlen,
        dtypes=(torch.bfloat16, torch.float16),
        head_sizes=range(8, 256 + 1, 8),
    ),
}
"""The kernel of each device type."""


def repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    """Return `x` `(T, Hkv, D)` with each head repeated for its query heads, `(T, Hq, D)`."""
    repeats = q.shape[1] // x.shape[1]
    return x.unsqueeze(2).expand(-1, -1, repeats, -1).reshape(q.shape)  # the backward pass is a sum: deterministic


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
