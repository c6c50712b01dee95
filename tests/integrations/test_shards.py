"""The processes of another trainer agree on the state and the end of the data, over CPUs."""

from __future__ import annotations

from itertools import islice
from typing import Any

import msgspec
import pytest
import tiny
from hosts import Hosts

from sftstream import DataConfig, PackLoader, Shard
from sftstream.integrations import PackDataset, Shards


@pytest.fixture(scope="module")
def wide(tokenizer: str, corpus_path: str) -> DataConfig:
    return tiny.data_config(tokenizer, corpus_path, streams=8, global_batch=8, window=4)


def _read(rank: int, config: DataConfig, steps: int, same: int) -> tuple[list[Any], dict[str, Any], list[bool]]:
    """Read some steps on this rank; `same` neighbouring ranks have the same shard."""
    dataset = PackDataset(config, shard=Shard(rank // same, 4 // same))
    shards, batches = Shards(dataset), iter(dataset)
    ids, ends = [], []
    for _ in range(steps):
        ids += [batch["input_ids"][0].tolist() for batch in islice(batches, dataset.micro_batches)]
        ends.append(shards.finished())
    next(batches)  # as a trainer that requests a batch ahead
    return ids, shards.state_dict(steps * 8), ends


@pytest.mark.parametrize("same", [1, 2])
def test_all_processes_have_the_state_of_the_run_and_see_its_end(hosts: Hosts, wide: DataConfig, same: int) -> None:
    whole = [pack.ids.tolist() for pack in PackLoader(wide)]
    last = len(whole) // 8
    results = hosts.ranks(4, _read, wide, last - 1, same)
    state = results[0][1]
    assert [result[1] for result in results] == 4 * [state]
    assert results[0][0] == [ids for number, ids in enumerate(whole[:-8]) if number % (4 // same) == 0]
    rest = [batch["input_ids"][0].tolist() for batch in PackDataset(wide, state=state)]
    assert rest == whole[-8:]
    ends = hosts.ranks(4, _read, wide, last, same)
    assert [result[2] for result in ends] == 4 * [[False] * (last - 1) + [True]]


def _unsharded(rank: int, config: DataConfig) -> list[str]:
    batches = iter(PackDataset(config))
    first = next(batches)  # TRL looks at it
    try:
        next(batches)
    except ValueError as error:
        return [str(error), *first]
    return []


def test_processes_that_would_all_read_the_whole_run_are_refused(hosts: Hosts, wide: DataConfig) -> None:
    errors = hosts.ranks(2, _unsharded, wide)
    assert all("pass shard=Shard(rank, 2) to PackDataset" in error for error, *_ in errors)


def test_the_number_of_streams_is_chosen_once_for_all_topologies(wide: DataConfig) -> None:
    auto = msgspec.structs.replace(wide, streams="auto")
    two = [PackDataset(auto).shard(2, index) for index in range(2)]
    first = [next(iter(part))["input_ids"].tolist() for part in two]
    chosen = two[0].loader.config.stream_count
    assert first == [pack.input_ids[None].tolist() for pack in islice(PackLoader(two[0].loader.config), 2)]
    assert chosen % 2 == 0
