"""Replicas sum gradients in float32, round once, and hold equal bits."""

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_ranks
from replica_sums import DTYPES, assert_exact, summed
from torch import Tensor


def on_a_rank(rank: int, given: torch.dtype, wanted: torch.dtype) -> list[Tensor]:
    return summed(dist.group.WORLD, given, wanted)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_a_sum_over_replicas_is_the_float32_sum_rounded_once(
    ranks: int, given: torch.dtype, wanted: torch.dtype
) -> None:
    assert_exact(run_ranks(ranks, on_a_rank, given, wanted), given, wanted)
