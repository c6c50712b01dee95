"""Attention kernels: segments isolated, equal to the definition, unsupported input refused."""

import math
import re
from typing import Any

import pytest
import torch
from tiny_llama import segments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.distributed.determinism import determinism
from trainer.llama import attention
from trainer.llama.attention import KERNELS, ORDER, Segments, Shape, attend, choose_kernel, prove, repeat_heads

LENGTHS = (7, 1, 12, 4)


def heads(tokens: int, query: int, key: int, size: int, **kind: Any) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    made = (torch.randn(tokens, n, size, generator=draw).to(**kind) for n in (query, key, key))
    return tuple(x.requires_grad_() for x in made)


def by_definition(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible = (segment[:, None] == segment[None]) & torch.ones(len(segment), len(segment)).tril().bool()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(("query", "key", "size"), [(4, 4, 8), (6, 2, 8), (4, 1, 6), (1, 1, 2)])
def test_outputs_and_gradients_equal_the_definition_of_attention(query: int, key: int, size: int) -> None:
    ours, expected = heads(24, query, key, size), heads(24, query, key, size)
    weight = torch.randn(24, query, size)
    out = attend(*ours, segments(*LENGTHS))
    reference = by_definition(*expected, LENGTHS)
    (out * weight).sum().backward()
    (reference * weight).sum().backward()
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-6)
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=2e-6)


def test_a_segment_gets_no_gradient_from_another() -> None:
    q, k, v = heads(24, 4, 2, 8)
    attend(q, k, v, segments(*LENGTHS))[8:20].sum().backward()
    for x in (q, k, v):
        assert x.grad[8:20].any()
        assert not x.grad[:8].any()
        assert not x.grad[20:].any()


def test_many_segments_allocate_no_square_of_the_pack() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = op(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, Tensor):
                    self.elements = max(self.elements, x.numel())
            return out

    q, k, v = heads(512, 2, 1, 4)
    with Largest() as largest:
        attend(q, k, v, segments(*[16] * 32)).sum().backward()
    assert largest.elements == 512 * 2 * 4  # the queries; one head's square would be 262,144


@pytest.mark.parametrize(
    ("name", "device", "dtype", "size", "message"),
    [
        (None, "meta", torch.float32, 8, 'attention "sdpa" has kernels for cpu and cuda, not for meta'),
        (None, "cpu", torch.float16, 8, '"sdpa" computes in float32, float64, bfloat16, not in float16'),
        (None, "cuda", torch.float32, 8, '"torch" computes in bfloat16, float16, not in float32'),
        (None, "cuda", torch.bfloat16, 12, 'takes head sizes 8, 16, ..., 256, not 12: set run.attention = "auto"'),
        (None, "cuda", torch.bfloat16, 264, "head sizes 8, 16, ..., 256, not 264"),
        ("fa4", "cpu", torch.bfloat16, 8, 'attention "fa4" has kernels for cuda, not for cpu'),
    ],
)
def test_a_device_dtype_or_head_size_without_a_kernel_is_refused(
    name: str | None, device: str, dtype: torch.dtype, size: int, message: str
) -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(24, 2, size, device=device, dtype=dtype) for _ in range(3))
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, segments(*LENGTHS), KERNELS[name] if name else None)


@pytest.mark.parametrize("takes_groups", [True, False])
def test_grouped_heads_reach_torch_varlen_with_or_without_grouping(
    takes_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *borders: Any, window_size: tuple[int, int], **options: bool) -> Tensor:
        calls.append((tuple(k.shape), borders[2:], window_size, options))
        return q

    monkeypatch.setattr(attention, "_VARLEN_TAKES_GROUPS", takes_groups)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    with FakeTensorMode():
        q = torch.empty(24, 4, 8, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(24, 2, 8, device="cuda", dtype=torch.bfloat16)
        assert attend(q, k, k, segments(*LENGTHS)).shape == q.shape
    expected = ((24, 2, 8), {"enable_gqa": True}) if takes_groups else ((24, 4, 8), {})
    assert calls == [(expected[0], (12, 12), (-1, 0), expected[1])]


SHAPE = Shape(tokens=500, queries=4, groups=2, size=8)
RIGHT = KERNELS["sdpa"].load()
CPU = torch.device("cpu")


def across_segments(q: Tensor, k: Tensor, v: Tensor, packed: Segments) -> Tensor:
    whole = Segments(packed.cu_seqlens[[0, -1]], len(q))
    # Right in the short segments, outputs and gradients, that are compared with the definition.
    return torch.cat((RIGHT(q, k, v, packed)[:136], RIGHT(q, k.detach(), v.detach(), whole)[136:]))


def without_scale(q: Tensor, k: Tensor, v: Tensor, packed: Segments) -> Tensor:
    return RIGHT(q * math.sqrt(q.shape[-1]), k, v, packed)


def with_other_groups(q: Tensor, k: Tensor, v: Tensor, packed: Segments) -> Tensor:
    return RIGHT(q, k.flip(1), v.flip(1), packed)


def seeing_later_keys(q: Tensor, k: Tensor, v: Tensor, packed: Segments) -> Tensor:
    return torch.cat(
        [
            torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in heads), enable_gqa=True
            )[0].transpose(0, 1)
            for heads in zip(*(x.split_with_sizes(packed.lengths) for x in (q, k, v)), strict=True)
        ]
    )


class Jitter(torch.autograd.Function):
    """The identity, with a gradient that differs from call to call."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        Jitter.calls += 1
        return upstream * (1 + 1e-6 * Jitter.calls)


def jittering(q: Tensor, k: Tensor, v: Tensor, packed: Segments) -> Tensor:
    return RIGHT(Jitter.apply(q), k, v, packed)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (across_segments, "a segment depends on another segment"),
        (without_scale, "differs from the definition"),
        (with_other_groups, "differs from the definition"),
        (seeing_later_keys, "differs from the definition"),
        (jittering, "two backward passes differ"),
    ],
)
def test_a_kernel_that_breaks_a_guarantee_is_passed_over_with_the_reason(
    run: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = KERNELS["sdpa"]._replace(name="fa2", load=lambda: run)
    monkeypatch.setitem(KERNELS, "fa2", broken)
    monkeypatch.setitem(ORDER, "cpu", ("fa2", "sdpa"))
    with determinism(True):
        kernel, passed = choose_kernel("auto", SHAPE, CPU, torch.float32)
        assert kernel.name == "sdpa"
        assert len(passed) == 1
        assert reason in passed[0]
        with pytest.raises(
            ValueError, match=f'no attention kernel can be used: "fa2": .*{reason}.*; set run.attention'
        ):
            choose_kernel("fa2", SHAPE, CPU, torch.float32)
    if run is jittering:
        assert choose_kernel("auto", SHAPE, CPU, torch.float32)[0].name == "fa2"


def test_a_named_kernel_whose_package_is_missing_is_refused_before_its_import() -> None:
    for module in ("no_such_package", "no_such_package.part", "json.no_such_part"):
        message = (
            f'attention "fa3" is not installed (no module {module}); set run.attention = "auto" for the fastest kernel '
            "that can be used"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            KERNELS["fa3"]._replace(module=module).require_installed()
    KERNELS["fa3"]._replace(module="json.decoder").require_installed()
    KERNELS["sdpa"].require_installed()


def test_a_kernel_without_memory_for_its_proof_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setitem(KERNELS, "fa2", KERNELS["sdpa"]._replace(name="fa2", load=lambda: full))
    monkeypatch.setitem(ORDER, "cpu", ("fa2", "sdpa"))
    with pytest.raises(torch.OutOfMemoryError):
        choose_kernel("auto", SHAPE, CPU, torch.float32)


@pytest.mark.parametrize("tokens", [24, 139, 140, 141, 137_000])
def test_a_proof_cuts_a_pack_of_any_size_into_segments(tokens: int) -> None:
    lengths = attention._lengths(tokens)
    assert sum(lengths) == tokens
    assert min(lengths) > 0
    assert len(lengths) >= 3


@pytest.mark.parametrize("tokens", [24, 200])
def test_the_kernel_of_a_cpu_proves_itself_in_every_dtype(tokens: int) -> None:
    for dtype in KERNELS["sdpa"].dtypes:
        prove(KERNELS["sdpa"], SHAPE._replace(tokens=tokens), CPU, dtype)


def test_a_kernel_whose_package_is_missing_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Any:
        import no_such_package

        return no_such_package

    missing = KERNELS["sdpa"]._replace(name="fa4", load=load)
    monkeypatch.setitem(KERNELS, "fa4", missing)
    monkeypatch.setitem(ORDER, "cpu", ("fa4", "sdpa"))
    kernel, passed = choose_kernel("auto", SHAPE, CPU, torch.float32)
    assert (kernel.name, passed) == ("sdpa", ['"fa4" is not installed (no module no_such_package)'])


def test_repeated_heads_give_the_bits_of_grouped_heads() -> None:
    q, k, v = heads(24, 6, 2, 8)
    grouped = attend(q, k, v, segments(*LENGTHS))
    assert torch.equal(repeat_heads(k, q), k.repeat_interleave(3, dim=1))
    assert torch.equal(attend(q, repeat_heads(k, q), repeat_heads(v, q), segments(*LENGTHS)), grouped)
