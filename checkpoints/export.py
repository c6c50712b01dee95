"""A step as a Hugging Face model directory, by the recipe saved in the step.

A recipe names the rows for each tensor of the directory. Knows no model.

Example: the run stacks queries and keys in a parameter `model.qk` of shape (8, 4). The recipe
`{"q_proj": [Rows("model.qk", 0, 4)], "k_proj": [Rows("model.qk", 4, 4)]}` makes two tensors of
shape (4, 4).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import UNSET, Meta, Struct, UnsetType

from checkpoints.commit import Marker, StepFiles
from checkpoints.errors import CorruptCheckpoint
from checkpoints.manifest import Count, Manifest
from checkpoints.model_directory import write_model
from checkpoints.storage import read_tensors
from checkpoints.tensor_file import DTYPES, TensorSpec

_READS = 4
"""Limit of the bytes read for an export, as a multiple of the bytes of a step."""

RECIPE = "export"
"""The key of the recipe among the values of a step."""

_WORD = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
# Files beside the weights are data: no code, no pickle, no path outside the directory.
FileName = Annotated[str, Meta(pattern=rf"\A({_WORD}/)?{_WORD}\.(json|jinja|txt|model)\Z")]


class Rows(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Rows `[start, start + count)` of the tensor `key` of a step."""

    key: str
    start: Count
    count: Count


class Recipe(Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a model directory.

    `tensors` gives the rows of each tensor by name, to be concatenated in order; `files` the
    content of the files beside the weights, by relative path. `dtype` is the element type of all
    tensors of the directory, by its name in the safetensors format; left out if the tensors keep
    the types of the step.
    """

    tensors: dict[str, list[Rows]]
    files: dict[FileName, bytes]
    dtype: Literal["F32", "BF16"] | UnsetType = UNSET

    def builtins(self) -> dict[str, Any]:
        """Return the recipe as a plain value for `CheckpointStore.save`."""
        value: dict[str, Any] = msgspec.to_builtins(self, builtin_types=(bytes,))
        return value


def parse_recipe(value: Any) -> Recipe:
    """Return the recipe in a value made by `Recipe.builtins`, or raise CorruptCheckpoint."""
    try:
        return msgspec.convert(value, Recipe)
    except msgspec.ValidationError as error:
        raise CorruptCheckpoint(f"the value {RECIPE!r} is not a recipe of an export: {error}") from error


def export(
    step_files: StepFiles,
    manifest: Manifest,
    markers: Mapping[str, Marker],
    recipe: Recipe,
    out: Path,
    file_bytes: int,
) -> None:
    """Write the model directory of a verified step with `write_model`, tensor by tensor.

    Raises:
        CorruptCheckpoint: The step lacks rows of the recipe.
        CheckpointError: `out` exists.
    """
    specs = {name: _spec(name, rows, manifest) for name, rows in recipe.tensors.items()}
    _require_bounded(recipe, specs, manifest)
    if recipe.dtype is not UNSET:
        specs = {name: spec._replace(dtype=DTYPES[recipe.dtype]) for name, spec in specs.items()}
    specs = dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))
    tensors = _tensors(step_files, manifest, markers, {name: recipe.tensors[name] for name in specs})
    typed = ((name, tensor.to(specs[name].dtype)) for name, tensor in tensors)
    write_model(out, specs, typed, recipe.files, file_bytes=file_bytes)


def _spec(name: str, rows: list[Rows], manifest: Manifest) -> TensorSpec:
    """Return the type and shape of the tensor made of `rows`.

    Raises CorruptCheckpoint if the step lacks rows.
    """
    forms = set()
    for part in rows:
        tensor = manifest.tensors.get(part.key)
        if tensor is None or not tensor.shape or part.start + part.count > tensor.shape[0]:
            raise CorruptCheckpoint(f"the recipe makes {name!r} of {part}, but the step does not hold these rows")
        forms.add((tensor.dtype, tensor.shape[1:]))
    if len(forms) != 1:
        raise CorruptCheckpoint(f"the recipe makes {name!r} of rows that differ in type or columns, or of none")
    ((dtype, columns),) = forms
    return TensorSpec(DTYPES[dtype], (sum(part.count for part in rows), *columns))


def _require_bounded(recipe: Recipe, specs: dict[str, TensorSpec], manifest: Manifest) -> None:
    """Raise CorruptCheckpoint if a recipe makes or reads far more bytes than the step holds."""
    sizes = {key: math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize for key, tensor in manifest.tensors.items()}
    made, stored = sum(spec.nbytes for spec in specs.values()), sum(sizes.values())
    # A tensor of the step is read again whenever a name's rows come from another tensor.
    keys = [part.key for rows in recipe.tensors.values() for part in rows]
    read = sum(sizes[key] for key, _ in groupby(keys))
    if made > stored or read > _READS * stored:
        raise CorruptCheckpoint(
            f"the recipe makes {made} bytes of tensors and reads {read}, but the step holds {stored}; each row may be used once"
        )


def _tensors(
    step_files: StepFiles, manifest: Manifest, markers: Mapping[str, Marker], tensors: dict[str, list[Rows]]
) -> Iterator[tuple[str, torch.Tensor]]:
    # Successive tensors of a model are often rows of the same tensor of the step.
    read = lru_cache(maxsize=1)(lambda key: _read(step_files, manifest, markers, key))
    for name, rows in tensors.items():
        yield name, torch.cat([read(part.key)[part.start : part.start + part.count] for part in rows])


def _read(step_files: StepFiles, manifest: Manifest, markers: Mapping[str, Marker], key: str) -> torch.Tensor:
    tensor = torch.empty(manifest.tensors[key].shape, dtype=DTYPES[manifest.tensors[key].dtype])
    read_tensors(step_files, manifest, markers, {key: tensor})
    return tensor
