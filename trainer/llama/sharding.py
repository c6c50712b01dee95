"""The share of a tensor that one rank holds."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def window(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's part lies in the full tensor."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    # What distributed checkpoints ask a sharded tensor; it knows the strided shards of two mesh dimensions as well.
    (part,) = tensor.__create_chunk_list__()
    return tuple(slice(start, start + size) for start, size in zip(part.offsets, part.sizes, strict=True))


def local_weight(weight: Tensor) -> Tensor:
    """What this rank computes with of a weight, as a plain tensor.

    Layers compute on plain tensors: for DTensors torch goes through Python at each operation, and works out anew for each
    shape who holds what. A weight that all ranks hold meets the tokens of each by themselves, and so gets partial sums as
    its gradient.
    """
    if not isinstance(weight, DTensor):
        return weight
    return weight.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in weight.placements])


def gather_full(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    placements = list(tensor.placements)
    for dim in range(len(placements)):
        # Data parallelism, the first dimensions, cut what tensor parallelism had cut before, and so is undone first.
        placements[dim] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()
