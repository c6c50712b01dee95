"""AdamW, its learning-rate schedule, and clipping by the global gradient norm.

AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization",
https://arxiv.org/abs/1711.05101.

Example: with learning_rate = 1.0, kind = "linear" and warmup = 1, a run of 6 steps takes the rates
0.5, 1.0, 0.8, 0.6, 0.4, 0.2: the decay would reach 0 at step 6, counted from 0.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.llama.sharding import local
from trainer.llama.working import working_copies
from trainer.training.adamw import AdamW


class OptimizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[optimizer]` table: AdamW and gradient clipping."""

    learning_rate: float = 2e-5
    """Full learning rate, at the end of the warm-up and the start of the decay; 0 or more."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's running means of the gradient and of its square, each in [0, 1)."""
    eps: float = 1e-8
    """Number added to AdamW's denominator, above 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices, 0 or more: each step shrinks them by the factor
    1 - learning rate x weight_decay. Norm weights and biases are not decayed."""
    clip: float | None = 1.0
    """Largest global norm of a gradient, above 0; a longer gradient is scaled down to it. inf never
    clips."""

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {self.betas}")
        # TOML has nan; every comparison with nan is False.
        if not (0 <= self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf):
            raise ValueError(
                f"learning_rate {self.learning_rate} and weight_decay {self.weight_decay} must be finite and not negative"
            )
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps {self.eps} must be finite and above 0")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip {self.clip} must be above 0; clip = inf never clips")


class ScheduleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[schedule]` table: warm-up and decay of the learning rate."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """Form of the decay after the warm-up: none, a straight line, or half a cosine wave."""
    warmup: int = 0
    """Steps with a linearly rising rate before the full rate, 0 or more. Step n of the warm-up,
    counted from 1, has the rate n / (warmup + 1)."""
    over: Literal["steps", "data"] = "steps"
    """Measure of the decay: the "steps" taken after the warm-up, or the share of the "data" read,
    which needs `run.epochs` and sources of known size."""
    steps: int | None = None
    """Step at which a decay over steps ends, above `warmup`. Default: the last step, `run.steps`; a
    run whose decay ends at a given step can be made longer later."""
    minimum: float = 0.0
    """Rate at the end of the decay, as a fraction of `learning_rate` in [0, 1]."""

    def __post_init__(self) -> None:
        if self.warmup < 0 or not 0 <= self.minimum <= 1:
            raise ValueError(f"warmup {self.warmup} must be 0 or more, and minimum {self.minimum} must lie in [0, 1]")
        if max(self.warmup, self.steps or 0) > 10**12:
            raise ValueError(f"warmup {self.warmup} and steps {self.steps} must be at most {10**12}")
        if self.steps is not None and self.steps <= self.warmup:
            raise ValueError(
                f"steps {self.steps} must exceed warmup {self.warmup}, since the decay follows the warm-up"
            )
        if self.steps is not None and self.over == "data":
            raise ValueError(
                f'steps {self.steps} has no meaning with over = "data"; remove steps, or set over = "steps"'
            )

    @property
    def decays_over_data(self) -> bool:
        """True if the rates depend on the share of the data read."""
        return self.kind != "constant" and self.over == "data"

    @property
    def decays_to_run_end(self) -> bool:
        """True if the decay ends at the run's last step, so that rates depend on its number."""
        return self.kind != "constant" and self.over == "steps" and self.steps is None

    def decay_end(self, run_steps: int | None) -> int:
        """Return the step at which a decay over steps ends: `steps`, else `run_steps`.

        `run_steps` is `run.steps`, None in a run over epochs. Raises ValueError if neither is
        known.
        """
        end = run_steps if self.steps is None else self.steps
        if end is None:
            raise ValueError(
                f"a {self.kind} schedule over steps needs its last step, and a run over epochs does not know its number of "
                'steps before its end; set schedule.over = "data" or schedule.steps'
            )
        return end


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """Return a fused AdamW over the trained parameters; weight decay applies to matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    decayed = {"params": matrices, "weight_decay": config.weight_decay}
    groups = [decayed, {"params": vectors, "weight_decay": 0.0}] if vectors else [decayed]
    optimizer = AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
    if copies := working_copies(model):
        optimizer.register_step_post_hook(copies.weights_changed)
    return optimizer


def reconfigure(optimizer: torch.optim.AdamW, config: OptimizerConfig) -> None:
    """Set the options of `config` on an optimizer whose state came from a checkpoint."""
    for group in optimizer.param_groups:
        decays = any(p.ndim > 1 for p in group["params"])
        group["betas"], group["eps"] = config.betas, config.eps
        group["weight_decay"] = config.weight_decay if decays else 0.0


def learning_rate(
    config: OptimizerConfig, schedule: ScheduleConfig, step: int, progress: float, total_steps: int | None
) -> float:
    """Return the learning rate of step `step`, counted from 0: full rate x warm-up x decay.

    `progress` in [0, 1] is the share of the data read before the step, for `over = "data"`.
    `total_steps` is the run's length, None if unknown. Raises ValueError if a decay over steps has
    no last step.
    """
    rise = min(1.0, (step + 1) / (schedule.warmup + 1))
    return config.learning_rate * rise * _decay(schedule, _share(schedule, step, progress, total_steps))


def _share(schedule: ScheduleConfig, step: int, progress: float, total_steps: int | None) -> float:
    """Return the finished part of the decay, in [0, 1]."""
    if schedule.kind == "constant":
        return 0.0
    if schedule.over == "data":
        return min(1.0, max(0.0, progress))
    decay_steps = max(1, schedule.decay_end(total_steps) - schedule.warmup)
    return min(1.0, max(0.0, (step - schedule.warmup) / decay_steps))


def _decay(schedule: ScheduleConfig, share: float) -> float:
    match schedule.kind:
        case "constant":
            falling = 1.0
        case "linear":
            falling = 1 - share
        case "cosine":
            falling = (1 + math.cos(math.pi * share)) / 2
    return schedule.minimum + (1 - schedule.minimum) * falling


@torch.no_grad()
def global_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the norm of all gradients, a float32 scalar on their device. Collective.

    The norm is computed in float32 over the shards of all ranks; replicated gradients count once.
    Partial sums over ranks are reduced first, in place. Does not wait for the device.
    """
    return _global_norm([_completed_gradient(p) for p in parameters if p.grad is not None])


@torch.no_grad()
def clipped_step(optimizer: AdamW, norm: Tensor, limit: float | None) -> None:
    """Take a step with gradients of the global norm `norm` scaled down to `limit`, if it is given.

    A norm that is not finite makes the weights not finite: the run ends, and nothing is saved.
    """
    # The optimizer divides by this number as it reads the gradients: no pass of its own.
    optimizer.grad_scale = None if limit is None else (norm / limit).clamp(min=1.0)
    optimizer.step()


def _completed_gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
        assert isinstance(parameter, DTensor)
        gradient = gradient.redistribute(placements=parameter.placements)
        parameter.grad = gradient
    return gradient


def _global_norm(gradients: list[Tensor]) -> Tensor:
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_groups[_groups_of_shards(gradient)].append(local(gradient))
    squares = [_square(shards, groups) for groups, shards in by_groups.items()]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def _square(shards: list[Tensor], groups: tuple[dist.ProcessGroup, ...]) -> Tensor:
    square = torch.stack(torch._foreach_norm(shards, 2, dtype=torch.float32)).square().sum()
    for group in groups:
        dist.all_reduce(square, group=group)
    return square


def _groups_of_shards(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the process groups with different parts of `tensor` on each rank."""
    if not isinstance(tensor, DTensor):
        return ()
    dims = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return tuple(tensor.device_mesh.get_group(dim) for dim in dims)
