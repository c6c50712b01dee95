"""The packs of a run are the same for every topology, and a state is what was consumed, whatever was loaded ahead."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny
import torch
from torch.utils.data import IterableDataset

from sftstream import DataConfig, DataState, Pack, PackLoader, Shard, batch_digest, merge
from sftstream.streaming.worker import StreamWorker

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than cores

TOPOLOGIES = [(1, 0), (1, 1), (1, 2), (1, 4), (1, 8), (2, 0), (2, 1), (2, 4), (4, 0), (4, 2), (8, 0), (8, 1)]


@pytest.fixture(scope="module")
def wide(tokenizer: str, corpus_path: str) -> DataConfig:
    """Eight streams and steps of eight packs, so that up to eight shards can share them."""
    return tiny.data_config(tokenizer, corpus_path, streams=8, global_batch=8, window=4)


@pytest.fixture(scope="module")
def whole(wide: DataConfig) -> list[str]:
    """The digests of the run's packs, in order, to the end."""
    return tiny.digests(PackLoader(wide))


def shards(config: DataConfig, count: int, workers: int = 0, state: Any = None) -> list[PackLoader]:
    return [PackLoader(config, shard=Shard(index, count), workers=workers, state=state) for index in range(count)]


def steps(loaders: list[PackLoader], count: int) -> list[Pack]:
    """The packs of the next steps of all shards, in the order of the run."""
    packs = []
    for _ in range(count):
        columns = [loader.next_step() for loader in loaders]
        packs += [pack for row in zip(*columns, strict=True) for pack in row]
    return packs


def closed(loaders: list[PackLoader]) -> None:
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize(("count", "workers"), TOPOLOGIES)
def test_every_topology_gives_the_same_packs(wide: DataConfig, whole: list[str], count: int, workers: int) -> None:
    loaders = shards(wide, count, workers)
    assert tiny.digests(steps(loaders, len(whole) // 8)) == whole
    closed(loaders)


def test_the_packs_of_a_run_never_change_by_accident(tokenizer: str, corpus_path: str, tmp_path: Path) -> None:
    """Where this fails on purpose, a state of before cannot be resumed any more: raise `identity.FORMAT`."""
    other = tiny.write_jsonl(tmp_path / "other.jsonl", tiny.rows(20, seed=1))
    digests = tiny.digests(PackLoader(tiny.data_config(tokenizer, corpus_path, other)))
    assert len(digests) == 56
    assert batch_digest(digests) == "bdd46a4bb447707b6f186e54c130e1f2a0fe9f1a563bcb57d7ae72745e710d1f"


@pytest.mark.parametrize("prefetch", [1, 2, 8])
def test_a_state_covers_consumed_packs_and_no_pack_loaded_ahead(wide: DataConfig, prefetch: int) -> None:
    ahead = PackLoader(msgspec.structs.replace(wide, prefetch=prefetch), workers=2)
    plain = PackLoader(wide)
    for _ in range(20):
        assert ahead.state_dict() == plain.state_dict()
        assert next(ahead).digest() == next(plain).digest()
    ahead.close()
    assert ahead.state_dict() == plain.state_dict()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_state_after_any_pack_restores_the_exact_tail(wide: DataConfig, whole: list[str], workers: int) -> None:
    loader = PackLoader(wide, workers=workers)
    states = [loader.state_dict()]
    for _ in loader:
        states.append(loader.state_dict())
    positions = range(len(states)) if workers == 0 else range(0, len(states), 7)
    for position in positions:
        resumed = PackLoader(wide, workers=workers, state=json.loads(json.dumps(states[position])))
        assert resumed.state_dict() == states[position]
        assert tiny.digests(resumed) == whole[position:]
        assert resumed.state_dict() == states[-1]


def test_hops_between_topologies_keep_the_sequence(wide: DataConfig, whole: list[str]) -> None:
    state, digests = None, []
    for count, workers in ((1, 0), (2, 2), (4, 1), (1, 2)):
        loaders = shards(wide, count, workers, state)
        digests += tiny.digests(steps(loaders, 1))
        state = json.loads(json.dumps(merge([loader.state_dict() for loader in loaders])))
        closed(loaders)
    assert state is not None
    assert state["packs"] == len(digests) == 32
    assert digests + tiny.digests(PackLoader(wide, state=state)) == whole


def test_a_third_resume_in_a_row_goes_on_like_the_first(wide: DataConfig, whole: list[str]) -> None:
    state, digests = None, []
    for _ in range(6):
        loader = PackLoader(wide, workers=2, state=state)
        digests += tiny.digests(tiny.take(loader, 3))
        state = loader.state_dict()
        loader.close()
    assert digests == whole[:18]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_before_the_first_pack_is_that_of_the_beginning(
    wide: DataConfig, whole: list[str], workers: int
) -> None:
    loader = PackLoader(wide, workers=workers)
    state = loader.state_dict()
    assert state["packs"] == 0
    assert set(state["streams"]) == {str(stream) for stream in range(8)}
    assert tiny.digests(loader) == whole
    assert tiny.digests(PackLoader(wide, workers=workers, state=state)) == whole


def test_a_state_taken_right_after_a_resume_is_the_state_resumed_from(wide: DataConfig) -> None:
    loader = PackLoader(wide, workers=2)
    tiny.take(loader, 11)
    state = loader.state_dict()
    resumed = PackLoader(wide, workers=1, state=state)
    assert resumed.state_dict() == state
    tiny.take(resumed, 1)  # the other seven streams have given nothing here yet
    assert next(loader).digest() is not None
    assert resumed.state_dict() == loader.state_dict()
    closed([loader, resumed])


def test_a_returned_state_is_a_value_of_its_own(wide: DataConfig) -> None:
    loader = PackLoader(wide)
    tiny.take(loader, 8)
    state, kept = loader.state.builtins(), loader.state
    before = copy.deepcopy(state)
    encoded = loader.state_dict()
    tiny.take(loader, 8)
    assert state == before == kept.builtins()
    assert encoded == kept.state_dict()
    for stream in state["streams"].values():
        stream["drawn"][0] = 0
        stream["planned"].clear()
        stream["refused"][0]["x"] = 1
    encoded["streams"].clear()
    assert loader.state.builtins() != before
    assert len(loader.state_dict()["streams"]) == 8
    assert tiny.digests(loader) == tiny.digests(PackLoader(wide, state=before))[8:]


def test_a_state_that_is_changed_after_it_was_given_changes_nothing(wide: DataConfig, whole: list[str]) -> None:
    loader = PackLoader(wide)
    tiny.take(loader, 8)
    state = loader.state_dict()
    resumed = PackLoader(wide, state=state)
    state["streams"].clear()
    state["packs"] = 0
    assert tiny.digests(resumed) == whole[8:]


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_twice_goes_on(wide: DataConfig, whole: list[str], workers: int) -> None:
    loader = PackLoader(wide, workers=workers)
    first = [pack.digest() for pack, _ in zip(loader, range(5), strict=False)]  # zip takes one more to see the end
    assert iter(loader) is loader
    assert first == whole[:5]
    assert tiny.digests(loader) == whole[6:]
    assert list(loader) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_closed_loader_goes_on_where_it_was(
    wide: DataConfig, whole: list[str], workers: int, started: tiny.Started
) -> None:
    loader = PackLoader(wide, workers=workers)
    digests = []
    for _ in range(3):
        digests += tiny.digests(tiny.take(loader, 5))
        loader.close()
        loader.close()
        assert started() == []
    assert digests == whole[:15]
    assert loader.packs == 15


def test_a_state_dict_cannot_be_loaded_into_a_loader(wide: DataConfig) -> None:
    loader = PackLoader(wide)
    with pytest.raises(
        RuntimeError, match=r"resume by constructing PackLoader\(config, state=...\): a loader that has begun"
    ):
        loader.load_state_dict(loader.state_dict())


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_finite_run_ends_at_a_steps_border_with_everything_given_once(
    wide: DataConfig, whole: list[str], count: int
) -> None:
    loaders = shards(wide, count)
    columns = [list(loader) for loader in loaders]
    assert all(loader.packs % 8 == 0 and loader.exhausted for loader in loaders)
    assert max(loader.packs for loader in loaders) == len(whole)
    given = Counter(segment.ref for packs in columns for pack in packs for segment in pack.segments)
    assert given == Counter({(0, row, epoch): 1 for row in range(48) for epoch in range(2)})
    digests = {index + count * i: pack.digest() for index, packs in enumerate(columns) for i, pack in enumerate(packs)}
    empty = loaders[0].next_step()[0].digest()
    assert [digests.get(number, empty) for number in range(len(whole))] == whole


def test_a_shard_that_has_ended_gives_empty_steps_and_its_state_keeps_up(
    wide: DataConfig, whole: list[str], started: tiny.Started
) -> None:
    loaders = shards(wide, 4, workers=1)
    digests = tiny.digests(steps(loaders, len(whole) // 8 + 3))
    empty = PackLoader(wide, state=merge([loader.state_dict() for loader in loaders])).next_step()[0]
    assert digests == whole + [empty.digest()] * 24
    assert {loader.packs for loader in loaders} == {len(whole) + 24}
    assert merge([loader.state_dict() for loader in loaders])["packs"] == len(whole) + 24
    assert started() == []


def test_steps_are_equal_parts_of_the_global_batch(wide: DataConfig, whole: list[str]) -> None:
    assert [len(loader.next_step()) for loader in shards(wide, 2)] == [4, 4]
    assert tiny.digests(PackLoader(wide).next_step()) == whole[:8]


def test_a_run_shorter_than_a_step_is_filled_with_empty_packs(tokenizer: str, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.rows(2))
    config = tiny.data_config(tokenizer, path, epochs=1, streams=8, global_batch=16)
    packs = list(PackLoader(config))
    assert len(packs) == 16
    assert sum(len(pack.segments) for pack in packs) == 2


@pytest.mark.parametrize(
    ("shard", "workers", "message"),
    [
        (Shard(2, 2), 0, "shard 2 of 2 does not exist; give an index from 0 to count - 1"),
        (Shard(-1, 2), 0, "shard -1 of 2 does not exist; give an index from 0 to count - 1"),
        (Shard(0, 0), 0, "shard 0 of 0 does not exist; give an index from 0 to count - 1"),
        (
            Shard(0, 9),
            2,
            "streams = 8 is too low for 9 shards, which need a stream each; raise data.streams to 9 or more",
        ),
        (Shard(0, 1), -1, "workers = -1 must be 0 (load in this process) or more"),
    ],
)
def test_a_topology_that_cannot_be_is_an_error(wide: DataConfig, shard: Shard, workers: int, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        PackLoader(wide, shard=shard, workers=workers)
    assert str(error.value) == message


def test_workers_are_the_configs_unless_named(wide: DataConfig) -> None:
    assert PackLoader(msgspec.structs.replace(wide, workers=2)).workers == 2
    assert PackLoader(msgspec.structs.replace(wide, workers=2), workers=0).workers == 0


def test_the_state_of_one_shard_alone_is_an_error(wide: DataConfig) -> None:
    loaders = shards(wide, 2)
    steps(loaders, 1)
    with pytest.raises(
        ValueError, match="the state lacks 4 streams of this shard, the first is stream 1; merge the states of all"
    ):
        PackLoader(wide, state=loaders[0].state_dict())
    with pytest.raises(ValueError, match="the state lacks 2 streams of this shard, the first is stream 1; merge"):
        PackLoader(wide, shard=Shard(1, 4), state=loaders[0].state_dict())


def test_a_state_in_the_middle_of_a_step_is_an_error_where_shards_cannot_share_it(wide: DataConfig) -> None:
    loader = PackLoader(wide)
    tiny.take(loader, 10)
    state = loader.state_dict()
    assert next(PackLoader(wide, shard=Shard(1, 2), state=state)).digest() == tiny.digests(tiny.take(loader, 2))[1]
    with pytest.raises(
        ValueError, match="the state was saved after 10 packs, inside a step that 4 shards cannot share evenly; save a"
    ):
        PackLoader(wide, shard=Shard(0, 4), state=state)


def test_a_state_of_something_else_is_an_error(wide: DataConfig) -> None:
    with pytest.raises(ValueError, match="this is not a data state of this version"):
        PackLoader(wide, state={"_snapshot": {}})


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_error_in_a_stream_arrives_in_one_line_after_the_packs_before_it(
    tokenizer: str, tmp_path: Path, workers: int, started: tiny.Started
) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.rows(64))
    config = tiny.data_config(tokenizer, path, streams=2, epochs=None, window=64)
    before = PackLoader(config, workers=0)
    expected = tiny.digests(tiny.take(before, 4))
    loader = PackLoader(config, workers=workers)
    os.truncate(path, 3000)
    packs = []
    with pytest.raises(
        ValueError, match=r"a.jsonl:\d+ is no longer there: the file shrank while it was read; restore the file"
    ) as error:
        packs.extend(tiny.digests(loader))
    assert "\n" not in str(error.value)
    assert packs == expected[: len(packs)]
    with pytest.raises(ValueError, match="is no longer there"):
        next(loader)
    assert started() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_exactly_once_the_cause_of_an_error_is_gone(
    tokenizer: str, tmp_path: Path, workers: int
) -> None:
    path = Path(tiny.write_jsonl(tmp_path / "a.jsonl", tiny.rows(64)))
    content = path.read_bytes()
    config = tiny.data_config(tokenizer, str(path), streams=2, window=8)
    whole = tiny.digests(PackLoader(config))
    loader = PackLoader(config, workers=workers)
    digests = tiny.digests(tiny.take(loader, 3))
    loader.close()
    os.truncate(path, 2000)
    state = loader.state_dict()

    def read_on() -> None:
        nonlocal state
        for pack in loader:
            digests.append(pack.digest())
            state = loader.state_dict()

    with pytest.raises(ValueError, match="is no longer there"):
        read_on()
    assert loader.state_dict() == state
    path.write_bytes(content)
    assert digests + tiny.digests(loader) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_started_before_the_first_pack_read_the_packs_of_the_run(
    wide: DataConfig, whole: list[str], started: tiny.Started, workers: int
) -> None:
    loader = PackLoader(wide, workers=workers)
    state = loader.state_dict()
    loader.start()
    begun = started()
    assert len(begun) == workers
    assert loader.state_dict() == state
    loader.start()
    assert tiny.digests(tiny.take(loader, 3)) == whole[:3]
    assert started() == begun
    loader.close()


def test_workers_of_a_finished_run_are_not_started(wide: DataConfig, started: tiny.Started) -> None:
    loader = PackLoader(wide, workers=2)
    assert list(loader)
    loader.start()
    assert started() == []


class _Collecting(IterableDataset[bool]):
    def __iter__(self) -> Iterator[bool]:
        yield gc.isenabled()


def test_a_worker_collects_garbage_even_if_the_program_does_not_yet() -> None:
    gc.disable()
    try:
        worker = StreamWorker(_Collecting(), prefetch=1)  # type: ignore[arg-type]
        assert next(worker) is True
        worker.close()
    finally:
        gc.enable()


def test_a_killed_worker_is_an_error_and_never_a_hang(wide: DataConfig, started: tiny.Started) -> None:
    endless = msgspec.structs.replace(wide, epochs=None)
    loader = PackLoader(endless, workers=2)
    tiny.take(loader, 3)
    with _without_child_signals(), pytest.raises(RuntimeError, match=r"killed by signal: Killed|exited unexpectedly"):
        _kill_and_read_on(loader, started()[0])
    assert started() == []


def test_the_workers_of_a_killed_process_end(wide: DataConfig, tmp_path: Path) -> None:
    """The workers have more packs ready than a pipe holds, and a process of their own would wait forever to send them."""
    config = tmp_path / "config.json"
    config.write_bytes(msgspec.json.encode(msgspec.structs.replace(wide, epochs=None, prefetch=4000)))
    program = (
        "import sys, time, multiprocessing, msgspec\n"
        "from sftstream import DataConfig, PackLoader\n"
        "loader = PackLoader(msgspec.json.decode(open(sys.argv[1], 'rb').read(), type=DataConfig), workers=2)\n"
        "next(loader)\n"
        "print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(config)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        time.sleep(1)  # the pipes fill up
        process.kill()
    deadline = time.monotonic() + 60
    while any(map(_is_running, workers)):
        assert time.monotonic() < deadline, f"workers {workers} outlive their process"
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1", "USR2"])
def test_a_signal_to_all_processes_of_a_run_ends_no_worker(
    wide: DataConfig, whole: list[str], name: str, started: tiny.Started
) -> None:
    loader = PackLoader(wide, workers=2)
    packs = tiny.take(loader, 3)
    for worker in started():
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)  # from another process than the parent
    assert tiny.digests(packs) + tiny.digests(loader) == whole


def test_the_parent_of_a_worker_can_end_it(wide: DataConfig, started: tiny.Started) -> None:
    loader = PackLoader(wide, workers=1)
    tiny.take(loader, 3)
    (worker,) = started()
    with _without_child_signals():
        worker.terminate()
        worker.join(10)
        assert not worker.is_alive()
        with pytest.raises(RuntimeError, match="worker"):
            tiny.take(loader, 1000)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _kill_and_read_on(loader: PackLoader, worker: BaseProcess) -> None:
    worker.kill()
    tiny.take(loader, 100)


@contextmanager
def _without_child_signals() -> Iterator[None]:
    """Set aside torch's handler of SIGCHLD, which raises at any instruction, also outside of the loader."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_global_generator_is_touched(wide: DataConfig, workers: int) -> None:
    def generators() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]

    torch.manual_seed(1)
    before = generators()
    loader = PackLoader(wide, workers=workers)
    tiny.take(loader, 9)
    PackLoader(wide, workers=workers, state=loader.state_dict()).close()
    loader.close()
    assert generators() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_packs_do_not_depend_on_global_generators(wide: DataConfig, whole: list[str], workers: int) -> None:
    torch.manual_seed(random.randrange(2**32))
    assert tiny.digests(PackLoader(wide, workers=workers)) == whole


def test_a_pack_from_a_worker_is_the_same_as_one_made_here(wide: DataConfig) -> None:
    here, there = PackLoader(wide), PackLoader(wide, workers=1)
    for ours, theirs in zip(tiny.take(here, 8), tiny.take(there, 8), strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert (ours.segments, ours.refused, ours.exhausted, ours.max_seqlen) == (
            theirs.segments,
            theirs.refused,
            theirs.exhausted,
            theirs.max_seqlen,
        )
    there.close()


def test_a_refused_row_is_located_for_an_editor(tokenizer: str, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [*tiny.rows(3), {"a": 1}])
    loader = PackLoader(tiny.data_config(tokenizer, path, epochs=1))
    (refusal,) = [refusal for pack in loader for refusal in pack.refused]
    assert loader.locate_row(refusal) == f"{path}:4"


def test_a_step_begun_by_next_is_ended_by_next(wide: DataConfig, whole: list[str]) -> None:
    loader = PackLoader(wide)
    tiny.take(loader, 3)
    with pytest.raises(ValueError, match="`next` has returned 3 of the 8 packs of this step; call `next` for the rest"):
        loader.next_step()
    assert tiny.digests([*tiny.take(loader, 5), *loader.next_step()]) == whole[3:16]


def test_a_loader_is_not_pickled_and_says_what_is(wide: DataConfig) -> None:
    with pytest.raises(TypeError, match=r"cannot be pickled; pickle its state_dict\(\)"):
        pickle.dumps(PackLoader(wide))


def test_states_are_typed_and_cover_the_shards_own_streams(wide: DataConfig) -> None:
    loader = PackLoader(wide, shard=Shard(1, 4))
    tiny.take(loader, 2)
    state = loader.state
    assert isinstance(state, DataState)
    assert list(state.streams) == [1, 5]
    assert state.packs == loader.packs == 8
    assert [stream.packs for stream in state.streams.values()] == [1, 1]


def test_a_worker_without_a_stream_is_not_started(tokenizer: str, corpus_path: str, started: tiny.Started) -> None:
    config = tiny.data_config(tokenizer, corpus_path, streams=1, global_batch=1)
    loader = PackLoader(config, workers=3)
    assert tiny.digests(tiny.take(loader, 4)) == tiny.digests(tiny.take(PackLoader(config, workers=0), 4))
    assert len(started()) == 1
    loader.close()
