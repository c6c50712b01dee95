"""The part of a DTensor on this rank, and the gathering of the full tensor.

A plain tensor counts as full: each function here accepts plain tensors too.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate


def local(tensor: Tensor) -> Tensor:
    """Return the part of `tensor` on this rank, sharing storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def window(tensor: Tensor) -> tuple[slice, ...]:
    """Return the slice of each dimension of the full tensor held by this rank."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    # Distributed checkpoints call this method too: it handles the strided parts that two mesh
    # dimensions cut from one tensor dimension.
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """Return a weight to compute with: a plain tensor through which gradients flow.

    The result is the working copy of the weight if `working.py` made one, else the part of the
    weight on this rank. Layers compute on plain tensors because DTensor operations go through
    Python and derive their placements again for each new shape.
    """
    copy: Tensor | None = getattr(module, f"{name}_copy", None)
    if copy is not None:
        return copy
    weight: Tensor = getattr(module, name)
    return weight.to_local(grad_placements=gradient_placements(weight)) if isinstance(weight, DTensor) else weight


def gradient_placements(weight: DTensor) -> list[Placement]:
    """Return the placements of a gradient of `weight`.

    A replicated weight sees only the tokens of this rank, so its gradient is a partial sum.
    """
    return [Partial() if placement.is_replicate() else placement for placement in weight.placements]


def gather_full(tensor: Tensor) -> Tensor:
    """Return the full tensor on every rank; every rank must call."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements = list(tensor.placements)
    for dim in range(len(placements)):
        # Data parallelism, the first mesh dimensions, cut the parts made by tensor parallelism, and
        # is gathered first.
        placements[dim] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()
