"""Working copies of weights that are stored in another dtype, and sums of their gradients.

FSDP casts the weights that it gathers, and sums gradients over ranks. Where data parallelism shards
nothing, these copies do the same with less work: a module computes with a copy of its weight, made
once after each change of the weight, and each gradient goes from the copy to the weight. Replicas
sum the gradient of their last pack with it (`replicas.py`), beside the backward pass.

| weights  | computation | copies        | gradient of a pack | of several packs         |
|----------|-------------|---------------|--------------------|--------------------------|
| float32  | bfloat16    | bfloat16      | float32            | float32 sum              |
| bfloat16 | bfloat16    | share storage | bfloat16           | float32 sum, rounded     |
| bfloat16 | float32     | float32       | bfloat16           | float32 sum, rounded     |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.llama.replicas import ReplicaSums
from trainer.llama.sharding import gradient_placements, local


class WorkingCopies:
    """The working copies of a model's weights; a forward pre-hook of the model.

    The copies are made in the first forward pass and filled again in the first pass after a change
    of any weight in place. Weights must not be replaced after the first pass. A fused optimizer
    changes weights without a trace: it calls `weights_changed`.
    """

    def __init__(self, dtype: torch.dtype, replicas: ReplicaSums | None = None) -> None:
        self.dtype = dtype
        self._replicas = replicas
        """Sums over the replicas; None without replicas."""
        self._copies: dict[nn.Parameter, Tensor] = {}
        self._versions: dict[nn.Parameter, tuple[int, int]] = {}
        self._step: _Sums | None = None
        """Sums of the gradients of a step; None outside of `step`."""

    def __call__(self, model: nn.Module, _inputs: tuple[Any, ...]) -> None:
        """Make the copies equal to the weights."""
        if not self._copies:
            self._make(model)
        versions = {
            weight: (weight._version, _detached(weight)._version)
            for weight in self._copies
            if weight.dtype != self.dtype  # the other copies share storage
        }
        changed = [weight for weight, version in versions.items() if version != self._versions.get(weight)]
        self._versions = versions
        if changed:
            with torch.no_grad():
                ours = [self._copies[weight] for weight in changed]
                torch._foreach_copy_(ours, [_detached(weight) for weight in changed])

    def weights_changed(self, *_: Any) -> None:
        """Fill the copies of trained weights again in the next forward pass.

        A post-hook of an optimizer's step.
        """
        self._versions = {weight: version for weight, version in self._versions.items() if not weight.requires_grad}

    @contextmanager
    def step(self, packs: int) -> Iterator[None]:
        """Sum the gradients of the `packs` backward passes in the `with` block, and over replicas.

        The sums are computed in float32, and rounded once to the dtype of the weight. Collective
        with replicas.
        """
        self._step = _Sums(packs, self._copies, self._replicas)
        try:
            yield
            self._step.finish()
        finally:
            self._step = None

    def _make(self, model: nn.Module) -> None:
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight not in self._copies:  # a tied weight belongs to two modules
                    stored = _detached(weight)
                    copy = stored if weight.dtype == self.dtype else torch.empty_like(stored, dtype=self.dtype)
                    copy.requires_grad_(weight.requires_grad)
                    if weight.requires_grad:
                        copy.register_post_accumulate_grad_hook(partial(self._hand_over, weight))
                    self._copies[weight] = copy
                setattr(module, f"{name}_copy", self._copies[weight])

    def _hand_over(self, weight: nn.Parameter, copy: Tensor) -> None:
        """Move a copy's gradient to its weight, and add it to the gradients there."""
        gradient, copy.grad = copy.grad, None
        assert gradient is not None
        if self._step is not None:
            self._step.add(weight, gradient)
        elif weight.grad is None:
            weight.grad = _gradient(weight, gradient.to(weight.dtype))
        else:
            local(weight.grad).add_(gradient)


class _Sums:
    """Sums of the gradients of `packs` packs by weight, over replicas if there are any."""

    def __init__(self, packs: int, weights: Iterable[nn.Parameter], replicas: ReplicaSums | None) -> None:
        self._packs, self._weights, self._replicas = packs, weights, replicas
        self._totals: dict[nn.Parameter, Tensor] = {}
        self._added: Counter[nn.Parameter] = Counter()

    @cached_property  # a model's first pass makes the copies
    def _waiting(self) -> list[nn.Parameter]:
        """Weights whose gradients are not yet summed over replicas, in the order of the model."""
        return [weight for weight in self._weights if weight.requires_grad]

    def add(self, weight: nn.Parameter, gradient: Tensor) -> None:
        """Add the gradient of a pack; the last pack's begins the sum over replicas. Collective."""
        total = self._totals.get(weight)
        if total is not None:
            total.add_(gradient)
        elif self._packs > 1:
            self._totals[weight] = gradient.float()
        else:  # replicas exchange the gradient in its own dtype
            self._totals[weight] = gradient if self._replicas else gradient.to(weight.dtype)
        self._added[weight] += 1
        if self._replicas:
            self._exchange(self._replicas)

    def _exchange(self, replicas: ReplicaSums) -> None:
        # From the last weight to the first on every replica, in whatever order gradients are ready.
        while self._waiting and self._added[self._waiting[-1]] == self._packs:
            weight = self._waiting.pop()
            self._totals[weight] = replicas.begin(self._totals[weight], weight.dtype)

    def finish(self) -> None:
        """Set the gradients of the weights. Collective with replicas."""
        if self._replicas:
            assert not self._waiting
            self._replicas.finish()
        for weight, total in self._totals.items():
            weight.grad = _gradient(weight, total.to(weight.dtype))


def working_copies(model: nn.Module) -> WorkingCopies | None:
    """Return the working copies of `model`, None if it computes with its own weights."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, WorkingCopies)), None)


def _detached(weight: Tensor) -> Tensor:
    """Return the part of `weight` on this rank, with its storage, outside of autograd."""
    return (weight._local_tensor if isinstance(weight, DTensor) else weight).detach()


def _gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient of the part of `weight` on this rank as a gradient of `weight`."""
    if not isinstance(weight, DTensor):
        return gradient
    return DTensor.from_local(
        gradient,
        weight.device_mesh,
        gradient_placements(weight),
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
