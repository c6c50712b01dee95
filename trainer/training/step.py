"""One optimizer step over the packs of a global batch: forward, backward, clip, update.

The loss is the summed cross-entropy of all trained tokens divided by their number in the global
batch. Example: two ranks with one pack each and cross-entropies [1.0, 2.0, 3.0] and [6.0]: the loss
is 12.0 / 4 = 3.0, not the mean of the packs' means, 4.0.
"""

from __future__ import annotations

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
from trainer.llama.working import working_copies
from trainer.training.optimizer import Optimizer, clipped_step, global_norm


class StepResult(NamedTuple):
    """Results of a step, equal on every rank."""

    loss: float
    """Mean cross-entropy, in nats, over the trained tokens of the global batch."""
    grad_norm: float
    """Global norm of the gradient before clipping."""


def train_step(
    model: Llama,
    optimizer: Optimizer,
    packs: list[Pack],
    topology: Topology,
    *,
    trained_tokens: int,
    learning_rate: float,
    clip: float | None,
) -> StepResult:
    """Take one optimizer step; `packs` are this rank's part of the global batch. Collective.

    `trained_tokens` is the count in the global batch, over all ranks. Without a trained token the
    model stays as it is. `clip` is the largest gradient norm, None for no limit.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = accumulate_gradients(model, heaviest_first(packs), topology, trained_tokens)
    norm = global_norm(model.parameters()).to(loss.device)
    if trained_tokens:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        clipped_step(optimizer, norm, clip)
    optimizer.zero_grad(set_to_none=True)  # freed before the wait, and not at the start of the next step
    return StepResult(*torch.stack((loss, norm)).tolist())  # the only wait for the device


def heaviest_first(packs: list[Pack]) -> list[Pack]:
    """Return the packs by falling cost of attention, the sum of squared lengths of segments.

    Ranks that gather sharded weights wait for each other in every layer of every pack. In this
    order they run packs of about equal cost at the same time.
    """
    return sorted(packs, key=lambda pack: int((np.diff(pack.borders).astype(np.int64) ** 2).sum()), reverse=True)


def accumulate_gradients(model: Llama, packs: list[Pack], topology: Topology, trained_tokens: int) -> Tensor:
    """Add the packs' gradients to the parameters; return the mean loss. Collective.

    The loss is a float32 scalar, equal on every rank.
    """
    scale = torch.full((), 1 / max(trained_tokens, 1), device=topology.device)
    loss = torch.zeros((), device=topology.device)
    copies = working_copies(model)
    with copies.several_packs() if copies and len(packs) > 1 else nullcontext():
        for number, pack in enumerate(packs, 1):
            if isinstance(model, FSDPModule):
                last = number == len(packs)
                model.set_requires_gradient_sync(last or topology.parallel.reduce_gradients == "pack")
                model.set_requires_all_reduce(last)  # between replicas, once per step under either policy
                model.set_reshard_after_backward(last or topology.parallel.reshard_after_forward)
            part = pack_loss(model, pack, topology.device, scale)
            part.backward()
            loss += part.detach()
    dist.all_reduce(loss, group=topology.mesh["dp"].get_group())
    return loss


def pack_loss(model: Llama, pack: Pack, device: torch.device, scale: Tensor | None = None) -> Tensor:
    """Return the summed cross-entropy of a pack's trained tokens, in nats, times `scale`.

    The result is an fp32 scalar; `scale` is 1 by default.
    """
    # nonzero on the CPU, since on a GPU its result's size would wait for all queued kernels.
    trained = torch.nonzero(pack.labels != IGNORE_INDEX).flatten()
    labels = pack.labels[trained]
    input_ids, position_ids, cu_seqlens, trained, labels = (
        tensor.to(device, non_blocking=True)
        for tensor in (pack.input_ids, pack.position_ids, pack.cu_seqlens, trained, labels)
    )
    segments = Segments(cu_seqlens, pack.max_seqlen)
    return model(input_ids, position_ids, segments, trained, labels, scale)  # type: ignore[no-any-return]
