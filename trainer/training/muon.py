"""Muon for the matrices of the blocks, and AdamW for embedding, head, norms and biases.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
https://kellerjordan.github.io/posts/muon/. The update of a matrix is the orthogonal matrix nearest
to its momentum, times 0.2 * sqrt(larger side), so that the learning rate and weight decay of AdamW
suit it (Liu et al., "Muon is Scalable for LLM Training", https://arxiv.org/abs/2502.16982):
`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`.

The matrices are those of Hugging Face: the rows of q, k and v in our fused matrix are three
matrices, the rows of gate and up two. The momentum is stored as the weight is, in parts on the
ranks. For the update each rank gathers the whole matrix in bfloat16, orthogonalizes it, and keeps
its part, so that every topology computes the same update.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim._muon import (
    DEFAULT_A,
    DEFAULT_B,
    DEFAULT_C,
    DEFAULT_NS_STEPS,
    EPS,
    _adjust_lr,
    _zeropower_via_newtonschulz,
)

from trainer.llama.sharding import gather_full, local, window
from trainer.llama.weights import Piece
from trainer.training.adamw import AdamW


class Muon(torch.optim.Optimizer):
    """Muon over `matrices`, AdamW over the parameters of `rest`; gradients count as divided by
    `grad_scale`.

    `matrices` maps each matrix to the pieces that make up its rows, in order.
    """

    grad_scale: Tensor | None = None
    """float32 scalar on the device of the weights; None divides by 1."""

    def __init__(
        self,
        matrices: Mapping[nn.Parameter, list[Piece]],
        rest: AdamW,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
    ) -> None:
        self._pieces, self._rest = dict(matrices), rest
        group = {"params": list(matrices), "lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([group, *rest.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all weights that have a gradient. Collective; does not wait for the device."""
        # Loading a checkpoint replaces groups and state.
        matrices, *self._rest.param_groups = self.param_groups
        self._rest.state, self._rest.grad_scale = self.state, self.grad_scale
        for weight in matrices["params"]:
            if weight.grad is not None:
                self._update(weight, matrices)
        return self._rest.step(closure)

    def _update(self, weight: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        assert weight.grad is not None
        gradient, mean = local(weight.grad), local(state["momentum_buffer"])
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        mean.lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(mean, group["momentum"]).bfloat16()  # Nesterov's momentum
        update = orthogonalized(gather_full(_as_part_of(weight, ahead)), self._pieces[weight])
        part = local(weight)
        part.mul_(1 - group["lr"] * group["weight_decay"]).add_(update[window(weight)], alpha=-group["lr"])


def orthogonalized(fused: Tensor, pieces: list[Piece]) -> Tensor:
    """Return the float32 update of a whole fused matrix for a learning rate of 1."""
    update = torch.empty_like(fused, dtype=torch.float32)
    rows_of: dict[str, list[slice]] = {}
    start = 0
    for piece in pieces:
        rows_of.setdefault(piece.tensor, []).append(slice(start, start + piece.rows))
        start += piece.rows
    for parts in rows_of.values():
        matrix = torch.cat([fused[rows] for rows in parts])
        found = _zeropower_via_newtonschulz(matrix, (DEFAULT_A, DEFAULT_B, DEFAULT_C), DEFAULT_NS_STEPS, EPS)
        found = found.float() * _adjust_lr(1.0, "match_rms_adamw", matrix.shape)
        for rows, new in zip(parts, found.split([rows.stop - rows.start for rows in parts]), strict=True):
            update[rows] = new
    return update


def _as_part_of(weight: Tensor, part: Tensor) -> Tensor:
    """Return `part`, placed over the ranks as the part of `weight` on this rank is."""
    if not isinstance(weight, DTensor):
        return part
    return DTensor.from_local(
        part, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
