"""A save in the background stores the state at the call and reports failures."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import join, processes, run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from checkpoints import CheckpointError, CheckpointStore, LostRank, Retention
from checkpoints.manifest import decode


def state(step: int) -> dict[str, Any]:
    return {"w": torch.full((1000, 50), float(step)), "t": torch.arange(12.0).view(3, 4).t() * step, "step": step}


def loaded(store: CheckpointStore, step: int) -> dict[str, Any]:
    target = state(-1)
    store.load(step, target)
    return target


def assert_holds(store: CheckpointStore, step: int) -> None:
    found, expected = loaded(store, step), state(step)
    assert found["step"] == step
    assert torch.equal(found["w"], expected["w"])
    assert torch.equal(found["t"], expected["t"])


@contextmanager
def no_room():
    """Fail every write of this process beyond 1000 bytes of a file, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_background_save_stores_the_state_at_the_call(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        now, values = state(step), {"rows": [step]}
        store.save_later(step, now, values)
        now["w"].zero_()
        now["t"].zero_()
        now["step"] = 0
        values["rows"].append(0)
    store.wait()
    for step in (1, 2, 3):
        assert_holds(store, step)
        assert store.values(step) == {"rows": [step]}


def test_a_background_save_writes_the_bytes_of_a_foreground_save(tmp_path):
    CheckpointStore(tmp_path / "now").save(1, state(1), {"rows": 1})
    with CheckpointStore(tmp_path / "later") as store:
        store.save_later(1, state(1), {"rows": 1})
    now, later = (
        decode((tmp_path / name / "step-00000001" / "manifest.json").read_bytes()) for name in ("now", "later")
    )
    assert (now.files, now.tensors) == (later.files, later.tensors)


def test_leaving_the_store_waits_for_the_background_save(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save_later(1, state(1))
    assert_holds(CheckpointStore(tmp_path), 1)


@pytest.mark.parametrize("act", ["wait", "save", "save_later", "latest", "load", "claim", "close"])
def test_the_next_method_raises_the_failure_of_a_background_save_once(tmp_path, act):
    store = CheckpointStore(tmp_path)
    store.save(1, state(1))
    with no_room():
        store.save_later(2, state(2))
        assert not store.failed or store.steps() == [1]
        until(lambda: store.failed)
    arguments = {"save": (2, state(2)), "save_later": (2, state(2)), "load": (1, state(0))}.get(act, ())
    with pytest.raises(CheckpointError, match=r"saving step 2 failed on rank 0: OSError: \[Errno 27\] File too large"):
        getattr(store, act)(*arguments)
    assert not store.failed
    store.save_later(2, state(2))
    assert store.latest() == 2
    assert_holds(store, 2)
    assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000001", "step-00000002"]


def test_an_error_of_the_run_is_not_hidden_by_one_of_its_last_save(tmp_path, caplog):
    def run() -> None:
        with CheckpointStore(tmp_path) as store:
            store.save_later(1, state(1))
            raise ZeroDivisionError

    with no_room(), pytest.raises(ZeroDivisionError):
        run()
    assert "saving step 1 failed" in caplog.text


# Several ranks


def save_beside_collectives(rank: int, root: Path) -> list[float]:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(2_000_000.0).view(1000, 2000)
    sums, total = [], torch.ones(1)
    with CheckpointStore(root, Retention(keep=100)) as store:
        for step in range(1, 6):
            sharded = distribute_tensor(whole + step, mesh, [Shard(0)])
            store.save_later(step, {"w": sharded, "same": torch.full((3,), float(step))}, {f"rank{rank}": step})
            sharded.to_local().zero_()
            for _ in range(20):
                dist.all_reduce(total)
                total /= 2
            sums.append(total.item())
        store.wait()
        for step in range(1, 6):
            target = {"w": torch.zeros_like(whole), "same": torch.zeros(3)}
            store.load(step, target)
            assert torch.equal(target["w"], whole + step)
            assert target["same"].tolist() == [step] * 3
            assert store.values(step) == {"rank0": step, "rank1": step}
    return sums


def copied(rank: int, root: Path) -> list[str]:
    """Return the names of the tensors that this rank copies of two that both ranks hold."""
    with CheckpointStore(root) as store:
        store.save_later(1, {"a": torch.ones(1000), "b": torch.ones(1000)})
        store.wait()
        return sorted(index.fqn for index in store._staging._buffers)


def test_replicas_copy_a_tensor_once_before_a_save_in_the_background(tmp_path):
    """Each rank that copied all would need the memory of the whole state."""
    first, second = run_ranks(2, copied, tmp_path)
    assert sorted(first + second) == ["a", "b"]
    assert len(first) == 1


def test_ranks_save_while_they_train(tmp_path):
    assert run_ranks(2, save_beside_collectives, tmp_path) == [[1.0] * 5] * 2


def end_while_saving(rank: int, meeting: str, root: Path, pipe: Connection, number: int, later: bool) -> None:
    """Send rank 1 a signal during the second save; both ranks return the error of the save."""
    join(rank, 2, meeting)
    store = CheckpointStore(root, timeout=timedelta(seconds=4))
    store.save(1, {f"w{rank}": torch.ones(3)})
    if rank == 1:
        real = os.fsync
        os.fsync = lambda descriptor: (os.kill(os.getpid(), number), real(descriptor))
    try:
        if later:
            store.save_later(2, {f"w{rank}": torch.ones(3)})
            store.wait()
        else:
            store.save(2, {f"w{rank}": torch.ones(3)})
    except CheckpointError as error:
        pipe.send((type(error), str(error)))


@pytest.mark.parametrize("later", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_rank_that_ends_or_stops_during_a_save_is_one_clear_error_and_no_step(tmp_path, number, later):
    root, ranks, pipes = tmp_path / "checkpoints", [], []
    for rank in range(2):
        ours, theirs = processes.Pipe(duplex=False)
        arguments = (rank, str(tmp_path), root, theirs, number, later)
        ranks.append(processes.Process(target=end_while_saving, args=arguments, daemon=True))
        ranks[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        assert pipes[0].poll(60)
        kind, message = pipes[0].recv()
        assert kind is LostRank
        assert message.startswith("saving step 2: a rank has ended or does not answer, so this rank gives up (")
        ranks[0].join()
        store = CheckpointStore(root)
        assert (store.latest(), store.steps()) == (1, [1])
        if number == signal.SIGSTOP:
            os.kill(ranks[1].pid, signal.SIGCONT)
            assert pipes[1].poll(60)
            kind, message = pipes[1].recv()
            assert kind is LostRank or "No such file or directory" in message
        ranks[1].join()
        assert (store.latest(), store.steps()) == (1, [1])
        store.save(2, {"w": torch.ones(1)})
        assert sorted(os.listdir(root)) == [".lock", "step-00000001", "step-00000002"]
    finally:
        for process in ranks:
            process.kill()
            process.join()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
def test_a_devices_state_is_staged_through_pinned_memory(tmp_path):
    weights = torch.randn(2000, 2000, device="cuda")
    expected, target = weights.clone(), torch.zeros_like(weights)
    with CheckpointStore(tmp_path) as store:
        for step in (1, 2):
            store.save_later(step, {"w": weights, "column": weights[:, 3]})
            weights.zero_()
            store.wait()
            store.load(step, {"w": target, "column": torch.zeros(2000)})
            assert torch.equal(target, expected)
            weights.copy_(expected)
