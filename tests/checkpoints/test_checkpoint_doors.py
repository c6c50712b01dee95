"""Hostile files and unexpected errors end in one line, and never harm a file outside."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from test_checkpoint_cli import call

from checkpoints import RECIPE, About, CheckpointError, CheckpointStore, CorruptCheckpoint, Recipe, Retention, Rows
from checkpoints import values as plain_state
from checkpoints.cli import show
from checkpoints.errors import one_line, printable
from checkpoints.manifest import Manifest, Tensor
from checkpoints.model.directory import write_model
from checkpoints.tensor_file import TensorSpec


def saved(root: Path, step: int = 1, **values: object) -> CheckpointStore:
    store = CheckpointStore(root, Retention(keep=9))
    store.save(step, {"w": torch.arange(12.0).view(6, 2)}, values)
    return store


def rewrite(path: Path) -> None:
    """Change a byte of the tensors, and set the time of modification back."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [rewrite, lambda path: path.rename(path.with_name("w")), Path.unlink],
    ids=["rewritten", "renamed", "removed"],
)
def test_a_file_that_changes_after_its_verification_is_not_loaded(tmp_path, change):
    store = saved(tmp_path)
    assert store.latest() == 1
    change(tmp_path / "step-00000001" / "rank00000.safetensors")
    state = {"w": torch.zeros(6, 2)}
    with pytest.raises(CorruptCheckpoint, match=r"changed after it was verified|cannot be read"):
        store.load(1, state)
    assert not state["w"].any()
    with pytest.raises(CorruptCheckpoint):  # read and verified again
        store.load(1, state)


def test_a_file_that_changes_during_a_load_is_an_error(tmp_path, monkeypatch):
    store = saved(tmp_path)
    from checkpoints import storage

    read = storage._read_box

    def change_after(file, box, buffer):
        read(file, box, buffer)
        rewrite(tmp_path / "step-00000001" / "rank00000.safetensors")

    monkeypatch.setattr(storage, "_read_box", change_after)
    with pytest.raises(CorruptCheckpoint, match="changed after it was verified; load the step again"):
        store.load(1, {"w": torch.zeros(6, 2)})


def test_a_copy_by_links_between_two_loads_costs_one_load_only(tmp_path):
    store = saved(tmp_path / "root")
    assert store.latest() == 1
    os.link(tmp_path / "root/step-00000001/rank00000.safetensors", tmp_path / "backup")
    state = {"w": torch.zeros(6, 2)}
    with pytest.raises(CorruptCheckpoint, match="load the step again"):
        store.load(1, state)
    store.load(1, state)
    assert state["w"][0, 1] == 1


@pytest.mark.parametrize(
    "plant", [os.link, os.symlink, lambda _, path: path.mkdir()], ids=["link", "symlink", "directory"]
)
def test_a_planted_lock_overwrites_no_file_outside(tmp_path, plant):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "root").mkdir()
    plant(victim, tmp_path / "root/.lock")
    with pytest.raises(CheckpointError, match=r"\.lock is a link to another file, or no file, .*; delete .*\.lock$"):
        CheckpointStore(tmp_path / "root").claim()
    assert victim.read_text() == "mine"
    lock = tmp_path / "root/.lock"
    lock.rmdir() if lock.is_dir() else lock.unlink()  # as the message advises
    CheckpointStore(tmp_path / "root").claim()


def test_a_pipe_as_a_lock_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(CheckpointError, match="cannot be locked; delete"):
        CheckpointStore(tmp_path).claim()


def test_control_characters_are_not_printed(tmp_path):
    assert printable("a\x1b[2J\x9b\u202e\n\té") == "a\\x1b[2J\\x9b\\u202e\n\té"
    assert one_line(ValueError("a\n\x07b\udc80")) == "a \\x07b\\udc80"
    assert one_line(MemoryError()) == "MemoryError"
    with CheckpointStore(tmp_path) as store:
        store.claim()
        (tmp_path / ".lock").write_text("process 1 on \x1b]0;evil\x07")
        with pytest.raises(CheckpointError, match=r"in use by process 1 on \\x1b\]0;evil\\x07;"):
            CheckpointStore(tmp_path).claim()


def test_keys_with_control_characters_are_shown_escaped(tmp_path):
    saved(tmp_path, **{"\x1b[2Jkey": "\x1b[2J", "long\x07/a": "x" * 3000})
    code, lines = call("inspect", tmp_path / "step-00000001")
    assert code == 0
    assert not [line for line in lines if not line.isprintable()]
    assert any(line.startswith("\\x1b[2Jkey") for line in lines)


def nested(depth: int, kind: type) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value] if kind is list else {"k": value}
    return value


@pytest.mark.parametrize("kind", [list, dict])
def test_deep_values_are_refused_by_saves_and_readers(tmp_path, monkeypatch, kind):
    saved(tmp_path, 1, deep=nested(100, kind))
    assert call("inspect", tmp_path / "step-00000001")[0] == 0
    with pytest.raises(CheckpointError, match="more than 100 levels; save a flatter value"):
        saved(tmp_path, 2, deep=nested(101, kind))
    for step, depth in ((3, 101), (4, 300), (5, 400)):
        with monkeypatch.context() as patch:
            patch.setattr(plain_state, "MOST_LEVELS", 10**6)
            saved(tmp_path, step, deep=nested(depth, kind))
        code, lines = call("inspect", tmp_path / f"step-0000000{step}")
        assert (code, len(lines)) == (1, 1)
        assert "'deep' cannot be read" in lines[0]


def test_a_recipe_makes_no_more_bytes_than_its_step_holds(tmp_path):
    store = CheckpointStore(tmp_path / "store")
    many = {f"x{n}": [Rows("w", 0, 4)] for n in range(30_000)}
    turns = {f"x{n}": [Rows("wv"[n % 2], n // 2, 1)] for n in range(2000)}
    for step, (tensors, message) in enumerate(((many, "makes 960000 bytes"), (turns, "and reads "))):
        state = {"w": torch.ones(4 if step == 0 else 1000, 2), "v": torch.ones(1000, 2) if step else torch.ones(1, 1)}
        store.save(step, state, {RECIPE: Recipe(tensors, {}).builtins()})
        with pytest.raises(CorruptCheckpoint, match=message):
            store.export(step, tmp_path / "out")
    assert os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize("shape", [(0, 2**62, 2**62), (0, *[1] * 64), (2**62, 0, 4)])
def test_an_empty_tensor_is_bounded(shape):
    manifest = Manifest(2, 1, "0" * 16, 1, About(), {}, {"w": Tensor("F32", shape, [])}, {}, {})
    with pytest.raises(CorruptCheckpoint, match="more than 64 dimensions, or is empty with sizes beyond"):
        manifest.check()
    msgspec.structs.replace(manifest, tensors={"w": Tensor("F32", (0, 4), [])}).check()


def test_the_best_and_the_last_step_are_exported_on_request(tmp_path):
    recipe = Recipe({"w": [Rows("w", 0, 2)]}, {}).builtins()
    with CheckpointStore(tmp_path / "root", Retention(keep=9)) as store:
        for step, loss in ((1, 2.5), (2, 0.5), (3, 1.5), (4, None)):
            store.save(step, {"w": torch.full((2, 1), float(step))}, {RECIPE: recipe}, About(validation_loss=loss))
    for option, step in (("--best", 2), ("--last", 4)):
        out = tmp_path / option
        assert call("export", tmp_path / "root", out, option) == (0, [f"exported step {step} to {out}"])
    assert call("export", tmp_path / "root", tmp_path / "x", "--best", "--last")[0] == 1
    saved(tmp_path / "unjudged")
    line = call("export", tmp_path / "unjudged", tmp_path / "x", "--best")[1][0]
    assert "has a validation loss; export a step by its directory, or use --last" in line


@pytest.mark.parametrize("function", ["write", "fsync"])
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, function):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    specs = {"w": TensorSpec(torch.float32, (2,))}
    with pytest.raises(OSError, match=r"No space left on device: '.*/\.out\.partial-[0-9a-f]{16}/model.safetensors'"):
        write_model(tmp_path / "out", specs, [("w", torch.ones(2))], {})


class Panic(BaseException):
    """A panic of a Rust library."""


@pytest.mark.parametrize("kind", [KeyError, RecursionError, MemoryError, Panic])
def test_an_unexpected_error_is_one_line_that_names_the_path(tmp_path, monkeypatch, capsys, kind):
    def broken(*_: object, **__: object) -> None:
        raise kind("surprise")

    monkeypatch.setattr(show, "show_step", broken)
    monkeypatch.delenv("LOGLEVEL", raising=False)
    step = saved(tmp_path).root / "step-00000001"
    code, lines = call("inspect", step)
    assert (code, len(lines)) == (1, 1)
    assert f"error: inspect {step}: {kind.__name__}: " in lines[0]
    code, lines = call("inspect", step, "--debug")
    assert "Traceback (most recent call last):" in lines
    assert sys.stdout is not None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("nope://x/y", "cannot be opened: Protocol not known: nope; correct the URL"),
        ("a\0b", "is no path; name a directory"),
    ],
)
def test_a_root_that_is_no_place_is_one_line(root, message):
    code, lines = call("list", root)
    assert (code, len(lines)) == (1, 1)
    assert message in lines[0]
    assert repr(root)[1:-1] in lines[0]
