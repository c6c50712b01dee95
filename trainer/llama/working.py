"""Working copies of weights that are stored in another dtype, and gradients of several packs.

FSDP casts the weights that it gathers. Where data parallelism shards nothing, these copies do the
same with less work: a module computes with a copy of its weight, made once after each change of the
weight, and each gradient goes from the copy to the weight.

| weights  | computation | copies        | gradient of a pack | of several packs         |
|----------|-------------|---------------|--------------------|--------------------------|
| float32  | bfloat16    | bfloat16      | float32            | float32 sum              |
| bfloat16 | bfloat16    | share storage | bfloat16           | float32 sum, rounded     |
| bfloat16 | float32     | float32       | bfloat16           | float32 sum, rounded     |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.llama.sharding import gradient_placements, local


class WorkingCopies:
    """The working copies of a model's weights; a forward pre-hook of the model.

    The copies are made in the first forward pass and filled again in the first pass after a change
    of any weight in place. Weights must not be replaced after the first pass. A fused optimizer
    changes weights without a trace: it calls `weights_changed`.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._copies: dict[nn.Parameter, Tensor] = {}
        self._versions: dict[nn.Parameter, tuple[int, int]] = {}
        self._sums: dict[nn.Parameter, Tensor] | None = None
        """Sums of the gradients of several packs; None outside of `several_packs`."""

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
    def several_packs(self) -> Iterator[None]:
        """Sum the gradients of all backward passes in the `with` block in float32."""
        self._sums = {}
        try:
            yield
            for weight, total in self._sums.items():
                weight.grad = _gradient(weight, total.to(weight.dtype))
        finally:
            self._sums = None

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
        if self._sums is not None and weight.dtype != torch.float32:
            total = self._sums.get(weight)
            self._sums[weight] = gradient.float() if total is None else total.add_(gradient)
        elif weight.grad is None:
            weight.grad = _gradient(weight, gradient.to(weight.dtype))
        else:
            local(weight.grad).add_(gradient)


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
