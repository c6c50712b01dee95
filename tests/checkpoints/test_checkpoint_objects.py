"""In an object store, without renames and locks, the manifest alone commits a step."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from gloo_ranks import run_ranks
from moto.server import ThreadedMotoServer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from checkpoints import About, CheckpointError, CheckpointStore, CorruptCheckpoint, Retention
from checkpoints.cli.main import main
from checkpoints.object_store import ObjectStore


def state(step: int) -> dict[str, Any]:
    return {"w": torch.full((300, 50), float(step)), "b": torch.arange(7.0) * step, "step": step}


def assert_holds(store: CheckpointStore, step: int) -> None:
    target = state(-1)
    store.load(step, target)
    assert target["step"] == step
    assert all(torch.equal(target[name], state(step)[name]) for name in "wb")
    assert store.values(step) == {"data/stream/0003": b"\0" * step}


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, state(step), {"data/stream/0003": b"\0" * step})


def keys(url: str) -> list[str]:
    """Return the names of all objects without tokens."""
    files, root = fsspec.url_to_fs(url)
    files.invalidate_cache()
    paths = [path.removeprefix(root).split("/")[1:] for path in files.find(root)]
    return sorted("/".join(part for part in path if not re.fullmatch("[0-9a-f]{16}", part)) for path in paths)


def whole(*steps: int) -> list[str]:
    files = ("manifest.json", "rank00000.safetensors", "rank00000.values")
    return [f"step-{step:08d}/{name}" for step in steps for name in files]


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """Environment of a process for an S3 server with a bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield environment
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "s3":
        request.getfixturevalue("s3")
        yield f"s3://bucket/{request.node.name}"
    else:
        yield "memory://run/checkpoints"
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]


def test_steps_come_back_and_old_ones_go(url):
    store = CheckpointStore(url, Retention(keep=2, keep_every=3))
    assert (store.latest(), store.steps()) == (None, [])
    save(store, 3, 4)
    store.save_later(5, state(5), {"data/stream/0003": b"\0" * 5})
    store.wait()
    assert keys(url) == whole(3, 4, 5)
    save(store, 6)
    assert keys(url) == whole(3, 5, 6)
    for step in (3, 5, 6):
        assert_holds(CheckpointStore(url), step)
    assert CheckpointStore(url).latest() == 6
    with pytest.raises(CheckpointError, match="already holds step 6, so step 6 cannot be saved"):
        save(store, 6)
    with pytest.raises(CheckpointError, match=r"holds no step 7; name one of \[3, 5, 6\]"):
        store.load(7, state(0))


@pytest.mark.parametrize("name", ["rank00000.safetensors", "rank00000.values", "manifest.json"])
def test_damage_costs_the_step_and_it_can_be_saved_again(url, name):
    store = CheckpointStore(url)
    save(store, 1, 2)
    files, root = fsspec.url_to_fs(url)
    (path,) = (path for path in files.find(f"{root}/step-00000002") if path.endswith(name))
    data = bytearray(files.cat_file(path))
    data[len(data) // 2] ^= 1
    files.pipe_file(path, bytes(data))
    store = CheckpointStore(url)
    with pytest.raises(CorruptCheckpoint, match=name):
        store.verify(2)
    assert store.latest() == 1
    assert name in store.rejected[2]
    save(store, 2)
    assert CheckpointStore(url).latest() == 2
    assert_holds(CheckpointStore(url), 2)


def test_damaged_steps_stay_when_a_run_begins_anew_and_its_own_steps_go_over_their_numbers(url):
    save(CheckpointStore(url), 1, 2)
    files, root = fsspec.url_to_fs(url)
    before = {path: files.cat_file(path) for path in files.find(root) if not path.endswith("manifest.json")}
    for path in before:
        files.pipe_file(path, before[path][:-1])
    store = CheckpointStore(url, Retention(keep=1))
    with pytest.raises(CorruptCheckpoint):
        store.latest()
    save(store, 1, 2, 3)
    assert CheckpointStore(url).latest() == 3
    assert CheckpointStore(url).steps() == [3]
    assert {path: files.cat_file(path) for path in before} == {path: data[:-1] for path, data in before.items()}
    assert sum("manifest.json.rejected-" in path for path in files.find(root)) == 2


def test_a_missing_or_shorter_object_costs_the_step(url):
    store = CheckpointStore(url)
    save(store, 1, 2, 3)
    files, root = fsspec.url_to_fs(url)
    for step, change in ((3, files.rm_file), (2, lambda path: files.pipe_file(path, files.cat_file(path)[:-1]))):
        (path,) = (path for path in files.find(f"{root}/step-{step:08d}") if path.endswith(".safetensors"))
        change(path)
    assert store.latest() == 1
    assert "cannot be read" in store.rejected[3]
    assert "bytes" in store.rejected[2]


def test_a_run_is_told_that_another_has_saved_meanwhile(url):
    ours, theirs = CheckpointStore(url), CheckpointStore(url)
    save(ours, 1)
    save(theirs, 2)
    with pytest.raises(CheckpointError, match=r"another run has saved steps \[2\] to .* since this run began"):
        save(ours, 3)
    save(theirs, 3)
    assert theirs.steps() == [1, 2, 3]


def test_only_one_of_two_runs_commits_a_step_saved_at_once(url):
    save(CheckpointStore(url), 1)
    first, second = ObjectStore(url), ObjectStore(url)
    tokens = [bucket.begin(2, ()) for bucket in (first, second)]
    first.commit(2, tokens[0], [], About())
    with pytest.raises(CheckpointError, match="another run has just saved step 2"):
        second.commit(2, tokens[1], [], About())
    second.abandon(2, tokens[1])
    assert first.manifest(2).token == tokens[0]


def test_the_commands_take_urls(url, capsys):
    def output_of(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code
        return capsys.readouterr().out

    save(CheckpointStore(url), 1, 2)
    assert "step" in output_of("list", url)
    assert output_of("verify", url) == "step 1: whole, 2 files\nstep 2: whole, 2 files\n"
    assert "tensors of w" in output_of("inspect", f"{url}/step-00000002")
    assert output_of("prune", url, "--keep", "1") == "deleted [1]; [2] stay\n"


# Ends at any moment


class Killed(BaseException):
    """The end of a process: no call in answer reaches the store."""


class Counted:
    """From call n on, every change of the store fails, as for a dead process or network."""

    def __init__(self, patch: pytest.MonkeyPatch, end: int | None, error: BaseException) -> None:
        self.calls = 0
        for name in ("_open", "pipe_file", "rm_file", "cp_file"):
            patch.setattr(MemoryFileSystem, name, self._counted(getattr(MemoryFileSystem, name), end, error))

    def _counted(self, real: Any, end: int | None, error: BaseException) -> Any:
        def call(files: MemoryFileSystem, *arguments: Any, **options: Any) -> Any:
            if real.__name__ == "_open" and "r" in options.get("mode", arguments[1] if len(arguments) > 1 else "rb"):
                return real(files, *arguments, **options)
            self.calls += 1
            if end is not None and self.calls > end:
                raise error
            return real(files, *arguments, **options)

        return call


@pytest.mark.parametrize("error", [Killed(), OSError("no route to host")], ids=["killed", "cut off"])
def test_a_run_that_ends_at_any_moment_of_a_save_leaves_the_old_step_or_the_new_one(monkeypatch, error):
    for end in itertools.count():
        url = f"memory://ends/{type(error).__name__}/{end}"
        store = CheckpointStore(url, Retention(keep=1))
        save(store, 1)
        done = True
        with pytest.MonkeyPatch.context() as patch:
            counted = Counted(patch, end, error)
            try:
                save(store, 2)
            except (Killed, CheckpointError) as raised:
                done = "deleting steps after step 2 failed" in str(raised)
        after = CheckpointStore(url, Retention(keep=1))
        found = after.latest()
        assert after.rejected == {}
        assert found in ((2,) if done else (1, 2))
        assert_holds(after, found)
        save(after, 3)
        assert keys(url) == whole(3)
        if counted.calls <= end:
            break
    assert end == 7  # Two files; the manifest, which takes two calls; of the old step the manifest, then the files.
    MemoryFileSystem.store.clear()


# Several ranks


def save_and_load_on_ranks(rank: int, environment: dict[str, str], url: str) -> list[float]:
    os.environ.update(environment)
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(6000.0).view(60, 100)
    with CheckpointStore(url) as store:
        store.save_later(1, {"w": distribute_tensor(whole, mesh, [Shard(0)])}, {f"rank{rank}": rank})
        store.wait()
        assert store.latest() == 1
        target = distribute_tensor(torch.zeros(60, 100), mesh, [Shard(1)])
        store.load(1, {"w": target})
        assert torch.equal(target.full_tensor(), whole)
        return [store.values(1)[f"rank{rank}"] for rank in range(2)]


def test_ranks_save_and_load_through_s3(s3):
    assert run_ranks(2, save_and_load_on_ranks, s3, "s3://bucket/ranks") == [[0, 1]] * 2
    assert len(keys("s3://bucket/ranks")) == 5


@pytest.mark.parametrize("root", ["s3://", "s3:///", "s3:///run", "gs://", "memory://", "://", "://bucket/run"])
def test_a_root_without_a_bucket_or_path_is_refused_before_anything_is_opened(
    monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(fsspec, "url_to_fs", opened.append)
    with pytest.raises(CheckpointError) as error:
        CheckpointStore(root)
    assert str(error.value) == (
        f"the root {root!r} of checkpoints names no bucket or path; write the whole URL, such as s3://bucket/run"
    )
    assert opened == []
