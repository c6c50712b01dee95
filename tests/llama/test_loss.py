"""The loss of a head is the cross-entropy summed over trained tokens only, however it is cut."""

from typing import Any

import pytest
import torch
from gloo_ranks import run_ranks
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.llama import loss as module
from trainer.llama.loss import Vocabulary, chunk_rows, head_loss

ONE = torch.ones(())


def scores(rows: int = 12, columns: int = 20, scale: float = 3.0) -> Tensor:
    return (scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))).requires_grad_()


def labels(*untrained: int, rows: int = 12, columns: int = 20) -> Tensor:
    drawn = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(1))
    drawn[list(untrained)] = -100
    return drawn


def loss_of(logits: Tensor, labels: Tensor, scale: Tensor = ONE) -> Tensor:
    """Return the loss of a head whose logits are its hidden states."""
    return head_loss(logits, torch.eye(logits.shape[1], dtype=logits.dtype), labels, scale)


def head(rows: int = 24, hidden: int = 16, columns: int = 40) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(rows, hidden, generator=draw), torch.randn(columns, hidden, generator=draw)


def test_two_tokens_give_the_loss_and_gradients_computed_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0], [9.0, 9.0]], requires_grad=True)
    loss = loss_of(logits, torch.tensor([0, 1, -100]))
    loss.backward()
    # log 2, and log(1 + e^-2)
    assert loss.item() == pytest.approx(0.6931472 + 0.1269280, abs=1e-6)
    expected = torch.tensor([[-0.5, 0.5], [0.1192029, -0.1192029], [0.0, 0.0]])
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-6)


def worked_example(rank: int) -> tuple[float, list[float]]:
    """Return the loss and this rank's gradient of the logits of the example in loss.py."""
    ids = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[rank].log()
    # The hidden state is 1, so that a column's weight is its logit, and has the logit's gradient.
    weight = ids[:, None].requires_grad_()
    vocabulary = Vocabulary(2 * rank, torch.distributed.group.WORLD)
    loss = head_loss(torch.ones(1, 1), weight, torch.tensor([2]), ONE, vocabulary)
    loss.backward()
    return loss.item(), weight.grad[:, 0].tolist()


def test_two_ranks_compute_the_worked_example_of_a_split_vocabulary() -> None:
    (first_loss, first_gradient), (second_loss, second_gradient) = run_ranks(2, worked_example)
    assert first_loss == second_loss == pytest.approx(1.2040, abs=1e-4)  # ln 10/3
    assert first_gradient == pytest.approx([0.1, 0.2])
    assert second_gradient == pytest.approx([0.3 - 1, 0.4])


@pytest.mark.parametrize("rows_at_a_time", [24, 12, 7, 1])
def test_any_cut_gives_the_loss_and_gradients_of_torch(rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_LOGITS", rows_at_a_time * 40 * 4)
    (hidden, weight), targets = head(), labels(0, 3, 4, rows=24, columns=40)
    ours, theirs = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    loss = head_loss(*ours, targets, torch.tensor(0.25))
    expected = 0.25 * F.cross_entropy(theirs[0] @ theirs[1].t(), targets, reduction="sum")
    (2 * loss).backward()
    (2 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for found, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.grad, exact.grad, rtol=0, atol=1e-6 * exact.grad.abs().max().item() + 1e-6)


Z_LOSS = 1e-2


@pytest.mark.parametrize("rows_at_a_time", [24, 7])
@pytest.mark.parametrize("level", [0.0, -60.0])
def test_the_z_loss_and_its_gradients_are_those_of_its_formula(
    rows_at_a_time: int, level: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A level of -60 makes the factor 1 + 2 * coefficient * log Z negative."""
    monkeypatch.setattr(module, "MOST_LOGITS", rows_at_a_time * 40 * 4)
    (hidden, weight), targets = head(), labels(0, 3, 4, rows=24, columns=40)
    # The last hidden number is 1 and its weight the level, which each logit has then beside.
    hidden[:, -1], weight[:, -1] = 1.0, level
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    theirs = [x.double().requires_grad_() for x in (hidden, weight)]
    found = head_loss(*ours, targets, torch.tensor(0.25), z_loss=Z_LOSS)
    logits = theirs[0] @ theirs[1].t()
    cross_entropy = 0.25 * F.cross_entropy(logits, targets, reduction="sum")
    z_loss = 0.25 * Z_LOSS * logits.logsumexp(1)[targets >= 0].square().sum()
    torch.testing.assert_close(found, torch.stack((cross_entropy, z_loss)).float(), rtol=1e-6, atol=0)
    (2 * found.sum()).backward()
    (2 * (cross_entropy + z_loss)).backward()
    for mine, exact in zip(ours, theirs, strict=True):
        scale = exact.grad.abs().max().item()
        torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=0, atol=1e-6 * scale)


def test_the_length_of_the_gradient_with_z_loss_is_the_slope_of_the_sum_along_it() -> None:
    draw = torch.Generator().manual_seed(3)
    inputs = [torch.randn(n, 5, generator=draw) for n in (4, 7)]
    targets = torch.tensor([0, 6, -100, 3])

    def objective(*given: Tensor) -> Tensor:
        return head_loss(*given, targets, ONE, z_loss=0.1).sum()

    objective(*(x.requires_grad_() for x in inputs)).backward()
    gradients = [x.grad for x in inputs]
    length = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    with torch.no_grad():
        above, below = (
            objective(*(x + side * 1e-2 / length * g for x, g in zip(inputs, gradients, strict=True)))
            for side in (1, -1)
        )
    assert length.item() == pytest.approx((above - below).item() / 2e-2, rel=1e-3)


def test_without_a_coefficient_the_z_loss_changes_no_bit() -> None:
    given = [[x.clone().requires_grad_() for x in head()] for _ in range(2)]
    targets = labels(0, rows=24, columns=40)
    plain, none = head_loss(*given[0], targets, ONE), head_loss(*given[1], targets, ONE, z_loss=0.0)
    plain.backward()
    none.backward()
    assert torch.equal(plain, none)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(*given, strict=True))


def split_z_loss(rank: int) -> tuple[list[float], Any, Any]:
    (hidden, weight), targets = head(), labels(0, 3, rows=24, columns=40)
    part = weight[20 * rank : 20 * rank + 20].clone().requires_grad_()
    hidden.requires_grad_()
    vocabulary = Vocabulary(20 * rank, torch.distributed.group.WORLD)
    found = head_loss(hidden, part, targets, ONE, vocabulary, Z_LOSS)
    found.sum().backward()
    torch.distributed.all_reduce(hidden.grad)
    return found.tolist(), hidden.grad.numpy(), part.grad.numpy()


def test_two_ranks_with_a_split_vocabulary_compute_the_z_loss_of_one() -> None:
    (hidden, weight), targets = head(), labels(0, 3, rows=24, columns=40)
    whole = [x.requires_grad_() for x in (hidden, weight)]
    expected = head_loss(*whole, targets, ONE, z_loss=Z_LOSS)
    expected.sum().backward()
    ranks = run_ranks(2, split_z_loss)
    assert ranks[0][0] == ranks[1][0] == pytest.approx(expected.tolist(), rel=1e-6)
    for rank, (_, of_hidden, of_part) in enumerate(ranks):
        torch.testing.assert_close(torch.from_numpy(of_hidden), hidden.grad, rtol=0, atol=1e-5)
        part = weight.grad[20 * rank : 20 * rank + 20]
        torch.testing.assert_close(torch.from_numpy(of_part), part, rtol=0, atol=1e-5)


def test_bfloat16_gradients_are_near_those_of_fp32() -> None:
    (hidden, weight), targets = head(), labels(0, rows=24, columns=40)
    exact, rounded = (
        [x.clone().bfloat16().to(dtype).requires_grad_() for x in (hidden, weight)]
        for dtype in (torch.float32, torch.bfloat16)
    )
    head_loss(*exact, targets, ONE).backward()
    loss = head_loss(*rounded, targets, ONE)
    loss.backward()
    assert loss.dtype == torch.float32
    for found, expected in zip(rounded, exact, strict=True):
        assert found.grad.dtype == torch.bfloat16
        assert (found.grad.float() - expected.grad).norm() < 0.01 * expected.grad.norm()


@pytest.mark.parametrize(
    ("rows", "width", "itemsize", "expected"),
    [
        (10_000, 128_256, 2, 3_334),  # 2.4 GiB: three chunks
        (4_185, 128_256, 2, 4_185),  # just below 1 GiB
        (4_186, 128_256, 2, 2_093),
        (1, 128_256, 2, 1),
        (0, 128_256, 2, 0),
        (3, 2**40, 2, 1),  # a single token's logits exceed the limit
    ],
)
def test_tokens_are_cut_into_the_fewest_equal_chunks(rows: int, width: int, itemsize: int, expected: int) -> None:
    assert chunk_rows(rows, width, itemsize) == expected


def test_every_logit_is_computed_once_and_no_more_than_allowed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Products(TorchDispatchMode):
        shapes: list[tuple[int, ...]] = []  # noqa: RUF012

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = op(*args, **(kwargs or {}))
            if "mm" in op.__name__:
                self.shapes.append(tuple(out.shape))
            return out

    monkeypatch.setattr(module, "MOST_LOGITS", 8 * 40 * 4)
    hidden, weight = (x.requires_grad_() for x in head())
    with Products() as products:
        head_loss(hidden, weight, labels(rows=24, columns=40), ONE).backward()
    # three chunks of logits, gradient of the hidden states, gradient of the weight
    assert products.shapes == [(8, 40), (8, 16), (40, 16)] * 3

    weight.requires_grad_(False)
    products.shapes.clear()
    with products:
        head_loss(hidden, weight, labels(rows=24, columns=40), ONE).backward()
    assert products.shapes == [(8, 40), (8, 16)] * 3

    products.shapes.clear()
    with products, torch.no_grad():
        head_loss(hidden, weight, labels(rows=24, columns=40), ONE)
    assert products.shapes == [(8, 40)] * 3


def test_logits_of_untrained_tokens_change_no_bit_of_the_loss() -> None:
    logits, changed = scores().detach(), scores().detach()
    changed[[0, 3]] += 100.0
    assert torch.equal(loss_of(logits, labels(0, 3)), loss_of(changed, labels(0, 3)))


def test_loss_and_gradients_are_exactly_zero_without_a_trained_token() -> None:
    logits = scores()
    loss = loss_of(logits, labels(*range(12)))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(12, 20))


def test_loss_and_gradients_are_exactly_zero_without_a_token() -> None:
    hidden, weight = torch.empty(0, 20, requires_grad=True), torch.ones(30, 20, requires_grad=True)
    loss = head_loss(hidden, weight, torch.empty(0, dtype=torch.int64), ONE)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == (0, 20)
    assert torch.equal(weight.grad, torch.zeros(30, 20))


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = loss_of(logits, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 2e4
    assert torch.equal(logits.grad, torch.tensor([[0.0, 0.0], [-1.0, 1.0]]))
