"""One optimizer step: the packs of a global batch, forward and backward, clipped, applied."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sftstream import IGNORE_INDEX, Pack
from trainer.distributed.mesh import Topology
from trainer.llama.attention import Segments
from trainer.llama.loss import summed_cross_entropy
from trainer.llama.model import Llama
from trainer.training.optimizer import clip_by_global_norm


class StepResult(NamedTuple):
    """`loss` is the mean cross-entropy, in nats, over the trained tokens of the global batch."""

    loss: float
    grad_norm: float


def train_step(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    packs: list[Pack],
    topology: Topology,
    *,
    trained_tokens: int,
    learning_rate: float,
    clip: float | None,
) -> StepResult:
    """Take one step on this rank's `packs`, one after the other.

    `trained_tokens` is the count of the whole global batch, by which every token's loss is divided: not a mean of means.
    A batch without a trained token leaves the model alone.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = accumulate_gradients(model, packs, topology, trained_tokens)
    grad_norm = clip_by_global_norm(model.parameters(), clip)
    if trained_tokens:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    return StepResult(loss.item(), float(grad_norm))


def accumulate_gradients(model: Llama, packs: list[Pack], topology: Topology, trained_tokens: int) -> Tensor:
    """Add this rank's packs to the gradients, one after the other; returns the global batch's mean loss, on every rank."""
    scale = 1 / max(trained_tokens, 1)
    total = torch.zeros((), device=topology.device)
    for number, pack in enumerate(packs, 1):
        if isinstance(model, FSDPModule):
            last = number == len(packs)
            model.set_requires_gradient_sync(last or topology.parallel.reduce_gradients == "pack")
            model.set_requires_all_reduce(last)  # between replicas, once a step in either case
            model.set_reshard_after_backward(last or topology.parallel.reshard_after_forward)
        loss = pack_loss(model, pack, topology.device)
        (loss * scale).backward()
        total += loss.detach()
    dist.all_reduce(total, group=topology.mesh["dp"].get_group())
    return total * scale


def pack_loss(model: Llama, pack: Pack, device: torch.device) -> Tensor:
    """The sum of the cross-entropy of a pack's trained tokens, in nats."""
    # Found on the CPU, where the labels come from: asking a GPU how many there are would wait for it.
    trained = torch.nonzero(pack.labels != IGNORE_INDEX).flatten()
    labels = pack.labels[trained]
    input_ids, position_ids, cu_seqlens, trained, labels = (
        tensor.to(device, non_blocking=True)
        for tensor in (pack.input_ids, pack.position_ids, pack.cu_seqlens, trained, labels)
    )
    logits = model(input_ids, position_ids, Segments(cu_seqlens, pack.max_seqlen), trained)
    return summed_cross_entropy(logits, labels)
