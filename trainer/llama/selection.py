"""Select tokens of a pack, on one rank and under tensor parallelism.

Only trained tokens count in the loss, so that after the attention of the last layer no other token
is needed. Under tensor parallelism a rank has a slice of the tokens there, and all slices need
equal lengths.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Slices(NamedTuple):
    """Selected tokens of a pack, equally many in the slice of each tensor-parallel rank.

    Example: the tokens 0, 3, 4, 5 and 7 of 8, for two ranks with 4 tokens each: `positions` 0, 3,
    3, 4, 5, 7 with `places` 0, 1, 3, 4, 5.
    """

    positions: Tensor
    """Selected tokens in rising order, the last of a slice repeated; int64 `(tp * m,)`."""
    places: Tensor
    """Place of each selected token in `positions`; int64 `(n,)`."""

    @classmethod
    def of(cls, selected: Tensor, tokens: int, tp: int) -> Slices:
        """Return the slices of the tokens `selected`, int64 `(n,)` on the CPU, in rising order."""
        borders = torch.searchsorted(selected, torch.arange(tp + 1) * (tokens // tp))
        counts = borders.diff()
        most = int(counts.max())
        # A slice without a selected token repeats its first token, which then gets no gradient.
        rows = [
            torch.cat((part, (part[-1:] if len(part) else torch.tensor([start])).expand(most - len(part))))
            for part, start in zip(selected.split(counts.tolist()), range(0, tokens, tokens // tp), strict=True)
        ]
        shift = torch.arange(tp) * most - borders[:-1]
        return cls(torch.cat(rows), torch.arange(len(selected)) + shift.repeat_interleave(counts))


def split_selection(positions: Tensor | Slices | None, tp: int) -> tuple[Tensor | None, Tensor | None]:
    """Return the tokens to select in the last layer, and the rows to select of its output.

    None selects all.
    """
    if positions is None or (tp > 1 and not isinstance(positions, Slices)):
        return None, positions
    early, late = positions if isinstance(positions, Slices) else (positions, None)
    if len(early) > tp:
        return early, late
    # A matrix without rows has no scale in float8; a single row is too rare for a case of its own.
    return None, early if late is None else early[late]


def in_slice(positions: Tensor, tp: int, rank: int, tokens: int) -> Tensor:
    """Return the `positions` of `Slices` in the slice of `rank`, counted from its first token.

    `tokens` is the length of a slice.
    """
    return positions.view(tp, -1)[rank] - rank * tokens


def take(x: Tensor, positions: Tensor) -> Tensor:
    """Return the rows `positions` of `x`, int64 `(n,)` in rising order.

    Of equal positions the first gets a gradient.
    """
    taken: Tensor = _Take.apply(x, positions)  # type: ignore[no-untyped-call]
    return taken


class _Take(torch.autograd.Function):
    """Selection of rows whose backward pass is a selection too.

    The backward pass of `x[positions]` adds rows that could be equal: slow when deterministic.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.rows = len(x)
        return x[positions]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        if len(positions) == 0:
            return upstream.new_zeros(ctx.rows, upstream.shape[1]), None
        row = torch.arange(ctx.rows, device=upstream.device)
        place = torch.searchsorted(positions, row).clamp(max=len(positions) - 1)
        return torch.where((positions[place] == row)[:, None], upstream[place], 0), None
