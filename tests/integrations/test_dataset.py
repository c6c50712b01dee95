"""A PackDataset gives another trainer the packs of a PackLoader, and states of handed-out batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from sftstream import DataConfig, PackLoader, Shard, merge
from sftstream.integrations import PackDataset, hugging_face, last_checkpoint, shifted, write_state_file
from sftstream.integrations.layouts import Batch

LAYOUTS = {"hugging_face": hugging_face, "shifted": shifted}


@pytest.fixture(scope="module")
def wide(tokenizer: str, corpus_path: str) -> DataConfig:
    return tiny.data_config(tokenizer, corpus_path, streams=8, global_batch=8, window=4)


@pytest.fixture(scope="module")
def whole(wide: DataConfig) -> list[list[int]]:
    """The token ids of all packs of the run."""
    return [pack.ids.tolist() for pack in PackLoader(wide)]


def ids(batches: Any) -> list[list[int]]:
    return [batch["input_ids"][0].tolist() for batch in batches]


def plain(dataset: PackDataset) -> Any:
    return dataset


def loaded(dataset: PackDataset) -> Any:
    return DataLoader(dataset, batch_size=None)


def stateful(dataset: PackDataset) -> Any:
    return StatefulDataLoader(dataset, batch_size=None)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("host", [plain, loaded, stateful])
def test_batches_are_the_packs_of_the_run(wide: DataConfig, whole: list[list[int]], host: Any, workers: int) -> None:
    assert ids(host(PackDataset(wide, workers=workers))) == whole


def test_a_batch_of_each_layout_has_the_values_of_its_pack(wide: DataConfig) -> None:
    pack = next(PackLoader(wide))
    batch = next(iter(PackDataset(wide)))
    assert list(batch) == PackDataset(wide).column_names
    assert {name: tuple(batch[name].shape) for name in ("input_ids", "labels", "position_ids")} == {
        "input_ids": (1, 256),
        "labels": (1, 256),
        "position_ids": (1, 256),
    }
    assert batch["labels"][0, 1:].tolist() == pack.labels[:-1].tolist()
    assert batch["labels"][0, 0] == -100
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == pack.borders.tolist()
    assert batch["max_length_q"] == batch["max_length_k"] == pack.max_seqlen
    other = next(iter(PackDataset(wide, layout=shifted)))
    assert other["labels"][0].tolist() == pack.labels.tolist()
    assert other["cu_seqlens"].dtype == torch.int32
    assert (other["cu_seqlens"].tolist(), other["max_seqlen"]) == (pack.borders.tolist(), pack.max_seqlen)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_is_that_of_the_last_batch_handed_out(wide: DataConfig, whole: list[list[int]], workers: int) -> None:
    dataset = PackDataset(wide, workers=workers)
    states = [dataset.state_dict()]
    states += [dataset.state_dict() for _ in dataset]
    for position in range(0, len(whole) + 1, 5):
        assert ids(PackDataset(wide, state=states[position])) == whole[position:]
    later = PackDataset(wide)
    later.load_state_dict(states[11])
    assert later.state_dict() == states[11]
    assert ids(later) == whole[11:]


def test_a_stateful_loader_restores_the_dataset(wide: DataConfig, whole: list[list[int]]) -> None:
    loader = stateful(PackDataset(wide))
    assert ids(islice(loader, 7)) == whole[:7]
    state = loader.state_dict()
    fresh = stateful(PackDataset(wide))
    fresh.state_dict()  # as accelerate does, before it loads the state
    fresh.load_state_dict(state)
    assert ids(fresh) == whole[7:]


def test_the_state_of_a_step_is_known_after_the_first_batches_of_the_next(
    wide: DataConfig, whole: list[list[int]]
) -> None:
    dataset = PackDataset(wide)
    assert ids(islice(dataset, 19)) == whole[:19]  # two steps of 8 and three batches ahead
    assert ids(PackDataset(wide, state=dataset.state_dict(16))) == whole[16:]
    with pytest.raises(ValueError, match="the state after 24 packs is not kept, only those after 0, 8, 16;"):
        dataset.state_dict(24)


def shards(config: DataConfig, count: int, state: Any = None) -> list[PackDataset]:
    return [PackDataset(config, state=state).shard(count, index) for index in range(count)]


def steps(datasets: list[PackDataset], iterators: list[Iterator[Batch]], count: int) -> list[list[int]]:
    return [i for _ in range(count * datasets[0].micro_batches) for i in ids(next(packs) for packs in iterators)]


def test_any_number_of_shards_reads_the_same_global_batches(wide: DataConfig, whole: list[list[int]]) -> None:
    state, seen = None, []
    for count in (1, 4, 2, 8, 1):
        parts = shards(wide, count, state)
        iterators = [iter(part) for part in parts]
        seen += steps(parts, iterators, 1)
        state = merge([part.state_dict() for part in parts])
        assert state == merge([part.state_dict(len(seen)) for part in parts])
    assert seen == whole[:40]


def test_an_exhausted_shard_returns_empty_packs_and_its_state_does_not_run_ahead(
    wide: DataConfig, whole: list[list[int]]
) -> None:
    parts = shards(wide, 2)
    iterators = [iter(part) for part in parts]
    assert steps(parts, iterators, len(whole) // 8) == whole
    ends = [part.step_end(len(whole)) for part in parts]
    assert [end.exhausted for end in ends] == [True, True]
    after = next(iterators[0])
    assert (after["labels"] == -100).all()
    assert merge([part.state_dict() for part in parts])["packs"] == len(whole)
    steps(parts, [iterators[1]], 1)
    steps(parts, [iterators[0]], 1)


def test_a_shard_whose_end_nobody_asks_for_stops_with_an_error(wide: DataConfig, whole: list[list[int]]) -> None:
    """A loop that never asks whether all shards have ended would otherwise go on with empty packs for ever."""
    dataset = PackDataset(wide, shard=Shard(0, 2))
    with pytest.raises(RuntimeError, match=r"call Shards\(dataset\).finished\(\) on all processes after each step"):
        list(dataset)
    asked = PackDataset(wide, shard=Shard(0, 2))
    for _ in islice(asked, 2 * len(whole)):
        if asked.state_dict()["packs"] % 8 == 0:
            asked.step_end()
    assert asked.step_end().exhausted


def test_restarting_returns_to_the_state_of_the_constructor(wide: DataConfig, whole: list[list[int]]) -> None:
    first = PackDataset(wide)
    ids(islice(first, 5))
    dataset = PackDataset(wide, state=first.state_dict())
    assert ids(islice(dataset, 1)) == whole[5:6]
    assert ids(islice(dataset, 1)) == whole[6:7]  # another iterator continues
    dataset.restart()
    assert ids(dataset) == whole[5:]
    assert ids(dataset) == []  # a second epoch of the trainer finds the run at its end


def test_workers_of_a_data_loader_are_refused(wide: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"set num_workers = 0 .* and data.workers instead"):
        next(iter(DataLoader(PackDataset(wide), batch_size=None, num_workers=1, multiprocessing_context="fork")))


def test_a_shard_is_not_divided_again(wide: DataConfig) -> None:
    with pytest.raises(ValueError, match="already shard 1 of 2, and would be divided again"):
        PackDataset(wide, shard=Shard(1, 2)).shard(2, 0)


def test_uneven_shards_are_refused(wide: DataConfig) -> None:
    with pytest.raises(ValueError, match="3 processes cannot share 8 streams and a global batch of 8 packs evenly"):
        next(iter(PackDataset(wide).shard(3, 0)))
    even = msgspec.structs.replace(wide, streams=9, global_batch=9)
    assert len(ids(islice(PackDataset(even).shard(3, 0), 3))) == 3


def test_methods_that_change_rows_are_refused(wide: DataConfig) -> None:
    with pytest.raises(TypeError, match="cannot be mapped, filtered, shuffled"):
        PackDataset(wide).map(lambda row: row)
    with pytest.raises(TypeError, match="pickle its state_dict"):
        torch.save(PackDataset(wide), "/dev/null")


def test_the_last_checkpoint_is_the_newest_with_a_data_state(wide: DataConfig, tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step in (5, 20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    state = PackDataset(wide).state_dict()
    write_state_file(tmp_path / "checkpoint-5", state)
    write_state_file(tmp_path / "checkpoint-20", state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
