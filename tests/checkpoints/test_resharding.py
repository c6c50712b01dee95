"""The trainer's model and optimizers load to the bit under any change of topology."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_ranks import run_ranks
from test_checkpoint_ranks import frozen
from tiny_llama import CONFIG, TIED
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh

from checkpoints import CheckpointStore
from trainer.checkpointing.snapshot import _tensors
from trainer.llama.config import LlamaConfig
from trainer.llama.init import init_weights
from trainer.llama.model import Llama
from trainer.llama.parallel import parallelize
from trainer.training.optimizer import OptimizerConfig, build_optimizer

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.randrange(10**9))
COUNT = int(os.environ.get("SFTSTREAM_TOPOLOGIES") or 6)
"""Number of random topologies."""
TOPOLOGIES = [(dp, tp) for dp in (1, 2, 3) for tp in (1, 2)]


def trained(
    seed: int, dp: int, tp: int, config: LlamaConfig, kind: str = "adamw"
) -> tuple[Llama, torch.optim.Optimizer]:
    """Return model and optimizer after two steps with gradients similar to the weights."""
    with torch.device("meta"):
        model = Llama(config)
    parallelize(model, init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp")), capacity=16)
    model.to_empty(device="cpu")
    model.tie()
    init_weights(model, seed)
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind, learning_rate=0.01 / (seed + 1), weight_decay=0.1))
    for factor in (0.5, -2.0):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * factor
        optimizer.step()
    return model, optimizer


def save(rank: int, root: Path, dp: int, tp: int, config: LlamaConfig, kind: str) -> Any:
    state = _tensors(*trained(0, dp, tp, config, kind))
    CheckpointStore(root).save(2, state)
    return frozen(state)


def load_all(rank: int, roots: list[Path], dp: int, tp: int, config: LlamaConfig, kind: str) -> list[Any]:
    """Return the state after loading each root over another state."""
    return [load(root, *trained(1, dp, tp, config, kind)) for root in roots]


def load(root: Path, model: Llama, optimizer: torch.optim.Optimizer) -> Any:
    state = _tensors(model, optimizer)
    store = CheckpointStore(root)
    assert store.latest() == 2
    store.load(2, state)
    set_model_state_dict(model, get_model_state_dict(model) | state["model"])  # a tied head is not saved
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return frozen(_tensors(model, optimizer))


def assert_each_loads_all(
    top: Path, topologies: list[tuple[int, int]], config: LlamaConfig, kind: str = "adamw"
) -> None:
    roots = [top / f"dp{dp} tp{tp}" for dp, tp in topologies]
    saved = [
        run_ranks(dp * tp, save, root, dp, tp, config, kind)[0]
        for root, (dp, tp) in zip(roots, topologies, strict=True)
    ]
    assert sum(key.endswith(("exp_avg", "momentum_buffer")) for key in _keys(saved[0])) > 10
    for dp, tp in topologies:
        for loaded in run_ranks(dp * tp, load_all, roots, dp, tp, config, kind):
            assert loaded == saved, f"loaded under dp {dp}, tp {tp}"


def _keys(state: Any, prefix: str = "") -> list[str]:
    if not isinstance(state, dict):
        return [prefix]
    return [key for name, item in state.items() for key in _keys(item, f"{prefix}.{name}")]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_model_and_optimizer_are_the_same_under_other_tensor_and_data_parallel_sizes(tmp_path: Path, kind: str) -> None:
    assert_each_loads_all(tmp_path, [(2, 1), (1, 2)], CONFIG, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_each_of_six_topologies_loads_what_each_saved(tmp_path: Path, config: LlamaConfig, kind: str) -> None:
    drawn = random.Random(SEED).sample(TOPOLOGIES, COUNT)
    print(f"SFTSTREAM_SEED={SEED} SFTSTREAM_TOPOLOGIES={COUNT}: {drawn}")
    assert_each_loads_all(tmp_path, drawn, config, kind)
