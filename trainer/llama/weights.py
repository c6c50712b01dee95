"""Load the weights of a Hugging Face directory, and map parameters to Hugging Face tensors.

Our model fuses matrices that Hugging Face stores apart. `layout` describes each of our parameters
as a list of pieces of Hugging Face tensors; reading, export and conversion of checkpoints all
follow `layout`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sftstream import UNDECODABLE, one_line
from trainer.llama.config import LlamaConfig
from trainer.llama.hf_config import StrPath
from trainer.llama.lora.nf4 import Nf4Weight, quantize, quantized
from trainer.llama.model import Llama
from trainer.llama.sharding import gather_full, local, window

INDEX = "model.safetensors.index.json"
_ROWS = 16_384
"""Rows of an embedding read at a time."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Accepted dtypes of safetensors; other dtypes hold the codes of a quantization."""


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class Piece(NamedTuple):
    """Rows `[start, start + rows)` of a Hugging Face tensor, as a part of one of our parameters."""

    tensor: str
    start: int
    rows: int


def layout(config: LlamaConfig) -> dict[str, list[Piece]]:
    """Return for each parameter the pieces of Hugging Face tensors that make up the rows, in order.

    Example: with 4 query heads, 2 key-value heads and heads of 2 channels,
    `blocks.0.attention.qkv.weight` has 16 rows, `q_proj[0:4], k_proj[0:2], v_proj[0:2],
    q_proj[4:8], k_proj[2:4], v_proj[2:4]`, which are two groups of 8 rows.
    """
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
            f"{ours}.attention.qkv.weight": _qkv_pieces(config, f"{theirs}.self_attn", "weight"),
            f"{ours}.attention.output.weight": [Piece(f"{theirs}.self_attn.o_proj.weight", 0, hidden)],
            f"{ours}.mlp_norm.weight": [Piece(f"{theirs}.post_attention_layernorm.weight", 0, hidden)],
            f"{ours}.mlp.gate_up.weight": _gate_up_pieces(config, f"{theirs}.mlp"),
            f"{ours}.mlp.down.weight": [Piece(f"{theirs}.mlp.down_proj.weight", 0, hidden)],
        }
        if config.qkv_bias:
            pieces[f"{ours}.attention.qkv.bias"] = _qkv_pieces(config, f"{theirs}.self_attn", "bias")
        if config.head_norms:
            for our_name, name in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
                pieces[f"{ours}.attention.{our_name}.weight"] = [
                    Piece(f"{theirs}.self_attn.{name}.weight", 0, config.head_size)
                ]
    return pieces


def _qkv_pieces(config: LlamaConfig, prefix: str, kind: str) -> list[Piece]:
    query_rows, head_rows = config.heads_per_group * config.head_size, config.head_size
    return [
        Piece(f"{prefix}.{name}_proj.{kind}", group * rows, rows)
        for group in range(config.num_key_value_heads)
        for name, rows in (("q", query_rows), ("k", head_rows), ("v", head_rows))
    ]


def _gate_up_pieces(config: LlamaConfig, prefix: str) -> list[Piece]:
    return [
        Piece(f"{prefix}.{name}_proj.weight", start, config.gate_block)
        for start in range(0, config.intermediate_size, config.gate_block)
        for name in ("gate", "up")
    ]


def shapes(model: Llama, pieces: Mapping[str, list[Piece]] | None = None) -> dict[str, list[int]]:
    """Return the full shape of each Hugging Face tensor of `model`, by name.

    `pieces` are those of some of the parameters; by default the `layout` of the model.
    """
    full_shapes: dict[str, list[int]] = {}
    sizes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    sizes |= {name: weight.shape for name, weight in quantized(model).items()}
    for name, parts in (layout(model.config) if pieces is None else pieces).items():
        for piece in parts:
            full_shapes.setdefault(piece.tensor, [0, *sizes[name][1:]])[0] += piece.rows
    return full_shapes


@torch.no_grad()
def load_weights(model: Llama, directory: StrPath, rows_before: int | None = None) -> None:
    """Load the safetensors of a Hugging Face directory, one file or several, into `model`.

    Each rank reads only the rows and columns that the rank holds, converted to the dtype of the
    parameters. `rows_before` is the number of tokens in `directory` if the model has more: each
    further row of the embedding and the head is the mean of the stored rows. Raises ValueError,
    before anything is loaded, if a file is missing or damaged, or if a tensor is missing,
    unexpected, quantized or has a shape that differs from `config.json`.
    """
    directory = Path(directory)
    with opened(directory) as tensors:
        stored = msgspec.structs.replace(model.config, vocab_size=rows_before or model.config.vocab_size)
        _check_tensors(model, tensors, directory, stored.vocab_size)
        parameters, in_4_bits = dict(model.named_parameters()), quantized(model)
        for name, pieces in layout(stored).items():
            if name in in_4_bits:
                _fill_quantized(in_4_bits[name], pieces, tensors, model.norm.weight.dtype)
                continue
            fill(parameters[name], pieces, tensors)
            if name in ("embedding.weight", "head.weight"):
                _fill_with_mean(parameters[name], pieces[0], tensors)


@contextmanager
def opened(directory: Path) -> Iterator[dict[str, Any]]:
    """Open the safetensors files of `directory`, and yield a mapping from tensor name to open file.

    The index decides between two files that hold a tensor. Raises ValueError if a file or the index
    is missing or damaged, or if two files hold a tensor that is not in the index.
    """
    with ExitStack() as stack:
        files = {path.name: stack.enter_context(opened_file(path)) for path in weight_files(directory)}
        yield {name: files[file] for name, file in _files_of_tensors(files, directory).items()}


def files_of_tensors(directory: Path) -> dict[str, str]:
    """Return the name of the file of each tensor of a Hugging Face directory, by tensor.

    Raises ValueError as `opened` does.
    """
    with ExitStack() as stack:
        files = {path.name: stack.enter_context(opened_file(path)) for path in weight_files(directory)}
        return _files_of_tensors(files, directory)


def _files_of_tensors(files: Mapping[str, Any], directory: Path) -> dict[str, str]:
    holders: dict[str, list[str]] = {}
    for file, handle in files.items():
        for name in handle.keys():  # noqa: SIM118 - not a mapping
            holders.setdefault(name, []).append(file)
    return _chosen(holders, _weight_map(directory), directory)


def _chosen(holders: Mapping[str, list[str]], weight_map: Mapping[str, str], directory: Path) -> dict[str, str]:
    """Return the file of each tensor: the file in the index, or else the only file."""
    for name, file in weight_map.items():
        if file not in holders.get(name, ()):
            raise ValueError(f"{directory / file} holds no {name}, but {INDEX} says so: fetch the model again")
    for name, files in holders.items():
        if name not in weight_map and len(files) > 1:
            raise ValueError(
                f"{directory}: {' and '.join(files)} both hold {name}, which is not in {INDEX}: remove one of the files, "
                "or fetch the model again"
            )
    return {name: weight_map.get(name, files[0]) for name, files in holders.items()}


def weight_files(directory: Path) -> list[Path]:
    """Return the paths of the safetensors files of a model directory, sorted by name.

    Raises ValueError if the index is damaged or names a file outside of the directory.
    """
    if not (directory / INDEX).exists():
        return [directory / "model.safetensors"]
    names = sorted(set(_weight_map(directory).values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(
            f"{directory / INDEX} names {outside[0]!r}: weight files must lie in the directory of the index"
        )
    return [directory / name for name in names]


def _weight_map(directory: Path) -> dict[str, str]:
    """Return the file of each tensor in the index, or nothing without an index."""
    index = directory / INDEX
    try:
        return msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except FileNotFoundError:
        return {}
    except UNDECODABLE as error:
        raise ValueError(f"{index}: {one_line(error)}") from error


def opened_file(path: Path) -> Any:
    """Return a safetensors file, opened; a context manager.

    Raises ValueError if it is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: download or convert the weights as safetensors")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {one_line(error)}; fetch it again") from error


def _check_tensors(model: Llama, tensors: Mapping[str, Any], directory: Path, vocabulary: int) -> None:
    expected = shapes(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in expected:
            expected[name][0] = vocabulary
    stored = {name: list(file.get_slice(name).get_shape()) for name, file in tensors.items() if _is_weight(name)}
    if model.config.tie_word_embeddings and "lm_head.weight" in stored:
        ends = [
            tensors[name].get_tensor(name) for name in ("lm_head.weight", "model.embed_tokens.weight") if name in stored
        ]
        if not torch.equal(ends[0], ends[-1]):
            raise ValueError(
                f"{directory}: tie_word_embeddings is true, but lm_head.weight differs from the embedding: "
                "set tie_word_embeddings to false in config.json"
            )
        del stored["lm_head.weight"]
    if missing := sorted(expected.keys() - stored.keys()):
        raise ValueError(
            f"{directory} has no weight {missing[0]}, which config.json implies: download the model again, or use the "
            "config.json of these weights"
        )
    for name in sorted(stored):
        if expected.get(name) != stored.get(name):
            raise ValueError(
                f"{directory}: {name} has shape {stored[name]}, but config.json implies "
                f"{expected.get(name, 'none')}: use the config.json of these weights"
            )
        if (dtype := tensors[name].get_slice(name).get_dtype()) not in FLOATS:
            raise ValueError(
                f"{directory}: {name} is stored as {dtype}: train from weights in one of {', '.join(FLOATS)}"
            )


def _is_weight(name: str) -> bool:
    return not name.endswith("rotary_emb.inv_freq")  # stored by old conversions; derived from config.json here


def fill(parameter: Tensor, pieces: Iterable[Piece], tensors: Mapping[str, Any]) -> None:
    """Read the local part of `parameter` from the pieces that overlap the local rows."""
    rows, *columns = window(parameter)
    offset = 0
    for piece in pieces:
        low, high = max(rows.start, offset), min(rows.stop, offset + piece.rows)
        if low < high:
            shift = piece.start - offset
            read = tensors[piece.tensor].get_slice(piece.tensor)[(slice(low + shift, high + shift), *columns)]
            local(parameter)[low - rows.start : high - rows.start].copy_(read)
        offset += piece.rows


def _fill_quantized(weight: Nf4Weight, pieces: list[Piece], tensors: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Quantize the tensors of the pieces, rounded to `dtype`, and keep the local codes."""
    device = weight.codes.device
    names = dict.fromkeys(piece.tensor for piece in pieces)
    whole = {name: quantize(tensors[name].get_tensor(name).to(device, dtype)) for name in names}
    rows, columns = window(weight.codes)
    kept, offset = [], 0
    for piece in pieces:
        low, high = max(rows.start, offset), min(rows.stop, offset + piece.rows)
        if low < high:
            kept.append((piece.tensor, low + piece.start - offset, low - rows.start, high - low))
        offset += piece.rows
    weight.fill(whole, kept, columns.start)


def _fill_with_mean(parameter: Tensor, stored: Piece, tensors: Mapping[str, Any]) -> None:
    """Set the local rows after the stored rows to the mean of all stored rows."""
    rows, *columns = window(parameter)
    if rows.stop <= stored.rows:
        return
    tensor = tensors[stored.tensor].get_slice(stored.tensor)
    total = torch.zeros(parameter.shape[1], dtype=torch.float64)[columns[0]]
    for low in range(0, stored.rows, _ROWS):
        total += tensor[(slice(low, min(low + _ROWS, stored.rows)), *columns)].double().sum(0)
    local(parameter)[max(0, stored.rows - rows.start) :].copy_(total / stored.rows)


def unfused(config: LlamaConfig, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the full Hugging Face tensors of a model with their names, on every rank.

    `tensors` maps our parameter names to weights or to gradients. See `unfused_pieces`.
    """
    return unfused_pieces(layout(config), tensors)


def unfused_pieces(pieces: Mapping[str, list[Piece]], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the full Hugging Face tensors made of `pieces` with their names, on every rank.

    The order is that of `shapes`. Memory holds one gathered parameter at a time. Gathering is a
    collective, so every rank must iterate to the end.
    """
    for name, parts in pieces.items():
        full = gather_full(tensors[name])
        by_tensor: dict[str, list[Tensor]] = {}
        for piece, rows in zip(parts, full.split_with_sizes([piece.rows for piece in parts]), strict=True):
            by_tensor.setdefault(piece.tensor, []).append(rows)
        for theirs, rows_of_it in by_tensor.items():
            yield theirs, torch.cat(rows_of_it)
