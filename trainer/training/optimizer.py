"""AdamW, its learning rate as a pure function, and clipping by the norm of the whole gradient."""

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

from trainer.llama.model import local


class OptimizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[optimizer]` table."""

    learning_rate: float = 2e-5
    """The highest: what the warm-up ends at and the schedule starts from."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled, on matrices only: norms are not drawn to zero."""
    clip: float | None = 1.0
    """The largest global norm of a gradient; None or inf: as it comes."""

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {self.betas}")
        # TOML knows nan, of which no comparison holds.
        if not (0 <= self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf):
            raise ValueError(
                f"learning_rate {self.learning_rate} and weight_decay {self.weight_decay} must be finite and not negative"
            )
        if not self.eps > 0 or (self.clip is not None and not self.clip > 0):
            raise ValueError(f"eps {self.eps} and clip {self.clip} must be above 0; clip = inf never clips")


class ScheduleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[schedule]` table."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    """Steps of linear rise before the full rate."""
    over: Literal["steps", "data"] = "steps"
    """What the decay follows: the steps taken or the share of the data used."""
    steps: int | None = None
    """Step at which the decay ends; None: the run's last."""
    minimum: float = 0.0
    """Where the decay ends, as a fraction of the full rate."""

    def __post_init__(self) -> None:
        if self.warmup < 0 or not 0 <= self.minimum <= 1:
            raise ValueError(f"warmup {self.warmup} must not be negative and minimum {self.minimum} lie in [0, 1]")
        if self.steps is not None and self.steps <= self.warmup:
            raise ValueError(f"steps {self.steps} must exceed warmup {self.warmup}: the decay follows the warm-up")
        if self.steps is not None and self.over == "data":
            raise ValueError(f"steps {self.steps} has no meaning with over = 'data': leave one of them out")

    @property
    def decays_to_run_end(self) -> bool:
        """True if the decay ends at the run's last step, so that the rate of every step depends on the run's length."""
        return self.kind != "constant" and self.over == "steps" and self.steps is None

    def decay_end(self, run_steps: int | None) -> int:
        """Return the step at which a decay over steps ends: `steps`, else the run's last step `run_steps`.

        Raises ValueError if neither is known.
        """
        end = run_steps if self.steps is None else self.steps
        if end is None:
            raise ValueError(
                f"a {self.kind} schedule over steps needs its last step, and a run over epochs does not know its number of "
                'steps before its end; set schedule.over = "data" or schedule.steps'
            )
        return end


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the model's parameters, sharded as they are, in one fused kernel a step on CPU and GPU alike."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(
    config: OptimizerConfig, schedule: ScheduleConfig, step: int, progress: float, total_steps: int | None
) -> float:
    """The rate of step `step`, counted from 0: warm-up times decay.

    `progress` in [0, 1] is the share of the data used before this step and counts with `over = "data"`. `total_steps`
    is the run's length, None where it isn't known. Raises ValueError where a decay over steps has no end.
    """
    rise = min(1.0, (step + 1) / (schedule.warmup + 1))
    return config.learning_rate * rise * _decay(schedule, _share(schedule, step, progress, total_steps))


def _share(schedule: ScheduleConfig, step: int, progress: float, total_steps: int | None) -> float:
    """How much of the decay lies behind, in [0, 1]."""
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
def clip_by_global_norm(parameters: Iterable[Tensor], limit: float | None) -> float:
    """Scale all gradients so that their common norm is at most `limit`; returns the norm before, on every rank.

    The norm is that of the full gradient, in fp32, over the shards of all ranks, a replicated one counted once.
    Gradients that are still partial sums over ranks are reduced first, for good. Waits for the device once. A norm
    that isn't finite is returned and scales nothing: the caller decides.
    """
    gradients = [_completed_gradient(p) for p in parameters if p.grad is not None]
    norm = _global_norm(gradients)
    if limit is not None and limit < norm < math.inf:
        torch._foreach_mul_([local(gradient) for gradient in gradients], limit / norm)
    return norm


def _completed_gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
        assert isinstance(parameter, DTensor)
        gradient = gradient.redistribute(placements=parameter.placements)
        parameter.grad = gradient
    return gradient


def _global_norm(gradients: list[Tensor]) -> float:
    by_owners: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_owners[_groups_of_shards(gradient)].append(local(gradient))
    squares = [_square(shards, groups) for groups, shards in by_owners.items()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _square(shards: list[Tensor], groups: tuple[dist.ProcessGroup, ...]) -> Tensor:
    square = torch.stack(torch._foreach_norm(shards, 2, dtype=torch.float32)).square().sum()
    for group in groups:
        dist.all_reduce(square, group=group)
    return square


def _groups_of_shards(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups whose ranks hold different parts of a tensor."""
    if not isinstance(tensor, DTensor):
        return ()
    dims = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return tuple(tensor.device_mesh.get_group(dim) for dim in dims)
