"""Attention kernels: segments isolated, equal to the definition, unsupported input refused."""

import math
from typing import Any

import pytest
import torch
from tiny_llama import segments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.llama import attention
from trainer.llama.attention import KERNELS, attend, repeat_heads

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
    ("device", "dtype", "size", "message"),
    [
        ("meta", torch.float32, 8, "kernels for cpu and cuda, not for meta"),
        ("cpu", torch.float16, 8, "attention on cpu computes in float32, float64, bfloat16, not in float16"),
        ("cuda", torch.float32, 8, "attention on cuda computes in bfloat16, float16, not in float32"),
        ("cuda", torch.bfloat16, 12, "head sizes 8, 16, ..., 256, not 12"),
        ("cuda", torch.bfloat16, 264, "head sizes 8, 16, ..., 256, not 264"),
    ],
)
def test_a_device_dtype_or_head_size_without_a_kernel_is_refused(
    device: str, dtype: torch.dtype, size: int, message: str
) -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(24, 2, size, device=device, dtype=dtype) for _ in range(3))
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, segments(*LENGTHS))


@pytest.mark.parametrize("takes_groups", [True, False])
def test_grouped_heads_reach_torch_varlen_with_or_without_grouping(
    takes_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *borders: Any, window_size: tuple[int, int], **options: bool) -> Tensor:
        calls.append((tuple(k.shape), borders[2:], window_size, options))
        return q

    varlen = KERNELS["cuda"]._replace(run=attention._torch_varlen)
    monkeypatch.setitem(KERNELS, "cuda", varlen)
    monkeypatch.setattr(attention, "_VARLEN_TAKES_GROUPS", takes_groups)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    with FakeTensorMode():
        q = torch.empty(24, 4, 8, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(24, 2, 8, device="cuda", dtype=torch.bfloat16)
        assert attend(q, k, k, segments(*LENGTHS)).shape == q.shape
    expected = ((24, 2, 8), {"enable_gqa": True}) if takes_groups else ((24, 4, 8), {})
    assert calls == [(expected[0], (12, 12), (-1, 0), expected[1])]


def test_repeated_heads_give_the_bits_of_grouped_heads() -> None:
    q, k, v = heads(24, 6, 2, 8)
    grouped = attend(q, k, v, segments(*LENGTHS))
    assert torch.equal(repeat_heads(k, q), k.repeat_interleave(3, dim=1))
    assert torch.equal(attend(q, repeat_heads(k, q), repeat_heads(v, q), segments(*LENGTHS)), grouped)
