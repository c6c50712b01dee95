"""Ranks that share layers get the same bytes from one loader, and all ranks agree on what a step holds."""

from __future__ import annotations

import gloo_ranks
import tiny
import torch
from torch.distributed.device_mesh import init_device_mesh

from sftstream import DataConfig, Deal, PackLoader, batch_digest
from trainer.feed import Feed, Tally, gather_refusals, tally
from trainer.mesh import Topology

STEPS = 3


def _steps(rank: int, config: DataConfig, dp: int, tp: int) -> list[tuple[list[str], Tally, int]]:
    """Per step: this rank's packs, the tally, the refusals that the first rank hears of."""
    topology = Topology(init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp")), torch.device("cpu"))
    loader = PackLoader(config, shard=topology.shard) if topology.leads else None
    feed = Feed(loader, topology, Deal(config.streams, config.global_batch, dp), config.capacity)
    result = []
    for step in range(STEPS):
        packs = feed.packs(step)
        count = tally(step, packs, feed, topology, stop=rank == 1)
        result.append((tiny.digests(packs), count, len(gather_refusals(packs, feed, topology))))
    return result


def test_every_rank_of_a_coordinate_gets_its_packs_and_all_agree_on_the_step(config: DataConfig) -> None:
    alone = PackLoader(config)
    steps = [tiny.take(alone, config.global_batch) for _ in range(STEPS)]
    for dp, tp in ((1, 2), (2, 1), (2, 2)):
        ranks = gloo_ranks.run_ranks(dp * tp, _steps, config, dp, tp)
        for number, packs in enumerate(steps):
            expected = tiny.digests(packs)
            for rank, result in enumerate(ranks):
                digests, count, _ = result[number]
                assert digests == expected[rank // tp :: dp]
                assert count.digest == batch_digest(expected)
                assert count.tokens == sum(pack.tokens for pack in packs)
                assert count.trained_tokens == sum(pack.trained_tokens for pack in packs)
                assert count.rows == sum(len(pack.segments) + len(pack.refused) for pack in packs)
                assert count.live == dp
                assert count.stop == 1  # rank 1 asked, all know


def test_refused_rows_reach_the_first_rank_wherever_they_were_read(tokenizer: str, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    rows = [*tiny.rows(12), *[{"text": str(number)} for number in range(12)]]
    path = tiny.write_jsonl(tmp_path_factory.mktemp("corpus") / "rows.jsonl", rows)
    config = tiny.data_config(tokenizer, path, epochs=1)
    first, second = gloo_ranks.run_ranks(2, _steps, config, 2, 1)
    assert sum(count for _, _, count in first) == sum(count.refused for _, count, _ in first) == 12
    assert sum(count for _, _, count in second) == 0
