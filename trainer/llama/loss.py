"""Cross-entropy over the trained tokens of a pack, on logits that may be split over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from sftstream import IGNORE_INDEX


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum, in fp32, of the cross-entropy of the trained tokens; divide by the global batch's count of them.

    `logits` is `(n, vocabulary)`: a plain tensor, or a DTensor sharded over the vocabulary, which is never gathered.
    `labels` is int64 `(n,)`, the same on every rank, `IGNORE_INDEX` where a token is not trained. Without a trained
    token the sum is exactly 0 and so is every gradient, and the collectives run all the same.

    Memory: one fp32 copy of the local logits at a time, forward and backward; between them only the logits and one
    number a token are kept.
    """
    if not isinstance(logits, DTensor):
        return _sum(logits, labels, 0, None)
    mesh = logits.device_mesh
    if mesh.ndim != 1 or not logits.placements[0].is_shard(1):
        raise ValueError(f"logits must be sharded over the vocabulary on one mesh dimension, not {logits.placements}")
    local = logits.to_local()
    return _sum(local, labels, mesh.get_local_rank() * local.shape[1], mesh.get_group())


def _sum(logits: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup | None) -> Tensor:
    loss: Tensor = _SummedCrossEntropy.apply(logits, labels, first, group)  # type: ignore[no-untyped-call]
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    """The vocabulary-parallel cross-entropy of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, section 3).

    Two all-reduces of one and two numbers a token forward, none backward.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup | None) -> Tensor:
        column, here = _local_columns(labels, first, logits.shape[1])
        maximum = _reduced(logits.amax(1).float(), dist.ReduceOp.MAX, group)
        scores = logits - maximum[:, None]  # (n, V/tp), fp32 whatever the logits are
        picked = scores.gather(1, column[:, None])[:, 0] * here
        sums = torch.stack((scores.exp_().sum(1), picked))  # (2, n)
        total, picked = _reduced(sums, dist.ReduceOp.SUM, group).unbind()
        ctx.save_for_backward(logits, labels, maximum + total.log())
        ctx.first = first
        return torch.where(labels != IGNORE_INDEX, total.log() - picked, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, log_total = ctx.saved_tensors
        column, here = _local_columns(labels, ctx.first, logits.shape[1])
        gradient = (logits - log_total[:, None]).exp_()  # softmax, (n, V/tp), fp32
        rows = torch.arange(len(labels), device=labels.device)
        gradient[rows, column] -= here.float()
        gradient *= (upstream * (labels != IGNORE_INDEX))[:, None]
        return gradient.to(logits.dtype), None, None, None


def _local_columns(labels: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Each label's column in the local slice `[first, first + width)`, and whether it is there (else column 0)."""
    here = (labels >= first) & (labels < first + width)  # IGNORE_INDEX is negative and so never here
    return torch.where(here, labels - first, 0), here


def _reduced(x: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(x, op=op, group=group)
    return x
