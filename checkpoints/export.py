"""A step as a model directory that others load. The step says itself how: it keeps a recipe, and this knows no model."""

from __future__ import annotations

import secrets
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta, Struct
from safetensors.torch import save_file

from checkpoints.commit import StepFiles, make_directory, publish, sync, write_file
from checkpoints.errors import CheckpointError, CorruptCheckpoint
from checkpoints.manifest import DTYPES, Count, Manifest
from checkpoints.storage import read_tensors

RECIPE = "export"
"""The key under which a run saves its recipe, among the values."""

SHARD = 4 << 30
"""Bytes of tensors in one file, which is also what is held in memory."""

_WORD = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
# What is written beside the weights is data: no code, no pickle, nothing outside the directory.
OtherFile = Annotated[str, Meta(pattern=rf"\A({_WORD}/)?{_WORD}\.(json|jinja|txt|model)\Z")]


class Rows(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Rows `[start, start + count)` of a tensor of the step."""

    key: str
    start: Count
    count: Count


class Recipe(Struct, frozen=True, forbid_unknown_fields=True):
    """The tensors of a model directory by name, each the rows of which it is made, in order; and its other files."""

    tensors: dict[str, list[Rows]]
    files: dict[OtherFile, bytes]

    def builtins(self) -> dict[str, Any]:
        """As a value that a store saves."""
        value: dict[str, Any] = msgspec.to_builtins(self, builtin_types=(bytes,))
        return value


def parse_recipe(value: Any) -> Recipe:
    """What `Recipe.builtins` made; raises `CorruptCheckpoint` for anything else."""
    try:
        return msgspec.convert(value, Recipe)
    except msgspec.ValidationError as error:
        raise CorruptCheckpoint(f"not a recipe of an export: {error}") from error


def export(step_files: StepFiles, manifest: Manifest, recipe: Recipe, out: Path) -> None:
    """Writes the directory `out` from a verified step in `place`: whole or not at all, a shard in memory at a time."""
    if out.exists():
        raise CheckpointError(f"{out} is there already; export to another directory, or move it away")
    shards = _shards(recipe, manifest)
    make_directory(out.absolute().parent)
    attempt = out.absolute().with_name(f".{out.name}.partial-{secrets.token_hex(8)}")
    attempt.mkdir()
    try:
        for name, data in recipe.files.items():
            make_directory((attempt / name).parent)
            write_file(attempt / name, [data])
        for name, tensors in shards.items():
            _write_shard(attempt / name, step_files, manifest, {tensor: recipe.tensors[tensor] for tensor in tensors})
        if len(shards) > 1:
            write_file(attempt / "model.safetensors.index.json", [_index(shards, recipe, manifest)])
        publish(attempt, out.absolute())
    except BaseException:
        shutil.rmtree(attempt, ignore_errors=True)
        raise


def _shards(recipe: Recipe, manifest: Manifest) -> dict[str, list[str]]:
    """Names of files and the tensors in each, as Hugging Face names them."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, rows in recipe.tensors.items():
        more = _size(name, rows, manifest)
        if groups[-1] and size + more > SHARD:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += more
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def _size(name: str, rows: list[Rows], manifest: Manifest) -> int:
    """Bytes of a tensor, once its rows are found to be there and to fit together."""
    forms = set()
    for part in rows:
        tensor = manifest.tensors.get(part.key)
        if tensor is None or not tensor.shape or part.start + part.count > tensor.shape[0]:
            raise CorruptCheckpoint(f"{name!r} is to be made of {part}, which the step does not hold")
        forms.add((tensor.dtype, tensor.shape[1:]))
    if len(forms) != 1:
        raise CorruptCheckpoint(f"{name!r} is to be made of rows that do not fit together")
    ((dtype, columns),) = forms
    return sum(part.count for part in rows) * torch.Size(columns).numel() * DTYPES[dtype].itemsize


def _write_shard(path: Path, step_files: StepFiles, manifest: Manifest, tensors: dict[str, list[Rows]]) -> None:
    # Neighbours in a model directory are often rows of one tensor of ours.
    read = lru_cache(maxsize=1)(lambda key: _read(step_files, manifest, key))
    joined = {
        name: torch.cat([read(part.key)[part.start : part.start + part.count] for part in rows])
        for name, rows in tensors.items()
    }
    save_file(joined, path, metadata={"format": "pt"})
    sync(path)


def _read(step_files: StepFiles, manifest: Manifest, key: str) -> torch.Tensor:
    tensor = torch.empty(manifest.tensors[key].shape, dtype=DTYPES[manifest.tensors[key].dtype])
    read_tensors(step_files, manifest, {key: tensor})
    return tensor


def _index(shards: dict[str, list[str]], recipe: Recipe, manifest: Manifest) -> bytes:
    total = sum(_size(name, rows, manifest) for name, rows in recipe.tensors.items())
    places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    return msgspec.json.format(msgspec.json.encode({"metadata": {"total_size": total}, "weight_map": places}))
