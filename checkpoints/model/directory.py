"""A Hugging Face model directory: written aside tensor by tensor, forced to the disk, renamed.

Example: `write_model("out", ...)` of 12 GB of weights with the default of 5 GB a file makes

    out/config.json                            from `files`, like any tokenizer
    out/model-00001-of-00003.safetensors       the first tensors, at most 5 GB
    out/model-00002-of-00003.safetensors
    out/model-00003-of-00003.safetensors
    out/model.safetensors.index.json           the file of each tensor

under the name `.out.partial-<token>`, and renames the directory to `out` at the end. Weights of
at most 5 GB are a single `model.safetensors` without an index.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from checkpoints.commit import discard, make_directory, publish, publish_over, sync, write_file
from checkpoints.errors import CheckpointError
from checkpoints.tensor_file import TensorSpec, header, memory

MODEL_FILE_BYTES = 5_000_000_000
"""Default limit on the bytes of tensors per file of a model directory."""


def write_model(
    out: Path | str,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    files: Mapping[str, bytes],
    *,
    file_bytes: int = MODEL_FILE_BYTES,
    replace: bool = False,
    stem: str = "model",
) -> None:
    """Write a model directory tensor by tensor. On return the directory survives a power cut.

    A kill or an error leaves the old directory, the new directory or none, never a part. Leftovers
    of a killed export are deleted by the next export to `out`. Of two exports to `out` at a time,
    the earlier fails.

    Args:
        out: The directory to make. Missing parents are made.
        specs: Type and shape of every tensor by name, wider types first: a tensor then starts at a
            multiple of the element size.
        tensors: Name and values of every tensor, in the order of `specs`, on any device. Only the
            current tensor is held in memory.
        files: Content of the files beside the weights, by relative path.
        file_bytes: Limit on the bytes of tensors per file. A larger tensor has a file alone.
        replace: Replace an existing `out`, whatever the content.
        stem: Beginning of the names of weight files.

    Raises:
        CheckpointError: `out` exists and `replace` is False.
        ValueError: A tensor is missing, or name, type or shape differ from `specs`.
        OSError: The disk is full or broken. An old `out` is unchanged.
    """
    out = Path(out).absolute()
    if out.exists() and not replace:
        raise CheckpointError(f"{out} exists already; export to another directory, or move it away")
    make_directory(out.parent)
    discard(_leftovers(out, "partial"))
    token = secrets.token_hex(8)
    attempt = out.with_name(f".{out.name}.partial-{token}")
    attempt.mkdir()
    try:
        _write_files(attempt, files)
        _write_weights(attempt, _split(specs, file_bytes, stem), iter(tensors), stem)
        if out.exists():
            publish_over(attempt, out, out.with_name(f".{out.name}.old-{token}"))
        else:
            publish(attempt, out)
    except BaseException:
        shutil.rmtree(attempt, ignore_errors=True)
        raise
    discard(_leftovers(out, "old"))


def _leftovers(out: Path, kind: str) -> list[Path]:
    """Return the `partial` or `old` directories left beside `out` by killed exports."""
    name = re.compile(rf"\.{re.escape(out.name)}\.{kind}-[0-9a-f]{{16}}")
    return [out.with_name(entry) for entry in os.listdir(out.parent) if name.fullmatch(entry)]


def _write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files and folders; the names in `directory` itself are not forced yet."""
    folders = {directory / parent for name in files for parent in Path(name).parents[:-1]}
    for folder in sorted(folders):  # Parents come before children.
        folder.mkdir()
    for name, content in files.items():
        write_file(directory / name, [content])
    for folder in folders:
        sync(folder)


def _split(specs: Mapping[str, TensorSpec], file_bytes: int, stem: str) -> dict[str, dict[str, TensorSpec]]:
    """Return the tensors of each file, with file names as in Hugging Face models."""
    groups: list[dict[str, TensorSpec]] = [{}]
    room = file_bytes
    for name, spec in specs.items():
        if groups[-1] and spec.nbytes > room:
            groups.append({})
            room = file_bytes
        groups[-1][name] = spec
        room -= spec.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def _write_weights(
    directory: Path,
    shards: Mapping[str, Mapping[str, TensorSpec]],
    tensors: Iterator[tuple[str, torch.Tensor]],
    stem: str,
) -> None:
    for file, specs in shards.items():
        write_file(directory / file, _file_parts(specs, tensors))
    if len(shards) > 1:
        total = sum(spec.nbytes for specs in shards.values() for spec in specs.values())
        files = {name: file for file, specs in shards.items() for name in specs}
        index = {"metadata": {"total_size": total}, "weight_map": files}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_file(directory / f"{stem}.safetensors.index.json", [text.encode()])


def _file_parts(
    specs: Mapping[str, TensorSpec], tensors: Iterator[tuple[str, torch.Tensor]]
) -> Iterator[bytes | memoryview]:
    yield header(specs)
    for expected, spec in specs.items():
        name, tensor = next(tensors, (None, torch.empty(0)))
        if name != expected or spec != (tensor.dtype, tuple(tensor.shape)):
            raise ValueError(
                f"tensor {name!r} of {tensor.dtype} {list(tensor.shape)} was given, "
                f"but {expected!r} of {spec.dtype} {list(spec.shape)} was announced; give the announced tensor"
            )
        yield memory(tensor.detach().cpu().contiguous())
