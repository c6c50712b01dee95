"""AdamW whose running means of matrices have 8 bits, in blocks: the arithmetic of torchao.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", https://arxiv.org/abs/2110.02861.
A mean is a code of 8 bits for each number, and for each block of numbers in a row the largest
absolute value as a float32 scale. torchao reads, updates and stores them; the codes and scales
themselves are plain tensors, placed over the ranks as the weight is:

| tensor           | of a weight `(512, 1024)`, blocks of 256 | on rank 1 of two that split rows |
|------------------|------------------------------------------|----------------------------------|
| `exp_avg_codes`  | uint8 `(512, 1024)`                      | rows 256 to 511                  |
| `exp_avg_scales` | float32 `(512, 4)`                       | rows 256 to 511                  |

No block leaves its row. So the split of rows over ranks changes no block, and a split of columns
changes none as long as the part on a rank is a multiple of the block.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.llama.sharding import local

BLOCKS = (256, 128, 64)
"""Possible numbers of a block; the largest that divides the row on a rank is taken."""
SMALLEST = 4096
"""Numbers of a weight from which on its means have 8 bits, as in torchao."""
MEANS = {"exp_avg": True, "exp_avg_sq": False}
"""Name of each running mean, and True if it has negative numbers."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with means of 8 bits for matrices; gradients count as divided by `grad_scale`.

    Weights without a block size, such as those of norms, have means of their own dtype.
    """

    grad_scale: Tensor | None = None
    """float32 scalar on the device of the weights; None divides by 1."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ARG002 - a closure of torch's interface
        """Update all weights that have a gradient. Does not wait for the device."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state as it is; torch's own method would cast codes to the weight's dtype."""
        super().load_state_dict(state_dict)
        saved, held = (
            chain.from_iterable(group["params"] for group in groups)
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        for number, weight in zip(saved, held, strict=True):
            if number in state_dict["state"]:
                self.state[weight] = dict(state_dict["state"][number])

    def _update(self, weight: nn.Parameter, group: dict[str, Any]) -> None:
        state, block = self.state[weight], block_of(weight)
        if not state:
            state.update(_first_state(weight, block))
        state["step"] += 1
        assert weight.grad is not None
        part, gradient = local(weight).detach(), local(weight.grad)
        if not part.numel():
            return
        gradient = gradient if self.grad_scale is None else gradient.float() / self.grad_scale
        means = [_mean(state, name, part, block) for name in MEANS]
        arithmetic, *_ = _torchao()
        compiled = _compiled(arithmetic) if part.is_cuda else arithmetic
        compiled(
            part,
            gradient,
            state["step"],
            *means,
            None,
            torch.tensor(group["lr"], dtype=torch.float32),
            *group["betas"],
            group["weight_decay"],
            group["eps"],
            True,
            False,
        )


class Misplaced(NamedTuple):
    """A weight whose stored means have other blocks than the means of this topology."""

    weight: str
    before: int | None
    """Numbers of a block in the checkpoint, None for means that are not quantized."""
    now: int | None


def block_size(numel: int, rows: tuple[int, ...]) -> int | None:
    """Return the numbers of a block, or None for a weight whose means are not quantized.

    `numel` is the number of the whole weight, `rows` the shape of the part on a rank.
    """
    if len(rows) != 2 or numel < SMALLEST:
        return None
    return next((size for size in BLOCKS if rows[1] % size == 0), None)


def block_of(weight: Tensor) -> int | None:
    """Return the numbers of a block of a weight's means, as `block_size` does."""
    return block_size(weight.numel(), tuple(local(weight).shape))


def misplaced(state: Mapping[str, Mapping[str, Any]], stored: Mapping[str, tuple[int, ...]]) -> Misplaced | None:
    """Return the first weight whose blocks differ from those of a checkpoint, None if all agree.

    `state` maps the name of each weight to its state on this topology; `stored` has the shapes of
    the checkpoint's tensors, by names such as `head.weight.exp_avg_scales`.
    """
    for weight, tensors in state.items():
        shapes = {f"{weight}.{name}": tuple(tensor.shape) for name, tensor in tensors.items() if name != "step"}
        before, now = (_block_in(found, weight) for found in (stored, shapes))
        if before != now:
            return Misplaced(weight, before, now)
    return None


def require_torchao() -> None:
    """Raise ValueError if torchao is missing. Imports nothing."""
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(
            'optimizer.kind = "adamw8bit" needs torchao; install it with: pip install "sftstream[torchao]", or set '
            'optimizer.kind = "adamw"'
        )


def _block_in(shapes: Mapping[str, tuple[int, ...]], weight: str) -> int | None:
    codes, scales = (shapes.get(f"{weight}.exp_avg_{part}") for part in ("codes", "scales"))
    return None if codes is None or scales is None else codes[1] // scales[1]


def _first_state(weight: nn.Parameter, block: int | None) -> dict[str, Tensor]:
    part = local(weight).detach()
    state = {"step": torch.zeros((), dtype=torch.float32)}
    for name in MEANS:
        if block is None:
            state[name] = _placed_as(weight, torch.zeros_like(part), weight.shape)
            continue
        rows, columns = part.shape
        scales = torch.zeros(rows, columns // block, device=part.device)
        whole = torch.Size((weight.shape[0], weight.shape[1] // block))
        state[f"{name}_codes"] = _placed_as(weight, torch.zeros_like(part, dtype=torch.uint8), weight.shape)
        state[f"{name}_scales"] = _placed_as(weight, scales, whole)
    return state


def _mean(state: dict[str, Tensor], name: str, part: Tensor, block: int | None) -> Tensor:
    """Return a running mean as torchao computes with it, sharing storage with the state."""
    if block is None:
        return local(state[name])
    codes, scales = local(state[f"{name}_codes"]), local(state[f"{name}_scales"])
    _, subclass, values = _torchao()
    signed = MEANS[name]
    mean: Tensor = subclass(codes, scales.view(-1), values(signed, part.device), signed, part.dtype)
    return mean


def _placed_as(weight: Tensor, part: Tensor, shape: torch.Size) -> Tensor:
    """Return the part on this rank of a tensor of `shape`, placed over the ranks as `weight` is."""
    if not isinstance(weight, DTensor):
        return part
    return DTensor.from_local(
        part,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


@cache
def _torchao() -> tuple[Callable[..., None], Any, Callable[[bool, torch.device], Tensor]]:
    """Return the update, the class of a mean, and the function of the values of codes."""
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")  # none of its libraries is needed
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    @cache
    def values(signed: bool, device: torch.device) -> Tensor:
        found: Tensor = OptimState8bit.zeros((1, 1), signed, 1, device).qmap
        return found

    return single_param_adam, OptimState8bit, values


@cache
def _compiled(update: Callable[..., None]) -> Callable[..., None]:
    """Return an update that passes over the weight once, compiled for each shape."""
    compiled = torch.compile(update, fullgraph=True, dynamic=False)

    def call(*given: Any) -> None:
        with torch._dynamo.utils.disable_cache_limit():  # the number of shapes is fixed
            compiled(*given)

    return call
