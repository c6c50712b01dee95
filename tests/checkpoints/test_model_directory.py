"""A kill, a power cut or an error never leaves a part of a model directory."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from file_operations import failing, watch
from gloo_ranks import processes
from safetensors.torch import load_file
from strict_disk import Disk, Tree

from checkpoints import CheckpointError, TensorSpec, write_model
from checkpoints.tensor_file import header

SHAPES = {"a": (2, 3), "b": (4,), "c": (), "d": (0, 2)}
FILES = {"config.json": b"{}", "sub/note.txt": b"hello"}


def specs(dtype: torch.dtype = torch.float32) -> dict[str, TensorSpec]:
    return {name: TensorSpec(dtype, shape) for name, shape in SHAPES.items()}


def tensors(value: float, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, torch.full(shape, value, dtype=dtype)) for name, shape in SHAPES.items())


def write(out: Path, value: float = 1.0, replace: bool = False) -> None:
    write_model(out, specs(), tensors(value), FILES, file_bytes=20, replace=replace)


def content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_the_header_of_a_file_is_as_in_its_docstring() -> None:
    text = b'{"__metadata__":{"format":"pt"},"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}'
    expected = b"\x60" + bytes(7) + text + b" " * 7
    assert header({"w": TensorSpec(torch.bfloat16, (2, 3))}) == expected
    assert len(expected) == 104


def test_tensors_are_split_over_files_with_an_index(tmp_path: Path) -> None:
    write(tmp_path / "out")
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert sorted(content(tmp_path / "out")) == [
        "config.json",
        *names,
        "model.safetensors.index.json",
        "sub/note.txt",
    ]
    assert [sorted(load_file(tmp_path / "out" / name)) for name in names] == [["a"], ["b", "c", "d"]]
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 44},
        "weight_map": {"a": names[0], "b": names[1], "c": names[1], "d": names[1]},
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool], ids=str)
def test_a_small_model_is_one_file_without_an_index(tmp_path: Path, dtype: torch.dtype) -> None:
    write_model(tmp_path / "out", specs(dtype), tensors(1, dtype), {})
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == specs(dtype)
    assert all(tensor.all() for tensor in stored.values())


def test_an_existing_directory_is_replaced_only_on_request(tmp_path: Path) -> None:
    write(tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists already; export to another directory, or move it away"):
        write(tmp_path / "out", 2.0)
    assert content(tmp_path / "out") == before
    write(tmp_path / "out", 2.0, replace=True)
    assert load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")["a"].eq(2).all()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        [("b", torch.ones(2, 3))],
        [("a", torch.ones(3, 2))],
        [("a", torch.ones(2, 3).double())],
        list(tensors(1.0))[:-1],
    ],
    ids=["none", "name", "shape", "type", "too few"],
)
def test_a_tensor_that_was_not_announced_is_refused(tmp_path: Path, wrong: list[tuple[str, torch.Tensor]]) -> None:
    with pytest.raises(ValueError, match="was announced"):
        write_model(tmp_path / "out", specs(), wrong, FILES)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["no space", "broken"])
@pytest.mark.parametrize("replace", [False, True])
def test_a_disk_that_fails_at_any_operation_leaves_the_old_model(tmp_path: Path, replace: bool, code: int) -> None:
    for number in itertools.count():
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        if replace:
            write(out)
        before = content(out)
        with failing(number, code) as failed:
            errors = []
            try:
                write(out, 2.0, replace)
            except OSError as error:
                errors.append(error.errno)
        if errors:
            assert errors == [code]
            assert content(out) == before
            write(out, 2.0, replace)
        assert load_file(out / "model-00001-of-00002.safetensors")["a"].eq(2).all()
        if not failed():
            assert number > 20
            return
        assert [name for name in os.listdir(out.parent) if ".old-" not in name] == ["out"]


def write_until_killed(out: Path, number: int) -> None:
    """Replace a model; this process is killed before file operation `number`, counted from 0."""
    left = iter(range(number, -1, -1))

    def see(operation: str, path: str, detail: Any) -> None:
        if next(left, None) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        watch(patch, see)
        write(out, 2.0, replace=True)


def test_a_kill_at_any_operation_leaves_the_old_model_the_new_one_or_none(tmp_path: Path) -> None:
    write(tmp_path / "old")
    write(tmp_path / "new", 2.0)
    versions = [content(tmp_path / "old"), content(tmp_path / "new"), {}]
    seen = []
    for number in itertools.count():
        out = tmp_path / str(number) / "out"
        write(out)
        process = processes.Process(target=write_until_killed, args=(out, number))
        process.start()
        process.join()
        seen.append(versions.index(content(out)))
        write(out, 3.0, replace=True)
        assert os.listdir(out.parent) == ["out"]
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert seen == sorted(seen, key=[0, 2, 1].index)
    assert seen.count(2) == 1  # Between the two renames.


def files_under(tree: Tree, directory: str) -> dict[str, bytes]:
    prefix = f"{directory}/"
    return {
        path.removeprefix(prefix): data
        for path, data in tree.items()
        if data is not None and path[: len(prefix)] == prefix
    }


@pytest.mark.parametrize("replace", [False, True])
def test_a_power_cut_at_any_operation_leaves_the_old_model_the_new_one_or_none(tmp_path: Path, replace: bool) -> None:
    top, log = tmp_path / "disk", []
    top.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, lambda *operation: log.append(operation))
        if replace:
            write(top / "out")
        begun, before = len(log), content(top / "out")
        write(top / "out", 2.0, replace)
    after = content(top / "out")
    assert lost(top, log, begun, [before, after, {}]) == []
    for number, (operation, path, _) in enumerate(log):
        if operation == "fsync" and number >= begun:
            assert lost(top, log[:number] + log[number + 1 :], begun, [before, after, {}]), (
                f"{path} is forced for nothing"
            )


def lost(top: Path, log: list[tuple[str, str, Any]], begun: int, allowed: list[dict[str, bytes]]) -> list[str]:
    """Return the operations after which a power cut leaves a directory not in `allowed`.

    Ends with "at the end" if the new model, `allowed[1]`, can be lost after the last operation.
    """
    disk, choice, faults = Disk(str(top)), random.Random(0), []
    for number, operation in enumerate(log):
        disk.apply(*operation)
        if number < begun:
            continue
        found = [files_under(tree, "out") for tree in disk.crashes(choice)]
        if any(files not in allowed for files in found):
            faults.append(f"{number} {operation[:2]}")
    if any(files != allowed[1] for files in found):
        faults.append("at the end")
    return faults
