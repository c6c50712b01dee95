"""Causal attention inside each segment of a pack; the only file that knows attention kernels.

| name  | package                                 | devices   | dtypes           | head sizes     |
|-------|-----------------------------------------|-----------|------------------|----------------|
| fa4   | flash-attn-4 (`flash_attn.cute`)        | cuda      | bf16, fp16       | 8, 16, ... 256 |
| fa3   | flash-attn-3 (`flash_attn_interface`)   | cuda      | bf16, fp16       | 8, 16, ... 256 |
| fa2   | flash-attn (`flash_attn`)               | cuda      | bf16, fp16       | 8, 16, ... 256 |
| torch | torch's own FlashAttention 2            | cuda      | bf16, fp16       | 8, 16, ... 256 |
| sdpa  | torch, one segment at a time            | cpu, cuda | fp32, fp64, bf16 | any            |

`choose_kernel` returns the first kernel of `ORDER` that is installed and proves itself on the
device. To add a kernel, write a function that imports the package and returns a function `(q, k, v,
segments) -> out` with the shapes of `attend`, and add a `Kernel` with its limits. A kernel must
guarantee, and `prove` tests on packs of the run's own shape:

- Segments are isolated: no bit of an output or gradient depends on another segment, and a query
  reads no later key. For `cu_seqlens = [0, 3, 5]` query 4 reads keys 3 and 4, query 3 reads key 3.
- The backward pass is deterministic when `torch.use_deterministic_algorithms(True)` is set: equal
  inputs give equal bits.
- Query head `h` reads key and value head `h // (Hq / Hkv)`; scores are scaled by `1 / sqrt(D)`.
- Memory grows with the pack, not with the square of the pack: no `(T, T)` mask.
- The entry in `KERNELS` states every supported dtype and head size: `attend` raises ValueError for
  the rest.

tests/llama/test_attention.py checks these guarantees on a CPU, tests/training/test_gpu.py on a GPU.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from sftstream import cache_directory

# torch 2.11 has the kernel but not the argument; key and value heads are repeated for that version.
_VARLEN_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters

KernelName = Literal["fa4", "fa3", "fa2", "torch", "sdpa"]

FAILURES = (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError)
"""Errors of a package that is missing, or that does not support the device or the shape."""


class Unproven(ValueError):
    """A kernel fails its test; the run passes over it."""


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
        """Tokens of each segment. For "sdpa" only: on a GPU the copy waits for the device."""
        lengths: list[int] = self.cu_seqlens.diff().tolist()
        return lengths


Attend = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]


class Kernel(NamedTuple):
    """An attention function with its limits."""

    name: KernelName
    load: Callable[[], Attend]
    """Import the package and return the function; a missing package raises ImportError."""
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_sizes: range
    module: str | None = None
    """Module that `load` imports from another package than torch."""

    def require_installed(self) -> None:
        """Raise ValueError if the package is missing; the package is not imported."""
        if self.module is None:
            return
        package = self.module.partition(".")[0]
        if not find_spec(package) or not find_spec(self.module):
            raise ValueError(
                f'attention "{self.name}" is not installed (no module {self.module}); set run.attention = "auto" for '
                "the fastest kernel that can be used"
            )

    def require(self, device: torch.device, dtype: torch.dtype, head_size: int) -> None:
        """Raise ValueError if the kernel does not support device, dtype or head size."""
        if device.type not in self.devices:
            raise ValueError(
                f'attention "{self.name}" has kernels for {" and ".join(self.devices)}, not for {device.type}: '
                'set run.attention = "auto"'
            )
        if dtype not in self.dtypes:
            raise ValueError(
                f'attention "{self.name}" computes in {", ".join(map(_dtype_name, self.dtypes))}, not in '
                f"{_dtype_name(dtype)}: set run.compute_dtype to one of these"
            )
        if head_size not in self.head_sizes:
            sizes = self.head_sizes
            raise ValueError(
                f'attention "{self.name}" takes head sizes {sizes[0]}, {sizes[1]}, ..., {sizes[-1]}, not {head_size}: '
                'set run.attention = "auto"'
            )


class Shape(NamedTuple):
    """The attention of a pack on one rank."""

    tokens: int
    queries: int
    """Query heads."""
    groups: int
    """Key and value heads."""
    size: int
    """Channels of a head."""


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, kernel: Kernel | None = None) -> Tensor:
    """Return causal attention computed within each segment, `(T, Hq, D)`.

    `q` is `(T, Hq, D)`, `k` and `v` are `(T, Hkv, D)` with `Hq` a multiple of `Hkv`. The cost is
    the sum of the squared segment lengths. Without a `kernel` the last of the device's kernels that
    needs no package computes: "torch" on a GPU, "sdpa" elsewhere.

    Raises ValueError if the kernel does not support device, dtype or head size.
    """
    kernel = kernel or KERNELS["torch" if q.device.type == "cuda" else "sdpa"]
    kernel.require(q.device, q.dtype, q.shape[-1])
    return kernel.load()(q, k, v, segments)


def choose_kernel(
    wanted: KernelName | Literal["auto"], shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[Kernel, list[str]]:
    """Return the kernel of a run, and a reason for each faster kernel that was passed over.

    "auto" is the first kernel of `ORDER` that is installed and passes `prove`; a name is that
    kernel or an error. Raises ValueError if no wanted kernel can be used, and
    `torch.OutOfMemoryError` if a proof has no memory.
    """
    if wanted != "auto":
        KERNELS[wanted].require(device, dtype, shape.size)  # an error with a remedy of its own
    passed: list[str] = []
    for name in ORDER[device.type] if wanted == "auto" else (wanted,):
        try:
            KERNELS[name].require(device, dtype, shape.size)
            if name != "sdpa" or device.type == "cuda":  # on a CPU "sdpa" is the definition itself
                prove(KERNELS[name], shape, device, dtype)
            return KERNELS[name], passed
        except torch.OutOfMemoryError:
            raise  # another kernel would be chosen by the memory that is free at the moment
        except ModuleNotFoundError as error:
            passed.append(f'"{name}" is not installed (no module {error.name})')
        except FAILURES as error:
            passed.append(f'"{name}": {str(error).strip() or type(error).__name__}'.splitlines()[0])
    raise ValueError(
        f"no attention kernel can be used: {'; '.join(passed)}"
        + (
            "; install another version of torch"
            if wanted == "auto"
            else '; set run.attention = "auto" for the fastest kernel that can'
        )
    )


def prove(kernel: Kernel, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    """Run a kernel on a random pack of `shape`, and raise ValueError for a broken guarantee.

    Compares outputs and gradients of short segments with "sdpa" in fp32, and the bits of all
    segments before and after a change of one segment. Under deterministic algorithms two backward
    passes must give equal bits.
    """
    lengths = _lengths(shape.tokens)
    start, stop = sum(lengths[:2]), sum(lengths[:3])
    draw = torch.Generator(device).manual_seed(0)
    heads = (shape.queries, shape.groups, shape.groups, shape.queries)  # q, k, v and the gradient of the output
    inputs = [torch.randn(shape.tokens, n, shape.size, device=device, generator=draw).to(dtype) for n in heads]
    borders = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    segments = Segments(borders, max(lengths))
    found = _outcome(kernel, inputs, segments)

    short = Segments(borders[:4], max(lengths[:3]))
    expected = _outcome(KERNELS["sdpa"], [part[:stop].float() for part in inputs], short)
    for ours, exact in zip(found, expected, strict=True):
        error = ((ours[:stop].float() - exact).abs().max() / exact.abs().max()).item()
        if not error <= _ROUNDING.get(dtype, 1e-4):
            raise Unproven(f"it differs from the definition of attention by {error:.2g} of the largest value")

    deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic and not all(map(torch.equal, found, _outcome(kernel, inputs, segments))):
        raise Unproven("two backward passes differ; run.deterministic = true needs equal bits")
    changed = [part.clone() for part in inputs]
    for part in changed:
        part[start:stop] *= -0.5
    # Without determinism gradients differ by themselves, and only the output can be compared.
    for before, after in zip(found[: None if deterministic else 1], _outcome(kernel, changed, segments), strict=False):
        if not (torch.equal(before[:start], after[:start]) and torch.equal(before[stop:], after[stop:])):
            raise Unproven("a segment depends on another segment of the pack")


_ROUNDING = {torch.bfloat16: 0.02, torch.float16: 0.004}
"""Allowed error relative to the largest value; 1e-4 in other dtypes."""


def _lengths(tokens: int) -> list[int]:
    """Return the segment lengths of a proof: three short segments, then longer segments.

    Example: 1,000 tokens make segments of 5, 1, 130, 300 and 564 tokens.
    """
    if tokens < 140:
        return [1, 1, tokens - 2]
    lengths = [5, 1, 130]
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, 300 * (len(lengths) - 2)))
    return lengths


def _outcome(kernel: Kernel, inputs: list[Tensor], segments: Segments) -> list[Tensor]:
    """Return the output and the gradients of `inputs`: q, k, v and the gradient of the output."""
    q, k, v = (part.detach().requires_grad_() for part in inputs[:3])
    out = kernel.load()(q, k, v, segments)
    out.backward(inputs[3])
    return [out.detach(), *(cast(Tensor, part.grad) for part in (q, k, v))]


def _attend_by(varlen: Callable[..., Any]) -> Attend:
    """Return the attention of a FlashAttention package, whose versions differ in the result: a
    tensor, or a tuple that begins with the tensor."""

    def run(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        out = varlen(q, k, v, **_named_borders(segments), **_options())
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)

    return run


def keep_compiled_kernels() -> None:
    """Set the environment variables with which FlashAttention-4 keeps its compiled kernels.

    The package compiles them at the first call, 10 s that a cache saves later starts. Its default
    directory lies in /tmp, where another user could have placed code.
    """
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache_directory() / "flash-attention"))


@cache
def _load_fa4() -> Attend:
    keep_compiled_kernels()
    from flash_attn.cute import flash_attn_varlen_func

    return _attend_by(flash_attn_varlen_func)


@cache
def _load_fa3() -> Attend:
    from flash_attn_interface import flash_attn_varlen_func

    return _attend_by(flash_attn_varlen_func)


@cache
def _load_fa2() -> Attend:
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    return _attend_by(flash_attn_varlen_func)


def _options() -> dict[str, bool]:
    return {"causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}


def _named_borders(segments: Segments) -> dict[str, Any]:
    """Return borders and longest segment under the argument names of FlashAttention."""
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, _borders(segments), strict=True))


def _borders(segments: Segments) -> tuple[Tensor, Tensor, int, int]:
    return segments.cu_seqlens, segments.cu_seqlens, segments.max_seqlen, segments.max_seqlen


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    causal = (-1, 0)  # a window without limit to the left, closed to the right
    if _VARLEN_TAKES_GROUPS:
        return cast(Tensor, varlen_attn(q, k, v, *_borders(segments), window_size=causal, enable_gqa=True))
    k, v = repeat_heads(k, q), repeat_heads(v, q)
    return cast(Tensor, varlen_attn(q, k, v, *_borders(segments), window_size=causal))


def repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    """Return `x` `(T, Hkv, D)` with each head repeated for its query heads, `(T, Hq, D)`."""
    repeats = q.shape[1] // x.shape[1]
    return x.unsqueeze(2).expand(-1, -1, repeats, -1).reshape(q.shape)  # the backward pass is a sum: deterministic


def _sdpa_per_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    # split, not slicing: the backward pass of split is one concatenation, while each slice would
    # fill a zero tensor of the size of the pack.
    by_segment = zip(*(t.split_with_sizes(segments.lengths) for t in (q, k, v)), strict=True)
    return torch.cat([_sdpa(*heads) for heads in by_segment])


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))  # (1, H, n, D)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_HALF, _FLASH_SIZES = (torch.bfloat16, torch.float16), range(8, 256 + 1, 8)

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("fa4", _load_fa4, ("cuda",), _HALF, _FLASH_SIZES, "flash_attn.cute"),
        Kernel("fa3", _load_fa3, ("cuda",), _HALF, _FLASH_SIZES, "flash_attn_interface"),
        Kernel("fa2", _load_fa2, ("cuda",), _HALF, _FLASH_SIZES, "flash_attn.flash_attn_interface"),
        Kernel("torch", lambda: _torch_varlen, ("cuda",), _HALF, _FLASH_SIZES),
        Kernel(
            "sdpa",
            lambda: _sdpa_per_segment,
            ("cpu", "cuda"),
            (torch.float32, torch.float64, torch.bfloat16),
            range(1, sys.maxsize),
        ),
    )
}
"""All kernels by name."""

ORDER: dict[str, tuple[KernelName, ...]] = {"cuda": ("fa4", "fa3", "fa2", "torch", "sdpa"), "cpu": ("sdpa",)}
"""The kernels of each device type, the fastest first."""
