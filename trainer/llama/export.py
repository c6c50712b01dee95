"""A model written as a Hugging Face directory, one tensor at a time, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.llama.config import LlamaConfig
from trainer.llama.hf_config import StrPath, write_config
from trainer.llama.model import Llama
from trainer.llama.weights import INDEX, shapes, unfused

FILE_BYTES = 5_000_000_000
"""Weights beyond this go into several files: what can be fetched side by side, and read by a rank that needs a part."""

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class Tokenizer(Protocol):
    """What an export asks of a tokenizer, in transformers' words."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    def save_pretrained(self, save_directory: StrPath) -> Any:
        """Write the tokenizer's files into a directory."""


@torch.no_grad()
def export(
    model: Llama,
    config: LlamaConfig,
    out_dir: StrPath,
    tokenizer: Tokenizer | None = None,
    *,
    stop_token_ids: Iterable[int] = (),
    init_from: StrPath | None = None,
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write a directory that `transformers` loads; every rank calls, rank 0 writes.

    `stop_token_ids` end a generation besides the tokenizer's own end. `init_from` is the directory that the model started
    from: how it is meant to generate is carried along. `dtype` is what the weights are stored in, the parameters' own by
    default; beyond `file_bytes` they go into several files with an index. Tensors are gathered and written one at a time.
    The directory is made aside and replaces `out_dir` whole: a kill leaves the old export, the new one or none, never a
    part of one. ValueError where `out_dir` is there and holds no model.
    """
    out_dir = Path(out_dir)
    aside = out_dir.with_name(f".{out_dir.name}.partial")
    dtype = dtype or model.norm.weight.dtype
    tensors = (tensor.to(dtype) for _, tensor in unfused(config, dict(model.named_parameters())))
    if not dist.is_initialized() or dist.get_rank() == 0:
        require_replaceable(out_dir)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        describe(aside, config, dtype, tokenizer, stop_token_ids, init_from)
        _write_files(aside, _files(shapes(model), dtype, file_bytes), tensors, dtype)
        _replace(out_dir, aside)
    else:
        for _ in tensors:
            pass  # takes part in the gathering
    if dist.is_initialized():
        dist.barrier()


def require_replaceable(out_dir: Path) -> None:
    """ValueError where an export would replace what is none."""
    if out_dir.exists() and not (out_dir / "config.json").exists() and any(out_dir.iterdir()):
        raise ValueError(f"{out_dir} holds other files than a model's: move them, or export to another directory")


def describe(
    directory: Path,
    config: LlamaConfig,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    stop_token_ids: Iterable[int],
    init_from: StrPath | None,
) -> None:
    """Write all that a model's directory holds besides the weights."""
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    generation = _generation(init_from, tokenizer, stop_token_ids)
    ids = {key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(directory / "config.json", write_config(config, dtype) | ids)
    _write_json(directory / "generation_config.json", generation)


def _generation(
    init_from: StrPath | None, tokenizer: Tokenizer | None, stop_token_ids: Iterable[int]
) -> dict[str, Any]:
    """`generation_config.json`: that of `init_from`, with the tokenizer's ids, and every stop token of either."""
    carried = {} if init_from is None else _read_generation(Path(init_from) / "generation_config.json")
    before = carried.get("eos_token_id")
    own = [tokenizer.eos_token_id] if tokenizer else []
    ends = [*own, *stop_token_ids, *(before if isinstance(before, list) else [before])]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    # Written even where there are none: transformers would take tokens 1 and 2 for them.
    return carried | {
        "bos_token_id": tokenizer.bos_token_id if tokenizer else carried.get("bos_token_id"),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": tokenizer.pad_token_id if tokenizer else carried.get("pad_token_id"),
    }


def _read_generation(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        keys = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        msgspec.convert(keys.get("eos_token_id"), int | list[int] | None)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path}: {error}") from error
    return keys


def _write_json(path: Path, keys: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n")


def _files(tensors: Mapping[str, list[int]], dtype: torch.dtype, file_bytes: int) -> list[dict[str, list[int]]]:
    """The shapes of each file's tensors, in order; a file holds at least one tensor and else at most `file_bytes`."""
    files: list[dict[str, list[int]]] = []
    room = 0
    for name, shape in tensors.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if size > room:
            files.append({})
            room = max(file_bytes, size)
        files[-1][name] = shape
        room -= size
    return files


def _write_files(
    directory: Path, files: list[dict[str, list[int]]], tensors: Iterator[Tensor], dtype: torch.dtype
) -> None:
    count = len(files)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    names = names if count > 1 else ["model.safetensors"]
    for name, file in zip(names, files, strict=True):
        _write_tensors(directory / name, file, islice(tensors, len(file)), dtype)
    if count > 1:
        elements = sum(torch.Size(shape).numel() for file in files for shape in file.values())
        places = {tensor: name for name, file in zip(names, files, strict=True) for tensor in file}
        _write_json(directory / INDEX, {"metadata": {"total_size": elements * dtype.itemsize}, "weight_map": places})


def _write_tensors(path: Path, shapes: Mapping[str, list[int]], tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
    """The safetensors format (github.com/huggingface/safetensors), streamed: its own writer needs all tensors at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            file.write(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _replace(out_dir: Path, aside: Path) -> None:
    old = out_dir.with_name(f".{out_dir.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    aside.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)
