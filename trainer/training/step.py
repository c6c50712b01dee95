"""One optimizer step over the packs of a global batch: forward, backward, clip, update.

The loss is the summed cross-entropy of all trained tokens divided by their number in the global
batch. Example: two ranks with one pack each and cross-entropies [1.0, 2.0, 3.0] and [6.0]: the loss
is 12.0 / 4 = 3.0, not the mean of the packs' means, 4.0. With `optimizer.z_loss` the gradient is
that of the loss plus the z-loss, a mean over the same tokens.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sftstream import IGNORE_INDEX, Pack
from trainer.distributed.mesh import Topology
from trainer.llama.attention import Segments
from trainer.llama.model import Llama
from trainer.llama.selection import Slices
from trainer.llama.working import working_copies
from trainer.training.optimizer import GradientNorms, Optimizer, clipped_step, gradient_norms


class StepResult(NamedTuple):
    """Results of a step; loss and norm are equal on every rank."""

    loss: float
    """Mean cross-entropy, in nats, over the trained tokens of the global batch."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    pack_losses: list[float]
    """Part of each pack of this rank in `loss`, in the order of the packs."""
    norms: GradientNorms
    """Norms of the gradients of this rank's parts of the parameters."""
    z_loss: float | None = None
    """Mean z-loss over the trained tokens of the global batch, which `loss` does not include; None
    without z-loss."""

    @property
    def is_finite(self) -> bool:
        """True if loss and gradient are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm) and math.isfinite(self.z_loss or 0.0)


def train_step(
    model: Llama,
    optimizer: Optimizer,
    packs: list[Pack],
    topology: Topology,
    *,
    trained_tokens: int,
    learning_rate: float,
    clip: float | None,
    z_loss: float = 0.0,
    skip_nonfinite: bool = False,
) -> StepResult:
    """Take one optimizer step; `packs` are this rank's part of the global batch. Collective.

    `trained_tokens` is the count in the global batch, over all ranks. Without a trained token the
    model stays as it is. `clip` is the largest gradient norm, None for no limit. `z_loss` is the
    coefficient of the z-loss, 0.0 for none.

    A loss or a gradient that is not finite makes the weights not finite. With `skip_nonfinite`
    weights and optimizer then stay as they are; each step waits for the device before its update.
    """
    optimizer.zero_grad(set_to_none=True)
    order = heaviest_first(packs)
    parts = _backward(model, [packs[number] for number in order], topology, trained_tokens, z_loss)
    terms = _summed(parts, topology, 2 if z_loss else 1)
    norms = gradient_norms(model.parameters())
    norm = norms.total.to(terms.device)
    numbers = torch.stack((norm, *terms, *(part[0] for part in parts)))
    applied = bool(trained_tokens) and not (skip_nonfinite and not numbers[: 1 + len(terms)].isfinite().all())
    if applied:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        clipped_step(optimizer, norm, clip)
    optimizer.zero_grad(set_to_none=True)  # freed before the wait, and not at the start of the next step
    length, mean, *rest = numbers.tolist()  # without `skip_nonfinite` the only wait for the device
    z_mean = rest.pop(0) if z_loss else None
    return StepResult(mean, length, [rest[order.index(number)] for number in range(len(packs))], norms, z_mean)


def heaviest_first(packs: list[Pack]) -> list[int]:
    """Return the numbers of the packs by falling cost of attention, the sum of squared lengths of
    segments.

    Ranks that gather sharded weights wait for each other in every layer of every pack. In this
    order they run packs of about equal cost at the same time.
    """
    costs = [int((np.diff(pack.borders).astype(np.int64) ** 2).sum()) for pack in packs]
    return sorted(range(len(packs)), key=costs.__getitem__, reverse=True)


def accumulate_gradients(model: Llama, packs: list[Pack], topology: Topology, trained_tokens: int) -> Tensor:
    """Give the parameters, which have no gradients, those of the packs; return the mean loss.
    Collective.

    The loss is a float32 scalar, equal on every rank.
    """
    return _summed(_backward(model, packs, topology, trained_tokens), topology)[0]


def _backward(
    model: Llama, packs: list[Pack], topology: Topology, trained_tokens: int, z_loss: float = 0.0
) -> list[Tensor]:
    """Give the parameters, which have no gradients, those of the packs; return the part of each
    pack in the loss.

    A part is fp32 `(1,)`, or with the part in the z-loss `(2,)`.
    """
    scale = torch.full((), 1 / max(trained_tokens, 1), device=topology.device)
    losses = []
    copies = working_copies(model)
    with copies.step(len(packs)) if copies else nullcontext():
        for number, pack in enumerate(packs, 1):
            if isinstance(model, FSDPModule):
                last = number == len(packs)
                model.set_requires_gradient_sync(last or topology.parallel.reduce_gradients == "pack")
                model.set_requires_all_reduce(last)  # between replicas, once per step under either policy
                model.set_reshard_after_backward(last or topology.parallel.reshards)
            part = pack_loss(model, pack, topology.device, scale, z_loss)
            part.sum().backward()
            losses.append(part.detach().reshape(-1))
    return losses


def _summed(parts: list[Tensor], topology: Topology, terms: int = 1) -> Tensor:
    """Return the sum of the parts of all ranks, fp32 `(terms,)`. Collective."""
    loss = torch.zeros(terms, device=topology.device)
    for part in parts:
        loss += part
    dist.all_reduce(loss, group=topology.mesh["dp"].get_group())
    return loss


def pack_loss(
    model: Llama, pack: Pack, device: torch.device, scale: Tensor | None = None, z_loss: float = 0.0
) -> Tensor:
    """Return the summed cross-entropy of a pack's trained tokens, in nats, times `scale`.

    The result is an fp32 scalar, or with the z-loss fp32 `(2,)`; `scale` is 1 by default.
    """
    return model(*_inputs(model, pack, device), scale, z_loss=z_loss)  # type: ignore[no-any-return]


@torch.no_grad()
def label_losses(model: Llama, pack: Pack, device: torch.device) -> Tensor:
    """Return the cross-entropy of each trained token of a pack, in nats, fp32 `(n,)`, in order."""
    return model(*_inputs(model, pack, device), each=True)  # type: ignore[no-any-return]


def trained_positions(pack: Pack) -> Tensor:
    """Return the positions in a pack whose labels count in the loss, int64, on the CPU."""
    # nonzero on the CPU, since on a GPU its result's size would wait for all queued kernels.
    return torch.nonzero(pack.labels != IGNORE_INDEX).flatten()


def _inputs(model: Llama, pack: Pack, device: torch.device) -> tuple[Tensor, Tensor, Segments, Tensor | Slices, Tensor]:
    """Return the arguments of the model for a pack, on `device`."""
    trained = trained_positions(pack)
    slices = Slices.of(trained, pack.capacity, model.tp) if model.tp > 1 else None
    tensors = pack.input_ids, pack.position_ids, pack.cu_seqlens, pack.labels[trained], *(slices or (trained,))
    input_ids, position_ids, cu_seqlens, labels, *moved = (tensor.to(device, non_blocking=True) for tensor in tensors)
    positions = Slices(*moved) if slices else moved[0]
    return input_ids, position_ids, Segments(cu_seqlens, pack.max_seqlen), positions, labels
