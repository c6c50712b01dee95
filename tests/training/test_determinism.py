"""A run is deterministic, or its error names the kernel without a deterministic form."""

import re

import pytest
import torch
from tiny_llama import CONFIG, built, gradients, loss_of, pack_of

from trainer.distributed.determinism import determinism
from trainer.llama.blocks import prepare_blocks


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
