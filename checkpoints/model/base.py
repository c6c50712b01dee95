"""The model under adapters: weight files outside of the checkpoints, known by their digests.

A run that trains low-rank adapters saves the adapters alone. `export_merged` adds them to the
weights of the model: `W + scale * (B @ A)` for every weight with an adapter, tensor by tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from msgspec import UNSET, Meta, Struct, UnsetType
from safetensors import SafetensorError, safe_open

from checkpoints.digest import file_digest
from checkpoints.errors import CheckpointError, CorruptCheckpoint, one_line
from checkpoints.manifest import Count, Digest
from checkpoints.model.directory import write_model
from checkpoints.tensor_file import DTYPES, TensorSpec

WeightFile = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\.safetensors\Z")]
Element = Literal["F32", "BF16"]
"""Element types of exported weights, by their name in the safetensors format."""


class Rows(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Rows `[start, start + count)` of the tensor `key` of a step."""

    key: str
    start: Count
    count: Count


class Product(Struct, frozen=True, forbid_unknown_fields=True):
    """A low-rank matrix: `scale` times the product of two matrices of a step."""

    left: list[Rows]
    right: list[Rows]
    scale: float


class BaseTensor(Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor of the merged model: from a file of the base, or from rows of the step."""

    file: WeightFile
    """File of the base that holds the tensor."""
    product: Product | UnsetType = UNSET
    """Matrix to add."""
    rows: list[Rows] | UnsetType = UNSET
    """Rows of the step to write in place of the tensor."""


class Merged(Struct, frozen=True, forbid_unknown_fields=True):
    """The merged model: the base with the adapters of a step added."""

    base: str
    """Directory of the base at the time of the run."""
    digests: dict[WeightFile, Digest]
    """Digest of each weight file of the base."""
    tensors: dict[str, BaseTensor]
    computed: Element
    """Element type of the base's weights in the run: rounded to it before the sum."""
    dtype: Element
    """Element type of all tensors of the directory."""


def weight_digests(paths: Iterable[Path], remedy: str = "restore the model") -> dict[str, str]:
    """Return the digest of each file by name. Reads every byte.

    Raises CheckpointError, with the remedy, if a file cannot be read.
    """
    digests = {}
    for path in paths:
        try:
            # Without O_NONBLOCK, opening a pipe in place of a file would wait for a writer forever.
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                digests[path.name] = file_digest(file.fileno(), path.stat().st_size)
        except (OSError, EOFError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it became shorter"
            raise CheckpointError(f"{path} cannot be read: {reason}; {remedy}") from error
    return digests


def merge(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `weight + scale * (left @ right)` in float32, computed on the CPU."""
    return torch.addmm(weight.cpu().float(), left.cpu().float(), right.cpu().float(), alpha=scale)


def export_merged(
    merged: Merged,
    base: Path,
    read: Callable[[tuple[Rows, ...]], torch.Tensor],
    files: dict[str, bytes],
    out: Path,
    file_bytes: int,
) -> None:
    """Write the merged model with `write_model`; `read` returns rows of the step.

    Raises:
        CheckpointError: `base` is another model than the run's, or `out` exists.
        CorruptCheckpoint: The recipe does not fit the base.
    """
    moved = "name the directory of the run's model with --base"
    found = weight_digests((base / name for name in merged.digests), moved)
    for name, digest in merged.digests.items():
        if found[name] != digest:
            raise CheckpointError(
                f"{base / name} is another file than the run's (digest {found[name][:12]}, not {digest[:12]}); name the "
                "model of the run with --base"
            )
    with ExitStack() as stack:
        opened = {name: stack.enter_context(_opened(base / name)) for name in merged.digests}
        specs = {name: _spec(name, tensor, merged, opened) for name, tensor in merged.tensors.items()}
        write_model(out, specs, _tensors(merged, opened, lru_cache(maxsize=4)(read)), files, file_bytes=file_bytes)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file: {one_line(error)}; restore the model"
        ) from error


def _spec(name: str, tensor: BaseTensor, merged: Merged, opened: dict[str, Any]) -> TensorSpec:
    file = opened.get(tensor.file)
    if file is None or name not in file.keys():  # noqa: SIM118 - not a mapping
        raise CorruptCheckpoint(f"the recipe reads {name!r} from {tensor.file}, which does not hold it")
    return TensorSpec(DTYPES[merged.dtype], tuple(file.get_slice(name).get_shape()))


def _tensors(
    merged: Merged, opened: dict[str, Any], read: Callable[[tuple[Rows, ...]], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    dtype = DTYPES[merged.dtype]
    for name, tensor in merged.tensors.items():
        if tensor.rows is not UNSET:
            yield name, read(tuple(tensor.rows)).to(dtype)
            continue
        weight = opened[tensor.file].get_tensor(name).to(DTYPES[merged.computed])
        if tensor.product is not UNSET:
            left, right = read(tuple(tensor.product.left)), read(tuple(tensor.product.right))
            weight = merge(weight, left, right, tensor.product.scale)
        yield name, weight.to(dtype)
