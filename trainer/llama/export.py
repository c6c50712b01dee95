"""A model as a Hugging Face directory: weights tensor by tensor, configs, tokenizer."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints import MODEL_FILE_BYTES, TensorSpec, merge, write_model
from sftstream import UNDECODABLE, SavedTokenizer, one_line
from trainer.llama.config import LlamaConfig
from trainer.llama.hf_config import StrPath, write_config
from trainer.llama.lora.files import CONFIG, PREFIX, STEM, trained_layout, write_adapter_config
from trainer.llama.lora.layers import A, B, LoraConfig
from trainer.llama.model import Llama
from trainer.llama.weights import opened, shapes, unfused, unfused_pieces


@torch.no_grad()
def export(
    model: Llama,
    config: LlamaConfig,
    out_dir: StrPath,
    tokenizer: SavedTokenizer | None = None,
    *,
    stop_token_ids: Iterable[int] = (),
    init_from: StrPath | None = None,
    dtype: torch.dtype | None = None,
    file_bytes: int = MODEL_FILE_BYTES,
) -> None:
    """Write a model directory for `transformers`; every rank calls, rank 0 writes.

    Adapters are added to the weights in the files of `init_from`, since frozen weights may be
    quantized here.

    Tensors are gathered, converted and written one at a time. The directory is made aside and then
    replaces `out_dir`: a kill leaves the old export, the new export or none, never a part.

    Args:
        model: The model, possibly sharded over ranks.
        config: The shape of the model, for `config.json`.
        out_dir: The directory to make, or an older export to replace.
        tokenizer: Files to write beside the weights, with ids for the configs.
        stop_token_ids: Further tokens that end a generation, besides the end token of the
            tokenizer.
        init_from: Directory of the starting weights. The generation settings are kept.
        dtype: Type of the stored weights; by default the type of the parameters.
        file_bytes: Limit on the bytes of weights per file. A larger tensor has a file alone.

    Raises:
        ValueError: `out_dir` holds a file that no export writes, or the settings in `init_from` are
            broken.
    """
    dtype = dtype or model.norm.weight.dtype
    parameters = dict(model.named_parameters())
    if model.lora is None:
        tensors = unfused(config, parameters)
    else:
        trained = dict(unfused_pieces(trained_layout(config, model.lora), parameters))
        assert init_from is not None
        tensors = _merged(model, Path(init_from), trained) if _writes() else iter(())
    if _writes():
        require_replaceable(out_dir := Path(out_dir))
        specs = {name: TensorSpec(dtype, tuple(shape)) for name, shape in shapes(model).items()}
        files = config_files(config, dtype, tokenizer, stop_token_ids, init_from)
        typed = ((name, tensor.to(dtype)) for name, tensor in tensors)
        write_model(out_dir, specs, typed, files, file_bytes=file_bytes, replace=True)
    else:
        for _ in tensors:
            pass  # Takes part in the gathering.
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def export_adapter(model: Llama, out_dir: StrPath, base: str, tokenizer: SavedTokenizer | None = None) -> None:
    """Write the trained weights of a model with `lora` as a PEFT adapter; every rank calls.

    `base` is the name of the base model for `adapter_config.json`, a directory or a hub name. The
    other arguments, and the way of writing, are those of `export`.

    Raises ValueError if `out_dir` holds a file that no export writes.
    """
    assert model.lora is not None
    pieces = trained_layout(model.config, model.lora)
    tensors = unfused_pieces(pieces, dict(model.named_parameters()))
    if _writes():
        require_replaceable(out_dir := Path(out_dir))
        specs = {f"{PREFIX}{name}": TensorSpec(torch.float32, tuple(s)) for name, s in shapes(model, pieces).items()}
        files = adapter_files(model.lora, base, tokenizer)
        named = ((f"{PREFIX}{name}", tensor) for name, tensor in tensors)
        write_model(out_dir, specs, named, files, file_bytes=sys.maxsize, replace=True, stem=STEM)
    else:
        for _ in tensors:
            pass  # Takes part in the gathering.
    if dist.is_initialized():
        dist.barrier()


def _writes() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _merged(model: Llama, base: Path, trained: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the files in `base`, with adapters added, or the trained tensors."""
    assert model.lora is not None
    with opened(base) as files:
        for name in shapes(model):
            stem = name.removesuffix(".weight")
            left, right = trained.get(f"{stem}.{B}.weight"), trained.get(f"{stem}.{A}.weight")
            weight = trained[name] if name in trained else files[name].get_tensor(name).to(model.norm.weight.dtype)
            if left is not None and right is not None:
                weight = merge(weight, left, right, model.lora.scale)
            yield name, weight


_EXPORTED = re.compile(
    r"(adapter_|generation_)?config\.json|(adapter_)?model.*\.safetensors(\.index\.json)?|chat_template\.(jinja|json)|"
    r"additional_chat_templates|(special_tokens_map|added_tokens|tokenizer_config|tokenizer|vocab)\.json|"
    r"(merges|vocab)\.txt|.*\.model|\..*"
)
"""Names of the files and directories that an export may hold, and of hidden files."""


def require_replaceable(out_dir: Path) -> None:
    """Raise ValueError if a directory holds a file that no export writes: a new one replaces it."""
    others = sorted(path.name for path in out_dir.iterdir()) if out_dir.exists() else []
    if others := [name for name in others if not _EXPORTED.fullmatch(name)]:
        raise ValueError(f"{out_dir} holds {others[0]!r}, which an export would delete: move it to another directory")


def adapter_files(lora: LoraConfig, base: str, tokenizer: SavedTokenizer | None) -> dict[str, bytes]:
    """Return the files of an adapter's directory besides the weights, by relative path."""
    files = tokenizer.files if tokenizer else {}
    return dict(sorted((files | {CONFIG: write_adapter_config(lora, base)}).items()))


def config_files(
    config: LlamaConfig,
    dtype: torch.dtype,
    tokenizer: SavedTokenizer | None,
    stop_token_ids: Iterable[int],
    init_from: StrPath | None,
) -> dict[str, bytes]:
    """Return the files of a model directory besides the weights, by relative path.

    Raises ValueError if `generation_config.json` in `init_from` is broken.
    """
    generation = _generation(init_from, tokenizer, stop_token_ids)
    ids = {key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    configs = {"config.json": write_config(config, dtype) | ids, "generation_config.json": generation}
    files = (tokenizer.files if tokenizer else {}) | {name: _json(keys) for name, keys in configs.items()}
    return dict(sorted(files.items()))


def _generation(
    init_from: StrPath | None, tokenizer: SavedTokenizer | None, stop_token_ids: Iterable[int]
) -> dict[str, Any]:
    """Return the keys of `generation_config.json`.

    The settings of `init_from` are kept, the tokenizer's ids replace the old ids, and
    `eos_token_id` lists the tokenizer's end token, `stop_token_ids` and the old ids, each once.
    """
    settings = {} if init_from is None else _read_generation(Path(init_from) / "generation_config.json")
    old = settings.get("eos_token_id")
    new = [tokenizer.eos_token_id] if tokenizer else []
    ends = [*new, *stop_token_ids, *(old if isinstance(old, list) else [old])]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    # Written even if there are none: transformers would assume tokens 1 and 2.
    return settings | {
        "bos_token_id": tokenizer.bos_token_id if tokenizer else settings.get("bos_token_id"),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": tokenizer.pad_token_id if tokenizer else settings.get("pad_token_id"),
    }


def _read_generation(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        keys = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        msgspec.convert(keys.get("eos_token_id"), int | list[int] | None)
    except UNDECODABLE as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    return keys


def _json(keys: Mapping[str, Any]) -> bytes:
    return (json.dumps(keys, indent=2, sort_keys=True) + "\n").encode()
