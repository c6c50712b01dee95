"""What is done to every block of a model: activations computed twice to save memory, code compiled to save time.

Only each module's `forward` is replaced: names of parameters stay, and the hooks that gather weights run around it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch._inductor.config
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.llama.model import Block, Llama

Recompute = Literal["none", "selective", "full"]


def prepare_blocks(model: Llama, *, recompute: Recompute, compiled: bool) -> None:
    """Recompute and compile the forward of each of the model's blocks, in place.

    `recompute` says which activations the backward pass computes again instead of finding them stored: those inside the
    feed-forward, the widest of a block ("selective"), or all but the block's input ("full"). It changes no bit. Compiled
    code rounds otherwise. It is compiled once for all blocks and all packs of a capacity: attention, which alone sees the
    borders of segments, is called from it and not part of it.
    """
    for block in model.blocks:
        assert isinstance(block, Block)
        if recompute == "selective":
            _replace_forward(block.mlp, _recomputed)
        if compiled:
            _replace_forward(block, torch.compile)
        if recompute == "full":
            _replace_forward(block, _recomputed)
    if compiled:
        # Else the compiler picks among kernels by the clock, and another pick sums in another order.
        torch._inductor.config.deterministic = torch.are_deterministic_algorithms_enabled()
        model.register_forward_pre_hook(_expect_any_borders)


def _replace_forward(module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module.forward = wrap(module.forward)


def _expect_any_borders(_model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Compiled code hands the borders on to attention; torch 2.11 takes their number for a part of it otherwise."""
    torch._dynamo.maybe_mark_dynamic(inputs[2].cu_seqlens, 0)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    # Nothing in a block draws random numbers.
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
