from __future__ import annotations

import pytest
import torch

from trainer.llama.selection import Slices, take


@pytest.mark.parametrize(
    ("selected", "tokens", "tp", "positions", "places"),
    [
        ([0, 1, 3, 6], 8, 2, [0, 1, 3, 6, 6, 6], [0, 1, 2, 3]),
        ([0, 3, 4, 5, 7], 8, 2, [0, 3, 3, 4, 5, 7], [0, 1, 3, 4, 5]),
        ([5, 6], 8, 4, [0, 2, 5, 6], [2, 3]),
        ([7], 8, 2, [0, 7], [1]),
        ([0, 1, 2, 3], 4, 2, [0, 1, 2, 3], [0, 1, 2, 3]),
        ([1, 2], 4, 1, [1, 2], [0, 1]),
    ],
)
def test_slices_hold_equally_many_tokens_and_say_where_each_selected_token_is(
    selected: list[int], tokens: int, tp: int, positions: list[int], places: list[int]
) -> None:
    found = Slices.of(torch.tensor(selected), tokens, tp)
    assert (found.positions.tolist(), found.places.tolist()) == (positions, places)


@pytest.mark.parametrize("seed", range(20))
def test_any_slices_give_back_the_selected_tokens(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    tp, width = (int(torch.randint(1, 9, (), generator=draw)) for _ in range(2))
    selected = torch.randperm(tp * width, generator=draw)[: int(torch.randint(1, tp * width + 1, (), generator=draw))]
    selected = selected.sort().values
    found = Slices.of(selected, tp * width, tp)
    assert found.positions[found.places].equal(selected)
    parts = found.positions.view(tp, -1)
    assert (parts // width).equal(torch.arange(tp)[:, None].expand_as(parts))
    assert (parts.diff() >= 0).all()


def test_a_repeated_row_gives_its_first_copys_gradient() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, 7.0, 7.0])[:, None].expand(5, 3)
    taken = take(x, torch.tensor([0, 2, 3, 3, 3]))
    assert taken.equal(x[[0, 2, 3, 3, 3]])
    taken.backward(upstream)
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [1, 0, 2, 3]


def test_no_selected_row_gives_a_gradient_of_zeros() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    take(x, torch.empty(0, dtype=torch.int64)).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
