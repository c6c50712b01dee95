"""Products in float8 are those of the rounded matrices, and layers differ from bf16 by rounding."""

from __future__ import annotations

import msgspec
import pytest
import tiny_llama
import torch
from torch import Tensor

from trainer.llama.blocks import prepare_blocks
from trainer.llama.float8 import E4M3, E5M2, linear, quantize, require_multiples
from trainer.llama.model import Llama

SHAPE = msgspec.structs.replace(tiny_llama.CONFIG, head_dim=16, intermediate_size=64)


def _numbers(rows: int, columns: int, choices: list[float], limit: float) -> Tensor:
    """Return random numbers of `choices`, the first replaced by `limit`: their factor is 1."""
    draw = torch.Generator().manual_seed(rows)
    found = torch.tensor(choices)[torch.randint(len(choices), (rows, columns), generator=draw)]
    found[0, 0] = limit
    return found


@pytest.mark.parametrize("rows", [16, 32, 5, 37], ids="{} rows".format)
def test_numbers_that_float8_holds_give_exact_products_and_gradients(rows: int) -> None:
    x = _numbers(rows, 32, [-15.0, -7.0, 0.0, 1.0, 13.0], 448.0).requires_grad_()
    weight = _numbers(48, 32, [-3.0, 0.0, 5.0, 14.0], -448.0).requires_grad_()
    upstream = _numbers(rows, 48, [-1.75, 0.0, 1.0, 2.5], 57344.0)
    out = linear(x, weight)
    out.backward(upstream)
    assert torch.equal(out, x @ weight.t())
    assert torch.equal(x.grad, upstream @ weight)
    assert torch.equal(weight.grad, upstream.t() @ x)


@pytest.mark.parametrize(("dtype", "limit", "error"), [(E4M3, 448.0, 2**-4), (E5M2, 57344.0, 2**-3)])
def test_the_largest_number_of_a_tensor_becomes_the_limit_of_the_format(
    dtype: torch.dtype, limit: float, error: float
) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 1e-3
    found = quantize(x, dtype)
    assert found.values.float().abs().max() == limit
    assert found.scale == x.abs().max() / limit
    large = x.abs() > x.abs().max() / 100
    ratio = (found.values.float() * found.scale / x)[large]
    assert (ratio - 1).abs().max() <= error


def test_zeros_stay_zeros_and_what_is_not_finite_spreads() -> None:
    weight = torch.eye(16)
    assert torch.equal(linear(torch.zeros(3, 16), weight), torch.zeros(3, 16))
    for bad in (float("nan"), float("inf")):
        x = torch.ones(3, 16)
        x[1, 1] = bad
        assert not linear(x, weight).isfinite().all()


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(32, 16)
    linear(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_only_the_layers_of_the_blocks_multiply_in_float8() -> None:
    model = _model()
    chosen = {name for name, module in model.named_modules() if getattr(module, "float8", False)}
    layers = ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")
    assert chosen == {f"blocks.{number}.{layer}" for number in range(2) for layer in layers}


def _model(float8: bool = True) -> Llama:
    model = tiny_llama.built(SHAPE)
    prepare_blocks(model, recompute="none", compiled=False, float8=float8)
    return model


@pytest.mark.parametrize("positions", [None, [3, 4, 5, 11, 12]], ids=["all tokens", "trained tokens"])
def test_a_model_in_float8_differs_from_float32_by_rounding(positions: list[int] | None) -> None:
    pack = tiny_llama.pack_of(9, 7)
    places = None if positions is None else torch.tensor(positions)
    labels = pack.labels if places is None else pack.labels[places]
    gradients, losses = [], []
    for float8 in (True, False):
        model = _model(float8)
        loss = model(pack.input_ids, pack.position_ids, pack.segments, places, labels)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


def test_sizes_that_are_no_multiples_of_16_are_refused_by_name() -> None:
    require_multiples(SHAPE, 2)
    with pytest.raises(ValueError, match=r"^run.float8 needs multiples of 16: hidden_size = 40; remove run.float8$"):
        require_multiples(msgspec.structs.replace(SHAPE, hidden_size=40), 1)
    with pytest.raises(ValueError, match=r"intermediate_size / tp = 8; remove run.float8, or lower parallel.tp$"):
        require_multiples(msgspec.structs.replace(SHAPE, intermediate_size=32), 4)
