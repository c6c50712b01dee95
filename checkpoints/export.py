"""A step as a model directory that others load. The step says itself how: it keeps a recipe, and this knows no model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta, Struct

from checkpoints.commit import StepFiles
from checkpoints.errors import CorruptCheckpoint
from checkpoints.manifest import Count, Manifest
from checkpoints.model_directory import write_model
from checkpoints.storage import read_tensors
from checkpoints.tensor_file import DTYPES, TensorSpec

RECIPE = "export"
"""The key under which a run saves its recipe, among the values."""

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


def export(step_files: StepFiles, manifest: Manifest, recipe: Recipe, out: Path, file_bytes: int) -> None:
    """Write the model directory of a verified step with `write_model`, one tensor in memory at a time.

    Raises CorruptCheckpoint if the recipe asks for tensors that the step does not hold.
    """
    specs = {name: _spec(name, rows, manifest) for name, rows in recipe.tensors.items()}
    specs = dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))
    tensors = _tensors(step_files, manifest, {name: recipe.tensors[name] for name in specs})
    write_model(out, specs, tensors, recipe.files, file_bytes=file_bytes)


def _spec(name: str, rows: list[Rows], manifest: Manifest) -> TensorSpec:
    """Return the type and shape of the tensor that `rows` make, once the step is known to hold them."""
    forms = set()
    for part in rows:
        tensor = manifest.tensors.get(part.key)
        if tensor is None or not tensor.shape or part.start + part.count > tensor.shape[0]:
            raise CorruptCheckpoint(f"{name!r} is to be made of {part}, which the step does not hold")
        forms.add((tensor.dtype, tensor.shape[1:]))
    if len(forms) != 1:
        raise CorruptCheckpoint(f"{name!r} is to be made of rows that do not fit together")
    ((dtype, columns),) = forms
    return TensorSpec(DTYPES[dtype], (sum(part.count for part in rows), *columns))


def _tensors(
    step_files: StepFiles, manifest: Manifest, tensors: dict[str, list[Rows]]
) -> Iterator[tuple[str, torch.Tensor]]:
    # Neighbours in a model directory are often rows of one tensor of the step.
    read = lru_cache(maxsize=1)(lambda key: _read(step_files, manifest, key))
    for name, rows in tensors.items():
        yield name, torch.cat([read(part.key)[part.start : part.start + part.count] for part in rows])


def _read(step_files: StepFiles, manifest: Manifest, key: str) -> torch.Tensor:
    tensor = torch.empty(manifest.tensors[key].shape, dtype=DTYPES[manifest.tensors[key].dtype])
    read_tensors(step_files, manifest, {key: tensor})
    return tensor
