"""Cross-entropy of a head's logits, with at most `MOST_LOGITS` bytes of logits at a time.

The head and its loss are one operation: the forward pass computes the logits of some tokens, the
loss, and at once the gradients of the hidden states and of the head's weight; then the logits of
the next tokens. No logit is computed twice, and none is kept for the backward pass.

The z-loss (Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, section 5) adds the coefficient times
the square of `log Z` to the loss of each token, where `log Z` is the logarithm of the token's sum
of exponentials. Its gradient is the softmax times `2 * coefficient * log Z`.

With a weight split over the vocabulary each rank has the logits of its ids, as in Megatron-LM
(Shoeybi et al. 2019, arXiv:1909.08053, section 3). Example with two ranks, a vocabulary of 4 and
one token with label 2:

|                                    | rank 0 (ids 0, 1) | rank 1 (ids 2, 3) | all-reduce     |
|------------------------------------|-------------------|-------------------|----------------|
| logits                             | ln 1, ln 2        | ln 3, ln 4        |                |
| largest logit                      | ln 2              | ln 4              | max: ln 4      |
| sum of exp(logit - largest)        | 1.5               | 1.75              |                |
| the same below the common largest  | 0.75              | 1.75              | sum: 2.5       |
| logit of label 2                   | 0 (not here)      | ln 3              | sum: ln 3      |
| loss = ln 4 + ln 2.5 - ln 3        | 1.2040            | 1.2040            |                |
| gradient = softmax - one at label  | 0.1, 0.2          | 0.3 - 1, 0.4      |                |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sftstream import IGNORE_INDEX

MOST_LOGITS = 2**30
"""Bytes of a rank's logits in memory at a time; on a GPU their gradient takes the same memory."""


class Vocabulary(NamedTuple):
    """The part of the vocabulary on this rank."""

    first: int = 0
    """Smallest id."""
    group: dist.ProcessGroup | None = None
    """Ranks with the other parts; None if this rank has all ids."""


WHOLE = Vocabulary()


class Kernels(NamedTuple):
    """The functions over all logits."""

    statistics: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
    """May overwrite the logits."""
    multiply: Callable[[Tensor, Tensor], Tensor]
    """May overwrite the numbers."""


def chunk_rows(rows: int, width: int, itemsize: int) -> int:
    """Return the number of tokens whose logits are computed at a time.

    The tokens are cut into the fewest equal chunks of at most `MOST_LOGITS` bytes. Example: 10,000
    tokens with 128,256 logits of 2 bytes make three chunks of 3,334 tokens.
    """
    most = max(1, MOST_LOGITS // (width * itemsize))
    return math.ceil(rows / max(1, math.ceil(rows / most)))


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    vocabulary: Vocabulary = WHOLE,
    z_loss: float = 0.0,
) -> Tensor:
    """Return `scale` times the summed cross-entropy of the trained tokens, an fp32 scalar.

    With a coefficient `z_loss` above 0 returns fp32 `(2,)` instead: the cross-entropy and the
    z-loss, each times `scale`. Train on their sum: the gradients are computed for a backward pass
    with equal factors of both.

    `hidden` is `(n, hidden_size)`; `weight` is `(ids on this rank, hidden_size)`; `labels` is int64
    `(n,)`, equal on every rank of the vocabulary, with `IGNORE_INDEX` for tokens that are not
    trained; `scale` is an fp32 scalar, `1 / trained tokens of the global batch` in training. The
    gradient of `hidden` covers the ids of this rank: its sum over the ranks of the vocabulary is
    the full gradient. Without a trained token loss and gradients are exactly 0.

    Gradients are computed only if they are needed: none without autograd, none of a frozen
    `weight`. The weight's gradient is summed over the chunks in its own dtype.
    """
    wanted = torch.is_grad_enabled() and hidden.requires_grad, torch.is_grad_enabled() and weight.requires_grad
    loss: Tensor = _HeadLoss.apply(hidden, weight, labels, scale, vocabulary, z_loss, wanted)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """Return the cross-entropy of each token, fp32 `(n,)`, without a gradient.

    The arguments are those of `head_loss`. Every label is an id of the vocabulary.
    """
    losses = torch.empty(len(hidden), device=hidden.device)
    rows = chunk_rows(len(hidden), len(weight), hidden.element_size())
    for start in range(0, len(hidden), max(rows, 1)):
        part = slice(start, start + rows)
        logits = hidden[part] @ weight.t()
        column = labels[part] - vocabulary.first
        log_total, picked = _combined(_kernels(hidden).statistics(logits, column), vocabulary.group)
        losses[part] = log_total - picked
    return losses


class _HeadLoss(torch.autograd.Function):
    """The computation of the example above, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: Tensor,
        vocabulary: Vocabulary,
        z_loss: float,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        kernels = _kernels(hidden)
        loss, z_term = (torch.zeros((), device=hidden.device) for _ in range(2))
        ctx.hidden = torch.empty_like(hidden) if wanted[0] else None
        ctx.weight = None
        rows = chunk_rows(len(hidden), len(weight), hidden.element_size())
        for start in range(0, len(hidden), max(rows, 1)):
            part = slice(start, start + rows)
            logits = hidden[part] @ weight.t()
            column = labels[part] - vocabulary.first
            trained = (labels[part] != IGNORE_INDEX) * scale
            log_total, picked = _combined(kernels.statistics(logits, column), vocabulary.group)
            loss += torch.dot(log_total - picked, trained)
            if z_loss:
                z_term += z_loss * torch.dot(log_total.square(), trained)
            if any(wanted):
                factor = 1 + 2 * z_loss * log_total if z_loss else None
                gradient = kernels.gradient(logits, column, log_total, trained, factor)
                del logits
                if ctx.hidden is not None:
                    torch.mm(gradient, weight, out=ctx.hidden[part])
                if wanted[1]:
                    ctx.weight = _added(ctx.weight, gradient.t(), hidden[part])
        if wanted[1] and ctx.weight is None:
            ctx.weight = torch.zeros_like(weight)
        return torch.stack((loss, z_term)) if z_loss else loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Popped, so that the memory is free as soon as the gradients are used.
        hidden, weight = ctx.__dict__.pop("hidden"), ctx.__dict__.pop("weight")
        multiply, upstream = _kernels(upstream).multiply, upstream.reshape(-1)[0]  # both elements are equal
        scaled = (None if gradient is None else multiply(gradient, upstream) for gradient in (hidden, weight))
        return (*scaled, None, None, None, None, None)


def _added(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return left @ right if total is None else total.addmm_(left, right)


def _combined(statistics: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return the logarithm of each token's sum of exponentials, and the logit of its label.

    `statistics` covers the ids of this rank. Two all-reduces, of one and of two numbers per token.
    """
    maximum, total, picked = statistics.unbind()
    if group is not None:
        largest = maximum.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        sums = torch.stack((total * (maximum - largest).exp(), picked))
        dist.all_reduce(sums, group=group)
        maximum, (total, picked) = largest, sums.unbind()
    return maximum + total.log(), picked


def plain_statistics(logits: Tensor, column: Tensor) -> Tensor:
    """Return `(3, n)` fp32: largest logit, sum of exp(logit - largest), logit of the label.

    `column` is the label's column, or a number outside of the columns if the label is elsewhere:
    its logit is then 0.
    """
    scores = logits.float()
    maximum = scores.amax(1)
    here = (column >= 0) & (column < logits.shape[1])
    picked = scores.gather(1, torch.where(here, column, 0)[:, None])[:, 0] * here
    return torch.stack((maximum, (scores - maximum[:, None]).exp().sum(1), picked))


def plain_gradient(logits: Tensor, column: Tensor, log_total: Tensor, scale: Tensor, factor: Tensor | None) -> Tensor:
    """Return the gradient of `logits`, in their dtype: softmax minus one at the label, scaled.

    `factor` is a factor of each token's softmax, fp32 `(n,)`; None is 1.
    """
    softmax = (logits.float() - log_total[:, None]).exp()
    softmax = softmax if factor is None else softmax * factor[:, None]
    at_label = torch.arange(logits.shape[1], device=logits.device) == column[:, None]
    return ((softmax - at_label.float()) * scale[:, None]).to(logits.dtype)


_PLAIN = Kernels(plain_statistics, plain_gradient, Tensor.mul_)


def _kernels(tensor: Tensor) -> Kernels:
    """Return the functions for the device of `tensor`."""
    if not tensor.is_cuda:
        return _PLAIN
    from trainer.llama.kernels import loss as triton_kernels

    return Kernels(triton_kernels.statistics, triton_kernels.gradient, triton_kernels.multiply)
