"""Hugging Face model directories, read into a model that may be sharded and written from one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from trainer.model import Llama, LlamaConfig, local, window

StrPath = str | os.PathLike[str]

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What a key means where config.json leaves it out: transformers' own defaults for this architecture, not ours.
_DEFAULTS = {
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}
_DEFAULT_ROPE_THETA = 10000.0
_ONLY_SUPPORTED = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class Tokenizer(Protocol):
    """What an export asks of a tokenizer, in transformers' words."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    def save_pretrained(self, save_directory: StrPath) -> Any:
        """Write the tokenizer's files into a directory."""


class Piece(NamedTuple):
    """Rows `[start, start + rows)` of a Hugging Face tensor, at their place in one of our parameters."""

    tensor: str
    start: int
    rows: int


def read_config(directory: StrPath) -> LlamaConfig:
    """The shape that `config.json` describes. ValueError names the file, and the key in it that we do not support."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a Hugging Face model: it has no config.json")
    try:
        return _config(path, msgspec.json.decode(path.read_bytes(), type=dict[str, Any]))
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path}: {error}") from error


def _config(path: Path, keys: dict[str, Any]) -> LlamaConfig:
    for key, supported in _ONLY_SUPPORTED.items():
        found = keys.get(key, supported)
        if found is not None and found != supported:
            raise ValueError(f"{path}: {key} is {found!r}, of which only {supported!r} is supported")
    missing = [key for key in _SIZES if key not in keys]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} must be given")
    rope = {**(keys.get("rope_scaling") or {}), **(keys.get("rope_parameters") or {})}
    fields = {key: keys[key] for key in _SIZES} | {key: keys.get(key, default) for key, default in _DEFAULTS.items()}
    fields["num_key_value_heads"] = keys.get("num_key_value_heads") or keys["num_attention_heads"]
    fields["rope_theta"] = rope.pop("rope_theta", keys.get("rope_theta", _DEFAULT_ROPE_THETA))
    fields["rope_scaling"] = _rope_scaling(rope, fields["max_position_embeddings"])
    return msgspec.convert(fields, LlamaConfig)


def _rope_scaling(rope: dict[str, Any], context: int) -> dict[str, Any] | None:
    kind = rope.pop("type", "default")  # the older name of the key
    kind = rope.pop("rope_type", kind)
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", context)
    return None if kind == "default" and not rope else {"rope_type": kind, **rope}


def write_config(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` of a model, in the spelling that older versions of transformers read as well."""
    keys: dict[str, Any] = msgspec.to_builtins(config)
    return {
        **keys,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def layout(config: LlamaConfig) -> dict[str, list[Piece]]:
    """For each of our parameters the pieces of Hugging Face tensors that its rows are made of, in order."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    pieces = {
        "embedding.weight": [Piece("model.embed_tokens.weight", 0, vocabulary)],
        "norm.weight": [Piece("model.norm.weight", 0, hidden)],
    }
    if not config.tie_word_embeddings:
        pieces["head.weight"] = [Piece("lm_head.weight", 0, vocabulary)]
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        pieces |= {
            f"{ours}.attention_norm.weight": [Piece(f"{theirs}.input_layernorm.weight", 0, hidden)],
            f"{ours}.attention.qkv.weight": _qkv_pieces(config, f"{theirs}.self_attn"),
            f"{ours}.attention.output.weight": [Piece(f"{theirs}.self_attn.o_proj.weight", 0, hidden)],
            f"{ours}.mlp_norm.weight": [Piece(f"{theirs}.post_attention_layernorm.weight", 0, hidden)],
            f"{ours}.mlp.gate_up.weight": _gate_up_pieces(config, f"{theirs}.mlp"),
            f"{ours}.mlp.down.weight": [Piece(f"{theirs}.mlp.down_proj.weight", 0, hidden)],
        }
    return pieces


def _qkv_pieces(config: LlamaConfig, prefix: str) -> list[Piece]:
    queries, one = config.heads_per_group * config.head_size, config.head_size
    return [
        Piece(f"{prefix}.{name}_proj.weight", group * rows, rows)
        for group in range(config.num_key_value_heads)
        for name, rows in (("q", queries), ("k", one), ("v", one))
    ]


def _gate_up_pieces(config: LlamaConfig, prefix: str) -> list[Piece]:
    return [
        Piece(f"{prefix}.{name}_proj.weight", start, config.gate_block)
        for start in range(0, config.intermediate_size, config.gate_block)
        for name in ("gate", "up")
    ]


def _shapes(model: Llama) -> dict[str, list[int]]:
    """The Hugging Face tensors of a model and their full shapes, in the order an export writes them."""
    shapes: dict[str, list[int]] = {}
    parameters = dict(model.named_parameters())
    for name, pieces in layout(model.config).items():
        for piece in pieces:
            shapes.setdefault(piece.tensor, [0, *parameters[name].shape[1:]])[0] += piece.rows
    return shapes


@torch.no_grad()
def load_weights(model: Llama, directory: StrPath) -> None:
    """Fill the model from the safetensors of a Hugging Face directory, one file or many.

    Each rank reads only what it holds. Values are converted to the parameters' dtype. ValueError names a file that is
    missing or damaged, or a tensor that is missing, unexpected or of another shape; nothing is loaded then.
    """
    directory = Path(directory)
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(path)) for path in _weight_files(directory)]
        tensors = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a mapping
        _check_tensors(model, tensors, directory)
        parameters = dict(model.named_parameters())
        for name, pieces in layout(model.config).items():
            _fill(parameters[name], pieces, tensors)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return [directory / "model.safetensors"]
    return [directory / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is missing: weights are read from safetensors files only")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def _check_tensors(model: Llama, tensors: Mapping[str, Any], directory: Path) -> None:
    expected = _shapes(model)
    found = {name: list(file.get_slice(name).get_shape()) for name, file in tensors.items() if _is_weight(name)}
    if model.config.tie_word_embeddings and "lm_head.weight" in found:
        ends = [tensors[name].get_tensor(name) for name in ("lm_head.weight", "model.embed_tokens.weight")]
        if not torch.equal(*ends):
            raise ValueError(f"{directory}: tie_word_embeddings is true, but lm_head.weight is not the embedding")
        del found["lm_head.weight"]
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{directory}: {name} has shape {found.get(name, 'none')}, where config.json asks for "
                f"{expected.get(name, 'none')}"
            )


def _is_weight(name: str) -> bool:
    return not name.endswith("rotary_emb.inv_freq")  # old conversions store what config.json says already


def _fill(parameter: Tensor, pieces: Iterable[Piece], tensors: Mapping[str, Any]) -> None:
    rows, *columns = window(parameter)
    offset = 0
    for piece in pieces:
        low, high = max(rows.start, offset), min(rows.stop, offset + piece.rows)
        if low < high:
            shift = piece.start - offset
            read = tensors[piece.tensor].get_slice(piece.tensor)[(slice(low + shift, high + shift), *columns)]
            local(parameter)[low - rows.start : high - rows.start].copy_(read)
        offset += piece.rows


@torch.no_grad()
def export(
    model: Llama,
    config: LlamaConfig,
    out_dir: StrPath,
    tokenizer: Tokenizer | None = None,
    *,
    stop_token_ids: Iterable[int] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Write a directory that `transformers` loads; every rank calls, rank 0 writes.

    `stop_token_ids` end a generation besides the tokenizer's own end. `dtype` is what the weights are stored in, the
    parameters' own by default. Tensors are gathered and written one at a time. The directory is made aside and replaces
    `out_dir` whole: a kill leaves the old export, the new one or none, never a part of one. ValueError where `out_dir`
    is there and holds no model.
    """
    out_dir = Path(out_dir)
    writes = not dist.is_initialized() or dist.get_rank() == 0
    aside = out_dir.with_name(f".{out_dir.name}.partial")
    dtype = dtype or model.norm.weight.dtype
    if writes:
        _check_replaceable(out_dir)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        describe(aside, config, dtype, tokenizer, stop_token_ids)
        _write_tensors(aside / "model.safetensors", _shapes(model), _unfused(model, dtype), dtype)
        _replace(out_dir, aside)
    else:
        for _ in _unfused(model, dtype):
            pass  # takes part in the gathering
    if dist.is_initialized():
        dist.barrier()


def _check_replaceable(out_dir: Path) -> None:
    if out_dir.exists() and not (out_dir / "config.json").exists() and any(out_dir.iterdir()):
        raise ValueError(f"{out_dir} holds other files than a model's: export to another directory")


def describe(
    directory: Path, config: LlamaConfig, dtype: torch.dtype, tokenizer: Tokenizer | None, stop_token_ids: Iterable[int]
) -> None:
    """Write all that a model's directory holds besides the weights."""
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    ids = _special_ids(tokenizer, stop_token_ids)
    _write_json(directory / "config.json", write_config(config, dtype) | ids)
    _write_json(directory / "generation_config.json", ids)


def _special_ids(tokenizer: Tokenizer | None, stop_token_ids: Iterable[int]) -> dict[str, int | list[int] | None]:
    # Written even where there are none: transformers would take tokens 1 and 2 for them.
    own = None if tokenizer is None else tokenizer.eos_token_id
    ends = list(dict.fromkeys([*([] if own is None else [own]), *stop_token_ids]))
    return {
        "bos_token_id": tokenizer.bos_token_id if tokenizer else None,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": tokenizer.pad_token_id if tokenizer else None,
    }


def _write_json(path: Path, keys: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n")


def _unfused(model: Llama, dtype: torch.dtype) -> Iterator[Tensor]:
    """The Hugging Face tensors in the order of `_shapes`, in full on each rank, one parameter of ours at a time."""
    parameters = dict(model.named_parameters())
    for name, pieces in layout(model.config).items():
        full = _gathered(parameters[name])
        by_tensor: dict[str, list[Tensor]] = {}
        for piece, rows in zip(pieces, full.split_with_sizes([piece.rows for piece in pieces]), strict=True):
            by_tensor.setdefault(piece.tensor, []).append(rows)
        for parts in by_tensor.values():
            yield torch.cat(parts).to(dtype)


def _gathered(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    placements = list(parameter.placements)
    for dim in range(len(placements)):
        # Data parallelism, the first dimension, cut what tensor parallelism had cut before, and so is undone first.
        placements[dim] = Replicate()
        parameter = parameter.redistribute(placements=placements)
    return parameter.to_local()


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
