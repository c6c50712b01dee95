"""Sums of known gradients over replicas, on CPUs or GPUs."""

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.llama.replicas import SMALL, ReplicaSums

SHAPES = [(SMALL + 7,), (3, 5), (1,), (SMALL // 4, 5)]
DTYPES = (torch.float32, torch.bfloat16)


def gradients(rank: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=draw).to(dtype) for shape in SHAPES]


def summed(group: dist.ProcessGroup, given: torch.dtype, wanted: torch.dtype, device: str = "cpu") -> list[Tensor]:
    sums = ReplicaSums(group)
    found = [sums.begin(gradient.to(device), wanted) for gradient in gradients(group.rank(), given)]
    sums.finish()
    return [total.cpu() for total in found]


def assert_exact(ranks: list[list[Tensor]], given: torch.dtype, wanted: torch.dtype) -> None:
    """Two numbers have one sum in float32. More may be added in another order than here."""
    for found in ranks:
        assert all(torch.equal(*pair) for pair in zip(found, ranks[0], strict=True))
    every = zip(*(gradients(rank, given) for rank in range(len(ranks))), strict=True)
    for total, same in zip(ranks[0], every, strict=True):
        expected = torch.stack(same).float().sum(0)
        assert total.dtype == wanted
        torch.testing.assert_close(total, expected.to(wanted))
        different = (total != expected.to(wanted)).float().mean()
        limit = 0.001 if wanted == torch.bfloat16 else 0.5
        assert different < limit if len(ranks) > 2 else different == 0
