"""The part of a DTensor on this rank, and the gathering of the full tensor.

A plain tensor counts as full: each function here accepts plain tensors too.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


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


def local_weight(weight: Tensor) -> Tensor:
    """Return the part of `weight` on this rank as a plain tensor through which gradients flow.

    Layers compute on plain tensors because DTensor operations go through Python and derive their
    placements again for each new shape. A replicated weight sees only the tokens of this rank, so
    the gradient is marked as a partial sum.
    """
    if not isinstance(weight, DTensor):
        return weight
    return weight.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in weight.placements])


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
