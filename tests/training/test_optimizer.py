"""AdamW and gradient clipping."""

import importlib.util
import math

import msgspec
import pytest
import torch
from tiny_llama import CONFIG
from torch import nn

from trainer.llama.model import Llama
from trainer.training.adamw import AdamW
from trainer.training.adamw8bit import require_torchao
from trainer.training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    clipped_step,
    global_norm,
    gradient_norms,
)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\)"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), not 1.0"),
        ({"learning_rate": -1.0}, "learning_rate -1.0"),
        ({"clip": 0.0}, "clip 0.0 must be above 0"),
        ({"eps": 0.0}, "eps 0.0"),
        ({"z_loss": -1e-4}, "z_loss -0.0001 must be finite and not negative"),
    ],
)
def test_an_invalid_optimizer_is_refused(table: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**table)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_a_run_that_needs_torchao_is_refused_without_it() -> None:
    with pytest.raises(
        ValueError, match=r'"adamw8bit" needs torchao; install it with: pip install "sftstream\[torchao\]"'
    ):
        require_torchao()


def test_a_clip_of_infinity_can_be_written_in_a_file() -> None:
    assert msgspec.toml.decode("clip = inf", type=OptimizerConfig).clip == math.inf


def test_one_step_follows_the_adamw_paper_and_decays_matrices_only() -> None:
    model = Llama(CONFIG)
    for parameter in model.parameters():
        parameter.data.fill_(2.0)
        parameter.grad = torch.full_like(parameter, 0.5)
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.01)
    build_optimizer(model, config).step()
    # After one step the corrected moments are the gradient and its square: a change of
    # learning_rate * 0.5 / 0.5.
    for name, parameter in model.named_parameters():
        decayed = 2.0 if "norm" in name else 2.0 * (1 - 0.1 * 0.01)
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, decayed - 0.1), rtol=1e-6, atol=0)


def with_gradients(*values: list[float], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(value), dtype=dtype)) for value in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor(value, dtype=dtype)
    return parameters


def stepped(parameters: list[nn.Parameter], limit: float | None) -> list[torch.Tensor]:
    """Take a clipped step; return the gradients that the optimizer took."""
    optimizer = AdamW(parameters, betas=(0.5, 0.5), fused=True)
    clipped_step(optimizer, global_norm(parameters), limit)
    return [2 * optimizer.state[parameter]["exp_avg"] for parameter in parameters]


def test_a_gradient_longer_than_the_limit_is_cut_to_it() -> None:
    first, second = stepped(with_gradients([3.0], [0.0, 4.0]), 1.0)
    torch.testing.assert_close(first, torch.tensor([0.6]))
    torch.testing.assert_close(second, torch.tensor([0.0, 0.8]))


@pytest.mark.parametrize("limit", [5.0, 6.0, math.inf, None])
def test_a_gradient_within_the_limit_keeps_its_bits(limit: float | None) -> None:
    assert [g.tolist() for g in stepped(with_gradients([3.0], [0.0, 4.0]), limit)] == [[3.0], [0.0, 4.0]]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_returned(value: float) -> None:
    assert not math.isfinite(global_norm(with_gradients([3.0], [value])))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_the_norms_of_the_parameters_tell_the_broken_gradient(value: float) -> None:
    parameters = [nn.Parameter(torch.ones(2)), *with_gradients([3.0, 4.0], [1.0, value])]
    norms = gradient_norms(parameters)
    assert norms.parameters == [1, 2]
    ((numbers, values),) = norms.parts
    assert (numbers, values[0].item(), values[1].isfinite().item()) == ([1, 2], 5.0, False)


def test_the_norm_of_bfloat16_gradients_is_summed_in_fp32() -> None:
    # bfloat16 has no number between 64 and 64.5.
    parameters = with_gradients([1.0] * 4128, dtype=torch.bfloat16)
    assert global_norm(parameters).item() == pytest.approx(math.sqrt(4128), rel=1e-6)


def test_a_parameter_without_a_gradient_does_not_count() -> None:
    parameters = [*with_gradients([3.0, 4.0]), nn.Parameter(torch.ones(2))]
    assert global_norm(iter(parameters)) == 5.0
    assert global_norm(parameters[2:]) == 0.0
