"""A step as a Hugging Face model directory, by the recipe saved in the step.

A recipe names the rows for each tensor of the directory. Knows no model.

Example: the run stacks queries and keys in a parameter `model.qk` of shape (8, 4). The recipe
`{"q_proj": [Rows("model.qk", 0, 4)], "k_proj": [Rows("model.qk", 4, 4)]}` makes two tensors of
shape (4, 4).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import UNSET, Meta, Struct, UnsetType

from checkpoints.commit import Marker, StepFiles
from checkpoints.errors import CheckpointError, CorruptCheckpoint, one_line
from checkpoints.manifest import Manifest
from checkpoints.model.base import Element, Merged, Rows, export_merged
from checkpoints.model.directory import write_model
from checkpoints.storage import read_tensors
from checkpoints.tensor_file import DTYPES, TensorSpec

_READS = 4
"""Limit of the bytes read for an export, as a multiple of the bytes of a step."""

RECIPE = "export"
"""The key of the recipe among the values of a step."""

_WORD = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
# Files beside the weights are data: no code, no pickle, no path outside the directory.
FileName = Annotated[str, Meta(pattern=rf"\A({_WORD}/)?{_WORD}\.(json|jinja|txt|model)\Z")]


class Recipe(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The content of a model directory.

    `tensors` gives the rows of each tensor by name, to be concatenated in order; `files` the
    content of the files beside the weights, by relative path. `dtype` is the element type of all
    tensors of the directory, by its name in the safetensors format; left out if the tensors keep
    the types of the step. `stem` begins the names of the weight files.

    If the step holds adapters alone, `merged` and `merged_files` describe the model with the
    adapters added: its files are `merged_files` and the `files` that are not in `adapter_files`.
    """

    tensors: dict[str, list[Rows]]
    files: dict[FileName, bytes]
    dtype: Element | UnsetType = UNSET
    stem: Literal["model", "adapter_model"] = "model"
    merged: Merged | UnsetType = UNSET
    merged_files: dict[FileName, bytes] = {}
    adapter_files: list[FileName] = []

    def builtins(self) -> dict[str, Any]:
        """Return the recipe as a plain value for `CheckpointStore.save`."""
        value: dict[str, Any] = msgspec.to_builtins(self, builtin_types=(bytes,))
        return value


def parse_recipe(value: Any) -> Recipe:
    """Return the recipe in a value made by `Recipe.builtins`, or raise CorruptCheckpoint."""
    try:
        return msgspec.convert(value, Recipe)
    except msgspec.ValidationError as error:
        raise CorruptCheckpoint(f"the value {RECIPE!r} is not a recipe of an export: {one_line(error)}") from error


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
    # peft reads adapters from a single file.
    file_bytes = file_bytes if recipe.stem == "model" else sys.maxsize
    write_model(out, specs, typed, recipe.files, file_bytes=file_bytes, stem=recipe.stem)


def export_with_base(
    step_files: StepFiles,
    manifest: Manifest,
    markers: Mapping[str, Marker],
    recipe: Recipe,
    out: Path,
    base: Path | None,
    file_bytes: int,
) -> None:
    """Write the model directory of a verified step with its adapters added to the base model.

    `base` is the directory of the base model; by default the directory that the run used.

    Raises:
        CorruptCheckpoint: The step lacks rows of the recipe, or the recipe does not fit the base.
        CheckpointError: The step holds no adapters, `base` is another model, or `out` exists.
    """
    if recipe.merged is UNSET:
        raise CheckpointError("the step holds a whole model and no adapters to merge; export it without --merged")
    parts = {}
    for name, tensor in recipe.merged.tensors.items():
        if tensor.rows is not UNSET:
            parts[name] = tensor.rows
        if tensor.product is not UNSET:
            parts |= {f"{name} left": tensor.product.left, f"{name} right": tensor.product.right}
    _require_bounded(recipe, {name: _spec(name, rows, manifest) for name, rows in parts.items()}, manifest)

    def read(rows: Sequence[Rows]) -> torch.Tensor:
        return torch.cat([_read_rows(step_files, manifest, markers, part) for part in rows])

    files = {name: content for name, content in recipe.files.items() if name not in recipe.adapter_files}
    directory = Path(recipe.merged.base) if base is None else base
    export_merged(recipe.merged, directory, read, files | recipe.merged_files, out, file_bytes)


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


def _read_rows(step_files: StepFiles, manifest: Manifest, markers: Mapping[str, Marker], part: Rows) -> torch.Tensor:
    return _read(step_files, manifest, markers, part.key)[part.start : part.start + part.count]


def _read(step_files: StepFiles, manifest: Manifest, markers: Mapping[str, Marker], key: str) -> torch.Tensor:
    tensor = torch.empty(manifest.tensors[key].shape, dtype=DTYPES[manifest.tensors[key].dtype])
    read_tensors(step_files, manifest, markers, {key: tensor})
    return tensor
