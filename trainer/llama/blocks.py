"""Recompute activations to save memory, and compile code to save time, in every block of a model.

Only methods of a module are replaced: parameter names stay, and the hooks that gather weights still
run around `forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, Literal

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.llama.attention import Kernel
from trainer.llama.model import Block, Linear, Llama

Recompute = Literal["none", "selective", "full"]
WAYS: tuple[Recompute, ...] = ("none", "selective", "full")
"""Ways to recompute, in rising order of saved memory and of time."""


def start_compiler() -> None:
    """Start the processes that compile kernels of a GPU: they need seconds to be ready."""
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()


def import_compiler() -> None:
    """Import the compiler, which takes a second, before `prepare_blocks` needs it."""
    import torch._inductor.compile_fx  # noqa: F401


def use_kernel(model: Llama, kernel: Kernel | None) -> None:
    """Set the attention kernel of each block; None is that of each device that needs no package."""
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention.kernel = kernel


def prepare_blocks(model: Llama, *, recompute: Recompute, compiled: bool, float8: bool = False) -> None:
    """Set recomputation, compilation and float8 for each block, in place.

    `float8` multiplies all matrices of the blocks in float8, but not those of adapters.

    `recompute` selects the activations that the backward pass computes again instead of storing
    them: "none"; "selective", the activations inside the feed-forward, the widest of a block;
    "full", all but the input of the block. The backward pass begins with the last block, which
    "full" leaves out. Recomputation changes no bit of layers that are not compiled.

    `compiled` changes rounding, and for each `recompute` otherwise: the compiler joins other
    operations. `Block.before` and `Block.after` are compiled once for all blocks and all packs of a
    capacity, since only the attention in between sees the segment borders. The last block's `after`
    is not compiled for selected positions: their number differs from pack to pack.
    """
    for block in model.blocks:
        assert isinstance(block, Block)
        for module in block.modules():
            if isinstance(module, Linear):
                module.float8 = float8
        if recompute == "selective":
            _recompute(block.mlp)
        if compiled:
            _replace(block, "before", torch.compile)
            _replace(block, "after", _compile_for_all if block is model.blocks[-1] else torch.compile)
        if recompute == "full" and block is not model.blocks[-1]:
            _recompute(block)
            if compiled and not float8:
                # A recomputation stops at the last input that the backward pass needs. The last
                # product, outside of the compiled code, is not computed again then, unless an
                # adapter follows it. In float8 the rounding of its inputs, outside of the compiled
                # code, would take longer than the product.
                _replace(block.mlp.down, "forward", torch.compiler.disable)
    if compiled:
        # Without this flag the compiler picks kernels by their time, and another pick sums in
        # another order.
        torch._inductor.config.deterministic = torch.are_deterministic_algorithms_enabled()
        # Elementwise results that a product of the backward pass reads, such as a norm's output,
        # are computed again: as fast, and 1.0 GiB less in Llama 3.2 1B.
        torch._functorch.config.ban_recompute_materialized_backward = False


def _replace(module: nn.Module, method: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(module, method, wrap(getattr(module, method)))


def _compile_for_all(after: Callable[..., Any]) -> Callable[..., Any]:
    """Compile the end of a layer for all tokens, and leave it as it is for selected tokens."""
    every = torch.compile(after)

    def compiled(x: Tensor, attended: Tensor, positions: Tensor | None) -> Any:
        return (every if positions is None else after)(x, attended, positions)

    return compiled


def _recompute(module: nn.Module) -> None:
    """Compute `module` again in the backward pass."""
    # A method of the same function in all layers: for another object in each layer, the compiler
    # would compile the layers one by one, up to its limit of eight.
    module.forward = MethodType(_recomputed, module)


def _recomputed(module: nn.Module, *inputs: Any) -> Any:
    # No random state to preserve: nothing in a block draws random numbers.
    return checkpoint(type(module).forward, module, *inputs, use_reentrant=False, preserve_rng_state=False)
