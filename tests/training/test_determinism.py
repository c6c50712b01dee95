"""A run is deterministic, or its error names the kernel without a deterministic form."""

import os
import re

import pytest
import torch
from gloo_ranks import run_ranks
from tiny_llama import CONFIG, built, gradients, loss_of, pack_of, trained_loss_of

from trainer.comparison import CAPACITY, random_pack
from trainer.distributed.determinism import determinism
from trainer.distributed.mesh import ParallelConfig, Topology, data_and_tensor_mesh, distributed
from trainer.llama.blocks import prepare_blocks
from trainer.training.step import label_losses
from trainer.training.warm_up import warm_up


def overwritten_twice() -> torch.Tensor:
    return torch.zeros(5).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))


def test_a_kernel_without_a_deterministic_form_is_named() -> None:
    message = f"the kernel put_ has no deterministic form in torch {torch.__version__}; set run.deterministic = false"
    with pytest.raises(ValueError, match=re.escape(message)), determinism(True):
        overwritten_twice()


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="must match the size"), determinism(True):
        torch.zeros(2) + torch.zeros(3)


def test_determinism_is_off_unless_wanted_and_is_reset_at_the_end() -> None:
    with determinism(False):
        assert overwritten_twice()[1] in (1.0, 2.0)
    with determinism(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()


def test_compiled_layers_give_the_same_bits_each_time() -> None:
    found = []
    with determinism(True):
        for _ in range(2):
            torch._dynamo.reset()
            model = built(CONFIG)
            prepare_blocks(model, recompute="selective", compiled=True)
            loss_of(model, pack_of(9, 14, 9)).backward()
            found.append(gradients(model))
        assert torch._inductor.config.deterministic
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def after_another_first_pack(rank: int) -> None:
    parallel = ParallelConfig()
    topology = Topology(data_and_tensor_mesh("cpu", parallel), torch.device("cpu"), parallel)
    found = []
    with determinism(True):
        for first in (pack_of(32, seed=1), pack_of(*[4] * 8, seed=2)):
            torch._dynamo.reset()
            model = built(CONFIG)
            prepare_blocks(model, recompute="none", compiled=True)
            warm_up(model, 32, topology)
            assert all(parameter.grad is None for parameter in model.parameters())
            trained_loss_of(model, first).backward()
            model.zero_grad()
            trained_loss_of(model, pack_of(9, 14, 9)).backward()
            found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_compiled_code_does_not_depend_on_the_first_pack() -> None:
    run_ranks(1, after_another_first_pack, timeout=300)


def evaluated_after_the_warm_up(rank: int) -> None:
    parallel = ParallelConfig()
    topology = Topology(data_and_tensor_mesh("cpu", parallel), torch.device("cpu"), parallel)
    model = built(CONFIG)
    prepare_blocks(model, recompute="none", compiled=True)
    warm_up(model, CAPACITY, topology, evaluates=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in range(3):
        label_losses(model, random_pack(CONFIG.vocab_size, seed), topology.device)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_the_warm_up_compiles_the_code_of_validation_too() -> None:
    """The first validation after a resume may be of other packs than the run's first."""
    run_ranks(1, evaluated_after_the_warm_up, timeout=300)


def test_a_group_of_one_leaves_the_environment_as_it_was() -> None:
    before = dict(os.environ)
    with distributed("cpu", ParallelConfig()):
        assert os.environ["WORLD_SIZE"] == "1"
    assert dict(os.environ) == before
