"""Causal attention inside each segment of a pack, on whatever device the pack is: the only file that knows kernels."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_GPU_DTYPES = (torch.bfloat16, torch.float16)
_GPU_HEAD_LIMIT = 256

# flash_attn alone also names the namespace that the cute kernels are installed into, without the interface below.
_HAS_FLASH_ATTN = bool(
    importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.flash_attn_interface")
)
if _HAS_FLASH_ATTN:
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

# torch 2.11 has the kernel but not the argument; a grouped head is repeated for it.
_VARLEN_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True, eq=False)
class Segments:
    """The borders of a pack's segments, made once and shared by all layers.

    `cu_seqlens` int32 `(n + 1,)`, `[0, l1, l1 + l2, ..., T]`, on the device that computes. `max_seqlen` is the longest
    segment in tokens.
    """

    cu_seqlens: Tensor
    max_seqlen: int

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each segment. Asked for on a CPU only: on a GPU it would wait for the device."""
        lengths: list[int] = self.cu_seqlens.diff().tolist()
        return lengths


# Compiled code calls it and has no part in it: borders differ from pack to pack, all else does not.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Causal attention that no token of another segment enters.

    `q` is `(T, Hq, D)`, `k` and `v` are `(T, Hkv, D)` with `Hq` a multiple of `Hkv`: query head `h` reads key head
    `h // (Hq / Hkv)`. Returns `(T, Hq, D)`. The cost is the sum of the squared segment lengths.

    Raises ValueError where the device, the dtype or the head size has no kernel that keeps segments apart. The backward
    pass is deterministic where `torch.use_deterministic_algorithms` asks for it.
    """
    if q.device.type == "cpu":
        return _attend_on_cpu(q, k, v, segments)
    if q.device.type == "cuda":
        return _attend_on_gpu(q, k, v, segments)
    raise ValueError(f"attention has kernels for cpu and cuda, not for {q.device.type}: move the model to one of these")


def _attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    if q.dtype not in _CPU_DTYPES:
        raise ValueError(f"attention on a CPU computes in {_names(_CPU_DTYPES)}, not in {q.dtype}: change the dtype")
    # split, not slicing: its backward is one concatenation, a slice's a zero tensor of the whole pack per segment.
    by_segment = zip(*(t.split_with_sizes(segments.lengths) for t in (q, k, v)), strict=True)
    return torch.cat([_attend_one(*one) for one in by_segment])


def _attend_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))  # (1, H, n, D)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def _attend_on_gpu(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    if q.dtype not in _GPU_DTYPES:
        raise ValueError(f"attention on a GPU computes in {_names(_GPU_DTYPES)}, not in {q.dtype}: change the dtype")
    if q.shape[-1] % 8 or q.shape[-1] > _GPU_HEAD_LIMIT:
        raise ValueError(
            f"attention on a GPU takes heads of a multiple of 8 up to {_GPU_HEAD_LIMIT}, not {q.shape[-1]}"
        )
    borders = (segments.cu_seqlens, segments.cu_seqlens, segments.max_seqlen, segments.max_seqlen)
    if _HAS_FLASH_ATTN:
        deterministic = torch.are_deterministic_algorithms_enabled()
        return cast(Tensor, flash_attn_varlen_func(q, k, v, *borders, causal=True, deterministic=deterministic))
    if _VARLEN_TAKES_GROUPS:
        return cast(Tensor, varlen_attn(q, k, v, *borders, window_size=(-1, 0), enable_gqa=True))
    return cast(Tensor, varlen_attn(q, repeat_heads(k, q), repeat_heads(v, q), *borders, window_size=(-1, 0)))


def repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    """`x` `(T, Hkv, D)` with each head repeated for the query heads that read it: `(T, Hq, D)`."""
    repeats = q.shape[1] // x.shape[1]
    return x.unsqueeze(2).expand(-1, -1, repeats, -1).reshape(q.shape)  # its backward is a sum: deterministic


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
