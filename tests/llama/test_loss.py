"""The loss is the cross-entropy summed over trained tokens only."""

import pytest
import torch
from gloo_ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from trainer.llama.loss import summed_cross_entropy


def scores(rows: int = 12, columns: int = 20, scale: float = 3.0) -> torch.Tensor:
    return (scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))).requires_grad_()


def labels(*untrained: int, rows: int = 12, columns: int = 20) -> torch.Tensor:
    drawn = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(1))
    drawn[list(untrained)] = -100
    return drawn


def test_two_tokens_give_the_loss_and_gradients_computed_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0], [9.0, 9.0]], requires_grad=True)
    loss = summed_cross_entropy(logits, torch.tensor([0, 1, -100]))
    loss.backward()
    # log 2, and log(1 + e^-2)
    assert loss.item() == pytest.approx(0.6931472 + 0.1269280, abs=1e-6)
    expected = torch.tensor([[-0.5, 0.5], [0.1192029, -0.1192029], [0.0, 0.0]])
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-6)


def worked_example(rank: int) -> tuple[float, list[float]]:
    """Return the loss and the local gradient of the example in trainer/llama/loss.py."""
    local = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[rank].log()[None].requires_grad_()
    logits = DTensor.from_local(local, init_device_mesh("cpu", (2,)), [Shard(1)])
    loss = summed_cross_entropy(logits, torch.tensor([2]))
    loss.backward()
    return loss.item(), local.grad[0].tolist()


def test_two_ranks_compute_the_worked_example_of_a_split_vocabulary() -> None:
    (first_loss, first_gradient), (second_loss, second_gradient) = run_ranks(2, worked_example)
    assert first_loss == second_loss == pytest.approx(1.2040, abs=1e-4)  # ln 10/3
    assert first_gradient == pytest.approx([0.1, 0.2])
    assert second_gradient == pytest.approx([0.3 - 1, 0.4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_equal_those_of_torch_in_fp32(dtype: torch.dtype) -> None:
    ours, theirs = (scores().detach().to(dtype).requires_grad_() for _ in range(2))
    loss = summed_cross_entropy(ours, labels(0, 3, 4))
    expected = F.cross_entropy(theirs.float(), labels(0, 3, 4), reduction="sum")
    (0.25 * loss).backward()
    (0.25 * expected).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert ours.grad.dtype == dtype
    rounding = 1e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=rounding)


def test_logits_of_untrained_tokens_change_no_bit_of_the_loss() -> None:
    logits, changed = scores().detach(), scores().detach()
    changed[[0, 3]] += 100.0
    assert torch.equal(summed_cross_entropy(logits, labels(0, 3)), summed_cross_entropy(changed, labels(0, 3)))


def test_loss_and_gradients_are_exactly_zero_without_a_trained_token() -> None:
    logits = scores()
    loss = summed_cross_entropy(logits, labels(*range(12)))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(12, 20))


def test_the_loss_is_exactly_zero_without_a_token() -> None:
    logits = torch.empty(0, 20, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == (0, 20)


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = summed_cross_entropy(logits, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 2e4
    assert torch.equal(logits.grad, torch.tensor([[0.0, 0.0], [-1.0, 1.0]]))


def test_the_logits_are_not_modified() -> None:
    logits = scores()
    before = logits.detach().clone()
    summed_cross_entropy(logits, labels(2)).backward()
    assert torch.equal(logits, before)
