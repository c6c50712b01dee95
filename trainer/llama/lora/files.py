"""A PEFT adapter's tensors and `adapter_config.json`, in and out.

`peft` stores `adapter_model.safetensors` with the tensors of `trained_layout`, each under its
Hugging Face name after `base_model.model.`, and `adapter_config.json` with rank, scale, layers and
the name of the base model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from sftstream import UNDECODABLE, one_line
from trainer.llama.config import LlamaConfig
from trainer.llama.hf_config import StrPath
from trainer.llama.lora.layers import TARGETS, A, B, LoraConfig
from trainer.llama.model import Llama
from trainer.llama.weights import FLOATS, Piece, fill, layout, opened_file, shapes

CONFIG, STEM = "adapter_config.json", "adapter_model"
WEIGHTS = f"{STEM}.safetensors"
PREFIX = "base_model.model."
"""Beginning of the tensors' names in `adapter_model.safetensors`."""

_SAVED = {"embed_tokens": "embedding.weight", "lm_head": "head.weight"}
"""Our parameters by their name in `modules_to_save`."""


class AdapterSource(NamedTuple):
    """A stored adapter: its settings and its base model."""

    lora: LoraConfig
    base: str
    """Directory or hub name of the base model, as stored."""


def adapter_layout(config: LlamaConfig, lora: LoraConfig) -> dict[str, list[Piece]]:
    """Return for each adapter parameter the pieces of peft's tensors that make up the rows.

    The order of rows is that of `layout`. Example: the fused `lora_A` of queries and values with
    rank 2 has the rows `q_proj.lora_A[0:2], v_proj.lora_A[0:2]`.
    """
    pieces: dict[str, list[Piece]] = {}
    for name, fused in layout(config).items():
        adapted = [piece for piece in fused if piece.tensor.split(".")[-2] in lora.adapted]
        if adapted and name.endswith(".weight"):
            module = name.removesuffix(".weight")
            theirs = dict.fromkeys(piece.tensor.removesuffix(".weight") for piece in adapted)
            pieces[f"{module}.{A}"] = [Piece(f"{tensor}.{A}.weight", 0, lora.rank) for tensor in theirs]
            pieces[f"{module}.{B}"] = [
                piece._replace(tensor=f"{piece.tensor.removesuffix('.weight')}.{B}.weight") for piece in adapted
            ]
    return pieces


def trained_layout(config: LlamaConfig, lora: LoraConfig | None) -> dict[str, list[Piece]]:
    """Return the pieces of every trained parameter by name: of all parameters without `lora`."""
    pieces = layout(config)
    if lora is None:
        return pieces
    saved = {_SAVED[name]: pieces[_SAVED[name]] for name in sorted(lora.modules_to_save)}
    return adapter_layout(config, lora) | saved


@torch.no_grad()
def load_adapters(model: Llama, directory: StrPath) -> None:
    """Load the tensors of a PEFT adapter into `model`, each rank its own part.

    Raises ValueError, before anything is loaded, if the file is missing or damaged, or if a tensor
    is missing, unexpected or of another shape.
    """
    assert model.lora is not None
    path = Path(directory) / WEIGHTS
    parameters = dict(model.named_parameters())
    pieces = trained_layout(model.config, model.lora)
    with opened_file(path) as file:
        stored = {name.removeprefix(PREFIX): list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        expected = shapes(model, pieces)
        for name in sorted(expected.keys() | stored.keys()):
            if expected.get(name) != stored.get(name):
                raise ValueError(
                    f"{path}: {PREFIX}{name} has shape {stored.get(name, 'none')}, but the adapter's config and the base "
                    f"model imply {expected.get(name, 'none')}: use the {CONFIG} and the base model of these weights"
                )
            if (dtype := file.get_slice(PREFIX + name).get_dtype()) not in FLOATS:
                raise ValueError(f"{path}: {PREFIX}{name} is stored as {dtype}: use one of {', '.join(FLOATS)}")
        for name, parts in pieces.items():
            named = [part._replace(tensor=PREFIX + part.tensor) for part in parts]
            fill(parameters[name], named, {part.tensor: file for part in named})


def write_adapter_config(lora: LoraConfig, base: str) -> bytes:
    """Return `adapter_config.json` for adapters on the model `base`."""
    whole = lora.alpha.is_integer()
    keys = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if whole else lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rank_stabilized,
        "target_modules": list(lora.adapted),
        "modules_to_save": sorted(lora.modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    return (json.dumps(keys, indent=2, sort_keys=True) + "\n").encode()


_IRRELEVANT = {
    *("auto_mapping", "inference_mode", "peft_version", "revision", "task_type", "lora_dropout"),
    *("runtime_config", "ephemeral_gpu_offload", "peft_type", "base_model_name_or_path", "r", "lora_alpha"),
    *("use_rslora", "target_modules", "modules_to_save", "megatron_core", "qalora_group_size", "layers_pattern"),
}
"""Keys of `adapter_config.json` that are read here or do not change the numbers of an adapter."""

_INITIAL = (True, False, None, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that leave the base model as it is."""

_EMPTY: tuple[Any, ...] = (None, False, "none", [], {})
"""Values of the other keys for an adapter without the feature."""


class _Keys(msgspec.Struct):
    """The keys of `adapter_config.json` that describe a LoRA."""

    peft_type: str
    base_model_name_or_path: str
    target_modules: list[str] | str
    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    modules_to_save: list[str] | None = None


def is_adapter(directory: StrPath) -> bool:
    """Return True if a directory holds an adapter in place of a model."""
    return (Path(directory) / CONFIG).is_file()


def read_adapter_config(directory: StrPath) -> AdapterSource:
    """Read `adapter_config.json`.

    Raises ValueError, naming the file and the key, if it describes another method than LoRA, a
    feature that the trainer does not have, or layers that are not known.
    """
    path = Path(directory) / CONFIG
    try:
        keys: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        read = msgspec.convert(keys, _Keys)
        if read.peft_type != "LORA":
            raise ValueError(f"peft_type is {read.peft_type!r}, but only 'LORA' is supported: train a LoRA adapter")
        if used := [key for key, value in keys.items() if _changes_the_numbers(key, value)]:
            raise ValueError(
                f"{used[0]} is {keys[used[0]]!r}, which is not supported: merge the adapter with peft's "
                "merge_and_unload, and start from the merged model"
            )
        lora = msgspec.convert(
            {
                "rank": read.r,
                "alpha": read.lora_alpha,
                "rank_stabilized": read.use_rslora,
                "targets": _targets(read.target_modules),
                "modules_to_save": sorted(set(read.modules_to_save or ())),
            },
            LoraConfig,
        )
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; restore the adapter") from error
    except (*UNDECODABLE, ValueError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    return AdapterSource(lora, read.base_model_name_or_path)


def _changes_the_numbers(key: str, value: Any) -> bool:
    if key == "init_lora_weights":
        return value not in _INITIAL
    return key not in _IRRELEVANT and value not in _EMPTY


def _targets(stored: list[str] | str) -> Any:
    """Return the targets as in `[lora]`; all seven layers are "all-linear".

    peft may list the layers of each block, such as "model.layers.0.self_attn.q_proj". If blocks are
    left out, their tensors are missing, which `load_adapters` refuses.
    """
    if isinstance(stored, str):
        return stored
    named = {name.rpartition(".")[2] for name in stored}
    return "all-linear" if named == set(TARGETS) else sorted(named)
