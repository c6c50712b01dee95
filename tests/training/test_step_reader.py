"""Tensor-parallel ranks get equal packs from one loader, and all ranks agree on a step's totals."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import gloo_ranks
import msgspec
import pytest
import tiny
import torch
from torch.distributed.device_mesh import init_device_mesh

from sftstream import DataConfig, PackAssignment, PackLoader, batch_digest
from trainer.distributed.mesh import Topology
from trainer.training import step_reader
from trainer.training.step_reader import StepReader, StepTotals, gather_refusals, open_loader, reduce_totals

STEPS = 3


def _steps(rank: int, config: DataConfig, dp: int, tp: int) -> list[tuple[list[str], StepTotals, int]]:
    """Return per step: digests of this rank's packs, the totals, the number of gathered
    refusals."""
    topology = Topology(init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp")), torch.device("cpu"))
    loader = PackLoader(config, shard=topology.shard) if topology.leads else None
    step_reader = StepReader(
        loader, PackAssignment(config.stream_count, config.global_batch, dp), config.capacity, topology.tp_group
    )
    result = []
    for step in range(STEPS):
        packs = step_reader.packs(step)
        count = reduce_totals(step, packs, step_reader, topology, stop=rank == 1)
        result.append((tiny.digests(packs), count, len(gather_refusals(packs, step_reader, topology))))
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
                assert count.unexhausted_shards == dp
                assert count.stop == 1  # rank 1 was asked to stop


def _beside_a_loader(config: DataConfig, steps: int) -> str:
    """Compare a StepReader that reads ahead with a plain loader; return the error that ended it, or
    "enough"."""
    assignment = PackAssignment(config.stream_count, config.global_batch, 1)
    alone = PackLoader(config, workers=0)
    step_reader = StepReader(PackLoader(config), assignment, config.capacity, ahead=True)
    end = "enough"
    for step in range(steps):
        try:
            packs = step_reader.packs(step)
        except ValueError as error:
            end = str(error)
            break
        assert tiny.digests(packs) == tiny.digests(alone.next_step())
        step_reader.read_ahead()
        assert step_reader.position is not None
        assert step_reader.position.state == alone.state
        assert step_reader.position.header == msgspec.structs.replace(alone.state, streams={})
        assert step_reader.position.encoded_streams == {
            number: msgspec.msgpack.encode(stream) for number, stream in alone.state.streams.items()
        }
        time.sleep(0.002)  # lets the thread read ahead
    step_reader.close()
    assert step_reader.position is not None
    assert step_reader.position.state == alone.state
    return end


@pytest.mark.parametrize("epochs", [1, None])
def test_reading_ahead_does_not_move_the_position(config: DataConfig, epochs: int | None) -> None:
    ahead = msgspec.structs.replace(config, epochs=epochs, workers=2)
    assert _beside_a_loader(ahead, 30) == "enough"


def test_reading_ahead_raises_an_error_at_its_own_step(tokenizer: str, tmp_path: Path) -> None:
    rows = [*tiny.rows(200), *[{"text": str(number)} for number in range(400)]]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    config = tiny.data_config(tokenizer, path, epochs=1, shuffle=False, max_refused=0.5, workers=1)
    assert "length, more than data.max_refused = 0.5" in _beside_a_loader(config, 1000)


def test_refused_rows_of_all_ranks_reach_the_first_rank(tokenizer: str, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    rows = [*tiny.rows(12), *[{"text": str(number)} for number in range(12)]]
    path = tiny.write_jsonl(tmp_path_factory.mktemp("corpus") / "rows.jsonl", rows)
    config = tiny.data_config(tokenizer, path, epochs=1)
    first, second = gloo_ranks.run_ranks(2, _steps, config, 2, 1)
    assert sum(count for _, _, count in first) == sum(count.refused for _, count, _ in first) == 12
    assert sum(count for _, _, count in second) == 0


class _AnotherDay(datetime):
    """A clock that is a day ahead."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:
        return datetime.now(tz) + timedelta(days=1)


def _date_of_templates(rank: int, config: DataConfig) -> tuple[str, str | None]:
    """Open the loader on a rank whose clock is a day ahead of the first rank's, or in another zone."""
    before = datetime.now(UTC).date().isoformat()
    os.environ["TZ"] = "Pacific/Kiritimati" if rank else "Etc/GMT+12"  # never the same local day
    time.tzset()
    if rank:
        step_reader.datetime = _AnotherDay  # type: ignore[misc]
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    loader = open_loader(config, Topology(mesh, torch.device("cpu")), None, 1000)
    assert loader is not None
    return before, loader.position().header.identity.date


def test_all_ranks_take_the_first_ranks_day_in_utc_for_a_template_that_prints_the_date(
    tmp_path: Path, corpus_path: str
) -> None:
    tokenizer = tiny.save_tokenizer(tmp_path / "dated", template=tiny.DATED_TEMPLATE)
    config = tiny.data_config(tokenizer, corpus_path, streams=2, global_batch=2)
    (today, first), (_, second) = gloo_ranks.run_ranks(2, _date_of_templates, config)
    assert first == second
    assert first in (today, datetime.now(UTC).date().isoformat())  # the test may run over midnight
