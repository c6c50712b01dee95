"""The choice of the optimizer, and clipping by the global gradient norm."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Iterable
from typing import Any, Literal, NamedTuple, cast

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from trainer.llama.model import Llama
from trainer.llama.sharding import local
from trainer.llama.weights import layout
from trainer.llama.working import working_copies
from trainer.training.adamw import AdamW
from trainer.training.adamw8bit import AdamW8bit
from trainer.training.muon import Muon

Optimizer = AdamW | AdamW8bit | Muon


class OptimizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[optimizer]` table: the optimizer and gradient clipping."""

    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """AdamW for all weights; AdamW with states of 8 bits for matrices, which needs torchao; or Muon
    for the matrices of the layers and AdamW for embedding, head, norms and biases. Muon needs half
    of AdamW's state for its matrices, whole-matrix products on every rank at each step, and no
    `[lora]`. A resume needs the kind of the checkpoint."""
    learning_rate: float = 2e-5
    """Full learning rate, at the end of the warm-up and the start of the decay; 0 or more."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's running means of the gradient and of its square, each in [0, 1)."""
    eps: float = 1e-8
    """Number added to AdamW's denominator, above 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices, 0 or more: each step shrinks them by the factor
    1 - learning rate x weight_decay. Norm weights and biases are not decayed."""
    momentum: float = 0.95
    """Decay rate of Muon's running mean of the gradient, in [0, 1). Without effect on AdamW."""
    clip: float | None = 1.0
    """Largest global norm of a gradient, above 0; a longer gradient is scaled down to it. inf never
    clips."""
    z_loss: float = 0.0
    """Coefficient of the z-loss, 0 or more; 0 is no z-loss. Each trained token adds the coefficient
    times the square of the logarithm of its sum of exponentials to the loss that is trained on,
    which keeps logits from growing. 1e-4 is usual. Reported as `z_loss`, and not in `loss`."""

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {self.betas}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), not {self.momentum}")
        # TOML has nan; every comparison with nan is False.
        if not (0 <= self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf):
            raise ValueError(
                f"learning_rate {self.learning_rate} and weight_decay {self.weight_decay} must be finite and not negative"
            )
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss {self.z_loss} must be finite and not negative; 1e-4 is usual")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps {self.eps} must be finite and above 0")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip {self.clip} must be above 0; clip = inf never clips")


def build_optimizer(model: Llama, config: OptimizerConfig) -> Optimizer:
    """Return an optimizer over the trained parameters; weight decay applies to matrices only."""
    optimizer = _optimizer(model, config)
    if copies := working_copies(model):
        optimizer.register_step_post_hook(copies.weights_changed)
    return optimizer


def _optimizer(model: Llama, config: OptimizerConfig) -> Optimizer:
    match config.kind:
        case "adamw":
            return _adamw(model, config)
        case "adamw8bit":
            return _adamw8bit(model, config)
        case "muon":
            return _muon(model, config)


def muon_matrices(model: Llama) -> dict[str, nn.Parameter]:
    """Return the parameters that Muon updates, by name: the matrices of the blocks."""
    return {name: p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}


def _adamw(model: Llama, config: OptimizerConfig, without: Container[nn.Parameter] = ()) -> AdamW:
    groups = _groups(model, config, without)
    return AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def _adamw8bit(model: Llama, config: OptimizerConfig) -> AdamW8bit:
    return AdamW8bit(_groups(model, config), lr=config.learning_rate, betas=config.betas, eps=config.eps)


def _groups(model: Llama, config: OptimizerConfig, without: Container[nn.Parameter] = ()) -> list[dict[str, Any]]:
    """Return the groups of trained parameters, with and without weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad and p not in without]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    decayed = {"params": matrices, "weight_decay": config.weight_decay}
    return [decayed, {"params": vectors, "weight_decay": 0.0}] if vectors else [decayed]


def _muon(model: Llama, config: OptimizerConfig) -> Muon:
    pieces = layout(model.config)
    matrices = {p: pieces[name] for name, p in muon_matrices(model).items()}
    rest = _adamw(model, config, without=matrices.keys())
    return Muon(matrices, rest, lr=config.learning_rate, weight_decay=config.weight_decay, momentum=config.momentum)


def reconfigure(optimizer: Optimizer, config: OptimizerConfig) -> None:
    """Set the options of `config` on an optimizer whose state came from a checkpoint."""
    for group in optimizer.param_groups:
        decays = any(p.ndim > 1 for p in group["params"])
        group["weight_decay"] = config.weight_decay if decays else 0.0
        if "momentum" in group:
            group["momentum"] = config.momentum
        else:
            group["betas"], group["eps"] = config.betas, config.eps


class GradientNorms(NamedTuple):
    """The norm of all gradients, and the norms of the gradients alone."""

    total: Tensor
    """Norm of all gradients, a float32 scalar on their device, equal on every rank."""
    parts: list[tuple[list[int], Tensor]]
    """Numbers of parameters, counted from 0, with the norms of the parts of their gradients on this
    rank, float32 `(n,)`."""

    @property
    def parameters(self) -> list[int]:
        """Numbers of the parameters with a gradient."""
        return sorted(number for numbers, _ in self.parts for number in numbers)


def global_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the norm of all gradients, as `gradient_norms` computes it. Collective."""
    return gradient_norms(parameters).total


@torch.no_grad()
def gradient_norms(parameters: Iterable[Tensor]) -> GradientNorms:
    """Return the norm of all gradients, and of each. Collective.

    The norms are computed in float32 over the shards of all ranks; replicated gradients count once.
    Partial sums over ranks are reduced first, in place. Does not wait for the device.
    """
    trained = {number: p for number, p in enumerate(parameters) if p.grad is not None}
    _complete_gradients(trained.values())
    return _gradient_norms({number: cast(Tensor, p.grad) for number, p in trained.items()})


@torch.no_grad()
def clipped_step(optimizer: Optimizer, norm: Tensor, limit: float | None) -> None:
    """Take a step with gradients of the global norm `norm` scaled down to `limit`, if it is given.

    A norm that is not finite makes the weights not finite.
    """
    # The optimizer divides by this number as it reads the gradients: no pass of its own.
    optimizer.grad_scale = None if limit is None else (norm / limit).clamp(min=1.0)
    optimizer.step()


def _complete_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients that are partial sums over the tensor-parallel ranks, in one exchange."""
    partial = [p for p in parameters if isinstance(p.grad, DTensor) and p.grad.placements == (Partial(),)]
    if not partial:
        return
    shards = [local(cast(Tensor, parameter.grad)) for parameter in partial]
    sums = torch.cat([shard.flatten().float() for shard in shards])
    dist.all_reduce(sums, group=cast(DTensor, partial[0]).device_mesh.get_group())
    for parameter, shard, total in zip(partial, shards, sums.split([s.numel() for s in shards]), strict=True):
        mesh = cast(DTensor, parameter).device_mesh
        parameter.grad = DTensor.from_local(total.view_as(shard).to(shard.dtype), mesh, [Replicate()], run_check=False)


def _gradient_norms(gradients: dict[int, Tensor]) -> GradientNorms:
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[int]] = defaultdict(list)
    for number, gradient in gradients.items():
        by_groups[_groups_of_shards(gradient)].append(number)
    parts, squares = [], []
    for groups, numbers in by_groups.items():
        shards = [local(gradients[number]) for number in numbers]
        norms = torch.stack(torch._foreach_norm(shards, 2, dtype=torch.float32))
        parts.append((numbers, norms))
        squares.append(_square(norms, groups))
    return GradientNorms(torch.stack(squares).sum().sqrt() if squares else torch.zeros(()), parts)


def _square(norms: Tensor, groups: tuple[dist.ProcessGroup, ...]) -> Tensor:
    square = norms.square().sum()
    for group in groups:
        dist.all_reduce(square, group=group)
    return square


def _groups_of_shards(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the process groups with different parts of `tensor` on each rank."""
    if not isinstance(tensor, DTensor):
        return ()
    dims = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return tuple(tensor.device_mesh.get_group(dim) for dim in dims)
