"""A save cut short by a kill, a power cut or a failing disk leaves the older step or the new step.

A kill keeps all data in the kernel, and so cannot reveal a missing fsync. Power cuts are computed:
the file operations of a run are logged, and all states are built in which a strict file system may
be after any operation.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from file_operations import failing, watch
from gloo_ranks import join, processes, run_ranks
from strict_disk import Disk, Tree

from checkpoints import CheckpointError, CheckpointStore, Retention


def state(step: int, size: int = 8) -> dict[str, Any]:
    return {"w": torch.full((size, size), float(step)), "step": step}


def blob(step: int) -> dict[str, bytes]:
    return {"data/stream/0003": str(step).encode() * 8}


def assert_holds(store: CheckpointStore, step: int, size: int = 8) -> None:
    """Assert the tensors, plain values and values of a step."""
    target = state(-1, size)
    store.load(step, target)
    assert target["step"] == step
    assert torch.equal(target["w"], state(step, size)["w"])
    assert store.values(step) == blob(step)


# Power cuts


def record(top: Path, steps: int, keep: int, later: bool = False) -> list[tuple[str, str, Any]]:
    """Return the operations of `steps` saves, with ("saved", step, None) after each return."""
    log: list[tuple[str, str, Any]] = []
    top.mkdir(parents=True)
    store = CheckpointStore(top / "runs" / "checkpoints", Retention(keep=keep))

    def note(operation: str, path: str, detail: Any) -> None:
        if not path.endswith(".lock"):  # Its content promises nothing.
            log.append((operation, path, detail))

    with pytest.MonkeyPatch.context() as patch:
        watch(patch, note)
        for step in range(1, steps + 1):
            (store.save_later if later else store.save)(step, state(step), blob(step))
            store.wait()
            log.append(("saved", str(step), None))
    return log


def violations(top: Path, log: list[tuple[str, str, Any]], replay: Path) -> Iterator[str]:
    """Yield the states after a power cut without the newest acknowledged step or the step after."""
    disk, acknowledged = Disk(str(top)), 0
    choice, seen = random.Random(0), set()
    for number, (operation, path, detail) in enumerate(log):
        if operation == "saved":
            acknowledged = int(path)
        else:
            disk.apply(operation, path, detail)
        for tree in disk.crashes(choice):
            key = (acknowledged, tuple(sorted(tree.items())))
            if key in seen:
                continue
            seen.add(key)
            complaint = recover(tree, replay / str(len(seen)), acknowledged)
            if complaint:
                yield f"after operation {number}, {operation} {path}: {complaint}"
    assert len(seen) > 60


def recover(tree: Tree, top: Path, acknowledged: int) -> str | None:
    """Return the fault of a restart from `tree`, or None."""
    top.mkdir(parents=True)
    for path, content in tree.items():
        if content is None:
            (top / path).mkdir()
        else:
            (top / path).write_bytes(content)
    store = CheckpointStore(top / "runs" / "checkpoints")
    try:
        step = store.latest()
        if step is not None:
            assert_holds(store, step)
    except (CheckpointError, AssertionError) as error:
        return repr(error)
    if store.rejected:
        return f"a torn step looks committed: {store.rejected}"
    if (step or 0) not in (acknowledged, acknowledged + 1):
        return f"step {acknowledged} was acknowledged, {step} was found"
    return None


@pytest.mark.parametrize("later", [False, True], ids=["foreground", "background"])
def test_a_power_cut_at_any_moment_leaves_the_acknowledged_step_or_the_next_one(tmp_path, later):
    log = record(tmp_path / "disk", steps=3, keep=1, later=later)
    assert sum(operation == "remove" for operation, _, _ in log) == 8  # Two old steps of three files.
    assert list(violations(tmp_path / "disk", log, tmp_path / "replay")) == []


def test_every_fsync_of_a_save_is_needed(tmp_path):
    log = record(tmp_path / "disk", steps=2, keep=2)
    forced = [number for number, (operation, _, _) in enumerate(log) if operation == "fsync"]
    assert len(forced) == 2 + 2 * (3 + 2)  # Two new directories; in a step three files, itself and its parent.
    for number in forced:
        without = log[:number] + log[number + 1 :]
        found = violations(tmp_path / "disk", without, tmp_path / "replay" / str(number))
        assert next(found, None), f"nothing is lost without operation {number}, fsync {log[number][1]}"


def test_the_manifest_must_be_on_the_disk_before_the_step_gets_its_name(tmp_path):
    log = record(tmp_path / "disk", steps=2, keep=2)
    number = max(number for number, (operation, _, _) in enumerate(log) if operation == "rename")
    _, attempt, final = log[number]
    first = log.index(("create", f"{attempt}/manifest.json", 0))
    late = [(operation, path.replace(attempt, final), detail) for operation, path, detail in log[first:number]]
    reordered = [*log[:first], log[number], *late, *log[number + 1 :]]
    assert next(violations(tmp_path / "disk", reordered, tmp_path / "replay"), None)


# Failing disks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["no space", "broken"])
@pytest.mark.parametrize("later", [False, True], ids=["foreground", "background"])
def test_a_disk_that_fails_at_any_operation_costs_that_save_and_nothing_else(tmp_path, later, code):
    assert save_over_failures(0, tmp_path, 0, code, later) == 20


@pytest.mark.parametrize("victim", [0, 1])
def test_a_disk_that_fails_one_rank_at_any_operation_costs_that_save_and_nothing_else(tmp_path, victim):
    operations = {0: 22, 1: 7}[victim]
    assert run_ranks(2, save_over_failures, tmp_path, victim, errno.ENOSPC, True) == [operations] * 2


def save_over_failures(rank: int, top: Path, victim: int, code: int, later: bool) -> int:
    """Save a second step with the n-th operation of `victim` failing, for every n.

    Returns the number of operations.
    """

    def all_of(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {f"own{rank}": torch.full((4,), float(step))}, {f"value{rank}": step}

    for number in itertools.count():
        store = CheckpointStore(top / str(number), Retention(keep=1))
        store.save(1, *all_of(1))
        message = ""
        with failing(number if rank == victim else None, code) as failed:
            try:
                (store.save_later if later else store.save)(2, *all_of(2))
                store.wait()
            except CheckpointError as error:
                message = str(error)
        if not from_rank(victim, failed()):
            return number
        assert not message or os.strerror(code) in message
        saved = not message or message.startswith("deleting steps after step 2 failed")
        target, _ = all_of(0)
        assert store.latest() == 1 + saved
        store.load(1 + saved, target)
        assert target[f"own{rank}"].tolist() == [1.0 + saved] * 4
        assert store.values(1 + saved)[f"value{rank}"] == 1 + saved
        store.save(2 + saved, *all_of(2 + saved))
        assert store.latest() == 2 + saved
        assert sorted(os.listdir(store.root)) == [".lock", f"step-{2 + saved:08d}"]
    raise AssertionError


def from_rank(rank: int, value: Any) -> Any:
    """Return the value of one rank on all ranks."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=rank)
    return box[0]


# Kills

SIZE = 512
"""Side of a tensor of 1 MiB: a save takes tens of milliseconds, and most kills hit a save."""


def save_for_ever(rank: int, size: int, meeting: str, root: Path, pipe: Connection, later: bool) -> None:
    """Save step after step and send each acknowledged step; first 0, before the first save.

    Every third step is loaded. `later` saves in the background; the next save acknowledges a step.
    """
    if size > 1:
        join(rank, size, meeting)
    store = CheckpointStore(root, Retention(keep=2))
    first = (store.latest() or 0) + 1
    pipe.send(0)
    for step in itertools.count(first):
        (store.save_later if later else store.save)(step, state(step, SIZE), blob(step))
        pipe.send(step - later)
        if step % 3 == 0:
            assert_holds(store, step, SIZE)


def last(pipe: Connection) -> int:
    """Return the last number sent by a killed process."""
    number = 0
    try:
        while pipe.poll():
            number = pipe.recv()
    except (EOFError, OSError):
        pass
    return number


def kill_while_saving(root: Path, kills: int, choice: random.Random, ranks: int = 1, only: int | None = None) -> None:
    """Start ranks in a loop of saves, kill all at a random moment, and check the newest step.

    With `only`, that rank is killed first, the rest 50 ms later. Every second start saves in the
    background.
    """
    torn = 0
    for number in range(kills):
        pipes, running, meeting = [], [], tempfile.mkdtemp(dir=root.parent)
        for rank in range(ranks):
            ours, theirs = processes.Pipe(duplex=False)
            arguments = (rank, ranks, meeting, root, theirs, number % 2 == 1)
            running.append(processes.Process(target=save_for_ever, args=arguments, daemon=True))
            running[-1].start()
            theirs.close()
            pipes.append(ours)
        for pipe in pipes:
            assert pipe.poll(60), "a rank did not start"
        time.sleep(choice.uniform(0, 0.2))
        if only is not None:
            running[only].kill()
            time.sleep(0.05)
        for process in running:
            process.kill()
        for process in running:
            process.join()
        acknowledged = max(map(last, pipes))
        torn += any(name.startswith(".step") for name in os.listdir(root)) if root.exists() else 0
        store = CheckpointStore(root)
        step = store.latest() or 0
        assert store.rejected == {}
        assert step >= acknowledged
        if step:
            assert_holds(store, step, SIZE)
    print(f"{torn} of {kills} kills cut a save or a deletion short")


@pytest.fixture
def choice() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def test_a_kill_at_any_moment_leaves_a_whole_newest_step(tmp_path, choice):
    kill_while_saving(tmp_path / "store", 10, choice)


def test_a_kill_of_two_ranks_or_of_one_leaves_a_whole_newest_step(tmp_path, choice):
    kill_while_saving(tmp_path / "store", 4, choice, ranks=2)
    kill_while_saving(tmp_path / "first", 2, choice, ranks=2, only=0)
    kill_while_saving(tmp_path / "second", 2, choice, ranks=2, only=1)


@pytest.mark.slow
def test_two_hundred_kills_leave_a_whole_newest_step(tmp_path, choice):
    kill_while_saving(tmp_path / "one", 120, choice)
    kill_while_saving(tmp_path / "two", 40, choice, ranks=2)
    kill_while_saving(tmp_path / "first", 20, choice, ranks=2, only=0)
    kill_while_saving(tmp_path / "second", 20, choice, ranks=2, only=1)
