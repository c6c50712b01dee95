"""Cross-entropy over the trained tokens of a pack, on logits that may be split over the vocabulary.

The split version is the vocabulary-parallel cross-entropy of Megatron-LM (Shoeybi et al. 2019,
arXiv:1909.08053, section 3). Example with two ranks, a vocabulary of 4 and one token with label 2:

|                                    | rank 0 (ids 0, 1) | rank 1 (ids 2, 3) | all-reduce     |
|------------------------------------|-------------------|-------------------|----------------|
| logits                             | ln 1, ln 2        | ln 3, ln 4        |                |
| largest logit                      | ln 2              | ln 4              | max: ln 4      |
| scores = logits - ln 4             | ln 1/4, ln 2/4    | ln 3/4, 0         |                |
| sum of exp(scores)                 | 0.75              | 1.75              | sum: 2.5       |
| score of label 2                   | 0 (not here)      | ln 3/4            | sum: ln 3/4    |
| loss = ln 2.5 - ln 3/4             | 1.2040            | 1.2040            |                |
| gradient = softmax - one at label  | 0.1, 0.2          | 0.3 - 1, 0.4      |                |
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from sftstream import IGNORE_INDEX


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the fp32 sum of the cross-entropy over the trained tokens.

    The caller divides by the trained tokens of the global batch. `logits` is `(n, vocabulary)`: a
    plain tensor, or a DTensor split over the vocabulary, never gathered. `labels` is int64 `(n,)`,
    equal on every rank of the split, with `IGNORE_INDEX` for tokens that are not trained. Without
    a trained token the sum and every gradient are exactly 0, and the collectives still run.

    Memory: one fp32 copy of the local logits at a time, in the forward and in the backward pass.
    Between the passes only the logits and one number per token are kept.

    Raises ValueError if `logits` is a DTensor with any other placement.
    """
    if not isinstance(logits, DTensor):
        return _sum(logits, labels, 0, None)
    mesh = logits.device_mesh
    if mesh.ndim != 1 or not logits.placements[0].is_shard(1):
        raise ValueError(
            f"logits must be split over the vocabulary, Shard(1) on a mesh of one dimension, not {logits.placements}: "
            "redistribute them"
        )
    local = logits.to_local()
    return _sum(local, labels, mesh.get_local_rank() * local.shape[1], mesh.get_group())


def _sum(logits: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup | None) -> Tensor:
    loss: Tensor = _SummedCrossEntropy.apply(logits, labels, first, group)  # type: ignore[no-untyped-call]
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    """The computation of the example above.

    The forward pass makes two all-reduces, of one and of two numbers per token; the backward pass
    none.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup | None) -> Tensor:
        column, here = _local_columns(labels, first, logits.shape[1])
        maximum = _all_reduced(logits.amax(1).float(), dist.ReduceOp.MAX, group)
        scores = logits - maximum[:, None]  # (n, V/tp), fp32 for logits of any dtype
        picked = scores.gather(1, column[:, None])[:, 0] * here
        sums = torch.stack((scores.exp_().sum(1), picked))  # (2, n)
        total, picked = _all_reduced(sums, dist.ReduceOp.SUM, group).unbind()
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
    """Return the column of each label in the local logits, and a mask of the labels that lie there.

    The local logits cover the ids `[first, first + width)`. Labels outside get column 0 and False.
    Example: labels `[2, 0]`, `first` 2, `width` 2 give columns `[0, 0]` and the mask
    `[True, False]`.
    """
    here = (labels >= first) & (labels < first + width)  # IGNORE_INDEX is negative: always False
    return torch.where(here, labels - first, 0), here


def _all_reduced(x: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(x, op=op, group=group)
    return x
