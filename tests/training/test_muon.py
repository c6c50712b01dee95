"""Muon of the layers' matrices: that of torch, on any topology."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from gloo_ranks import run_ranks
from numpy.typing import NDArray
from tiny_llama import CONFIG, QWEN2
from torch.distributed.device_mesh import init_device_mesh

from trainer.llama.config import LlamaConfig
from trainer.llama.init import init_weights
from trainer.llama.model import Llama
from trainer.llama.parallel import build
from trainer.llama.sharding import gather_full
from trainer.llama.weights import unfused
from trainer.training.muon import Muon
from trainer.training.optimizer import OptimizerConfig, build_optimizer, clipped_step, global_norm, reconfigure

MUON = OptimizerConfig(kind="muon", learning_rate=0.01, weight_decay=0.1)


def gradients(model: Llama, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=draw) for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", [CONFIG, QWEN2], ids=["llama", "biases"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_each_matrix_of_hugging_face_gets_the_update_of_torch_and_all_else_that_of_adamw(
    config: LlamaConfig, clip: float | None
) -> None:
    model = Llama(config)
    init_weights(model, 0)
    theirs = {
        name: torch.nn.Parameter(t.detach().clone()) for name, t in unfused(config, dict(model.named_parameters()))
    }
    layers = [t for name, t in theirs.items() if name.startswith("model.layers.") and t.ndim == 2]
    assert len(layers) == 2 * 7
    others = [t for t in theirs.values() if not any(t is layer for layer in layers)]
    references = [
        torch.optim.Muon(layers, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([t for t in others if t.ndim > 1], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW([t for t in others if t.ndim == 1], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    optimizer = build_optimizer(model, MUON)
    for step in range(3):
        drawn = gradients(model, step)
        for name, parameter in model.named_parameters():
            parameter.grad = drawn[name].clone()  # AdamW may scale gradients in place
        norm = global_norm(model.parameters())
        clipped_step(optimizer, norm, clip)
        for name, gradient in unfused(config, drawn):
            theirs[name].grad = gradient if clip is None else gradient / norm
        for reference in references:
            reference.step()
    for name, weight in unfused(config, dict(model.named_parameters())):
        # One rounding more or less in each step, since the factor of the rate is applied apart.
        torch.testing.assert_close(
            weight, theirs[name], rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def stepped(rank: int, dp: int, tp: int) -> dict[str, NDArray[np.float32]]:
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    model = build(CONFIG, mesh, torch.device("cpu"), capacity=16)
    init_weights(model, 0)
    optimizer = build_optimizer(model, MUON)
    for factor in (0.5, -2.0):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * factor
        optimizer.step()
    return {name: gather_full(p.detach()).numpy().copy() for name, p in model.named_parameters()}


def test_every_topology_takes_the_same_step_to_the_bit() -> None:
    (expected,) = run_ranks(1, stepped, 1, 1)
    for dp, tp in ((2, 1), (1, 2)):
        for found in run_ranks(2, stepped, dp, tp):
            for name, weight in found.items():
                assert np.array_equal(weight, expected[name]), f"{name} with dp {dp}, tp {tp}"


def test_the_momentum_of_the_config_is_used_also_after_a_resume() -> None:
    model = Llama(CONFIG)
    optimizer = build_optimizer(model, msgspec.structs.replace(MUON, momentum=0.5))
    weight = model.blocks[0].mlp.down.weight
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], torch.full_like(weight, 0.5))
    reconfigure(optimizer, msgspec.structs.replace(MUON, momentum=0.75, weight_decay=0.25, betas=(0.8, 0.9)))
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], torch.full_like(weight, 0.625))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.25, 0.0]
    assert [group.get("betas") for group in optimizer.param_groups] == [None, (0.8, 0.9), (0.8, 0.9)]


def test_the_state_is_one_mean_for_a_matrix_and_two_for_other_weights() -> None:
    model = Llama(CONFIG)
    optimizer = build_optimizer(model, MUON)
    assert isinstance(optimizer, Muon)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = {name: sorted(optimizer.state[p]) for name, p in model.named_parameters()}
    assert states["blocks.0.mlp.down.weight"] == ["momentum_buffer"]
    assert {str(state) for name, state in states.items() if "norm" in name or not name.startswith("blocks")} == {
        "['exp_avg', 'exp_avg_sq', 'step']"
    }
