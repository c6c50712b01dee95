"""Two runs never save to the same directory; a run that has ended blocks no other run."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from file_operations import failing
from gloo_ranks import processes, run_ranks

from checkpoints import CheckpointError, CheckpointStore

STATE = {"w": torch.ones(2)}


def hold(root: Path, pipe: Connection) -> None:
    """Claim the root, fork a child like a data loader, send the id of the child, and stay."""
    store = CheckpointStore(root)
    store.claim()
    child = os.fork()
    if child:
        pipe.send(child)
    signal.pause()


@pytest.fixture
def holder(tmp_path: Path):
    """A process with a claim on `tmp_path`, and a forked child that survives the process."""
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=hold, args=(tmp_path, theirs), daemon=True)
    process.start()
    assert ours.poll(60)
    child = ours.recv()
    yield process
    process.kill()
    process.join()
    os.kill(child, signal.SIGKILL)


def test_a_second_run_is_told_who_has_the_directory(tmp_path, holder):
    store = CheckpointStore(tmp_path)
    for act in (store.claim, lambda: store.save(1, STATE)):
        with pytest.raises(CheckpointError) as caught:
            act()
        assert str(caught.value).startswith(
            f"{tmp_path} is in use by process {holder.pid} on {os.uname().nodename} (since 20"
        )
        assert "two runs cannot share a directory" in str(caught.value)
    assert store.steps() == []


def test_looking_needs_no_lock(tmp_path):
    CheckpointStore(tmp_path).save(1, STATE, {"a": 1})
    owner = CheckpointStore(tmp_path)
    owner.claim()
    reader = CheckpointStore(tmp_path)
    assert (reader.steps(), reader.latest(), reader.values(1)) == ([1], 1, {"a": 1})
    reader.load(1, {"w": torch.zeros(2)})


def test_a_killed_run_leaves_no_lock_though_children_that_it_forked_live_on(tmp_path, holder):
    holder.kill()
    holder.join()
    CheckpointStore(tmp_path).save(1, STATE)


def test_a_closed_store_leaves_no_lock(tmp_path):
    first, second = CheckpointStore(tmp_path), CheckpointStore(tmp_path)
    first.save(1, STATE)
    with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} "):
        second.save(2, STATE)
    first.close()
    second.save(2, STATE)
    with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} "):
        first.save(3, STATE)


def test_a_lock_that_somebody_deleted_stops_the_saves_of_its_holder(tmp_path):
    store = CheckpointStore(tmp_path)
    store.claim()
    (tmp_path / ".lock").unlink()
    CheckpointStore(tmp_path).claim()
    with pytest.raises(CheckpointError, match=r"\.lock was replaced during this run"):
        store.save(1, STATE)


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(CheckpointError, match=r"has no locks .*mount it with locks"):
        CheckpointStore(tmp_path).claim()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["no space", "broken"])
def test_a_claim_that_fails_at_any_operation_can_be_made_again(tmp_path, code):
    for number in range(5):  # The root's directory, its parent's names, the lock, the holder's name; then nothing.
        root = tmp_path / f"{number}" / "checkpoints"
        root.parent.mkdir()
        store = CheckpointStore(root)
        with failing(number, code) as failed:
            if number < 4:
                with pytest.raises(CheckpointError, match=os.strerror(code)):
                    store.claim()
            else:
                store.claim()
            assert failed() == (number < 4)
        store.claim()
        CheckpointStore(root).latest()


def claim(rank: int, root: Path) -> str:
    try:
        CheckpointStore(root).claim()
    except CheckpointError as error:
        return str(error)
    return ""


def test_every_rank_of_a_second_run_gets_the_error(tmp_path, holder):
    first, second = run_ranks(2, claim, tmp_path)
    assert first == second
    assert f"in use by process {holder.pid} " in first
