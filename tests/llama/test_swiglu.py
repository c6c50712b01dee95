"""The gated feed-forward computes silu(gate) * up, and its gradient is that of autograd."""

import pytest
import torch
from torch.nn import functional as F

from trainer.llama.swiglu import swiglu, tile


@pytest.mark.parametrize("block", [1, 3, 6])
def test_output_and_gradient_equal_those_of_the_definition(block: int) -> None:
    ours, plain = (torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    upstream = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    columns = torch.arange(12).unflatten(0, (-1, 2, block))  # gate and up alternate by block
    expected = F.silu(plain[:, columns[:, 0].flatten()]) * plain[:, columns[:, 1].flatten()]
    found = swiglu(ours, block)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-6, atol=1e-6)


def test_double_precision_is_kept() -> None:
    gate_up = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: swiglu(x, 2), (gate_up,))


def test_the_kernel_takes_powers_of_two_that_divide_a_block() -> None:
    assert [tile(block) for block in (1024, 1792, 3584, 128, 96, 2048)] == [1024, 256, 512, 128, None, 1024]
