"""`config.json` of a Hugging Face model, read into a shape and written from one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import CONFIG_MAPPING

from trainer.llama.config import LlamaConfig

StrPath = str | os.PathLike[str]

_ROPE_FIELDS = {"rope_theta", "rope_scaling"}
_READ = tuple(name for name in LlamaConfig.__struct_fields__ if name not in _ROPE_FIELDS)
"""Keys of `config.json` with the name and meaning of a field of LlamaConfig."""
_REQUIRED = tuple(
    field.name
    for field in msgspec.structs.fields(LlamaConfig)
    if field.required and field.name != "num_key_value_heads"  # transformers has a default for it: one per query head
)
_ONLY_SUPPORTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "quantization_config": None,
}
# Older spellings, which transformers reads, and what others write that no number depends on.
_ALSO_KNOWN = {
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "torch_dtype",
    "max_sequence_length",
    "is_llama_config",
    "unsloth_version",
}
_MODEL_TYPES = get_args(get_type_hints(LlamaConfig)["model_type"])


def find_model(name: str) -> Path:
    """The directory of a model: `name` itself, or what the hub has under this name, fetched once on a machine.

    Ranks may call at the same time: they wait for the one that fetches. ValueError where it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    files = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (OSError, HFValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"model {name!r} is no directory here, and the hub does not give it: {reason}") from error


def read_config(directory: StrPath) -> LlamaConfig:
    """The shape that `config.json` describes, in the layout of transformers 4 or 5; what it leaves out means what it means
    to transformers.

    ValueError names the file, and the key in it that is missing, unknown or not supported.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a Hugging Face model: it has no config.json")
    try:
        return _config(msgspec.json.decode(path.read_bytes(), type=dict[str, Any]))
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{path}: {error}") from error
    except KeyError as error:
        # Of transformers, where rope settings lack some.
        raise ValueError(f"{path}: {error.args[0]}") from error


def _config(keys: dict[str, Any]) -> LlamaConfig:
    kind: Any = keys.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ValueError(f"model_type is {kind!r}, of which only {', '.join(_MODEL_TYPES)} are supported")
    public = CONFIG_MAPPING[kind]
    _require_known(keys, public().to_dict().keys() | _ALSO_KNOWN | _ONLY_SUPPORTED.keys())
    # transformers' own reading: it knows both layouts and each architecture's defaults. The weights' type is for their files.
    typeless = {key: value for key, value in keys.items() if key not in ("dtype", "torch_dtype")}
    read = keys | public.from_dict(typeless).to_dict()
    _require_supported(read, architectures=[_architecture(kind)])
    fields = {key: read.get(key) for key in _READ}
    return msgspec.convert(fields | _rope(read["rope_parameters"]), LlamaConfig)


def _require_known(keys: dict[str, Any], known: set[str]) -> None:
    missing = [key for key in _REQUIRED if key not in keys]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given")
    unknown = [key for key in keys if key not in known and not key.startswith("_")]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: not known of a {keys['model_type']}; remove it if no number of the model depends on it"
        )


def _require_supported(read: dict[str, Any], architectures: list[str]) -> None:
    for key, supported in (_ONLY_SUPPORTED | {"architectures": architectures}).items():
        found = read.get(key)
        if found is not None and found != supported:
            raise ValueError(f"{key} is {found!r}, of which only {supported!r} is supported{_REMEDIES.get(key, '')}")
    if set(read.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"layer_types is {read['layer_types']!r}, of which only full_attention is supported")


_REMEDIES = {
    "sliding_window": "; set it to null if no conversation is longer: within the window it changes nothing",
    "quantization_config": "; train from the weights that were quantized",
}


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Our `rope_theta` and `rope_scaling`."""
    settings = {key: value for key, value in parameters.items() if key != "type"}  # the older name of rope_type
    theta, kind = settings.pop("rope_theta"), settings.pop("rope_type")
    if settings.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor must be 1: part of a head is never left unturned")
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type is {kind!r}, of which only default, linear, llama3 are supported")
    if kind == "default" and settings:
        raise ValueError(
            f"{', '.join(settings)}: not known of rope_type 'default'; name the rope_type that has it, or remove it"
        )
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else {"rope_type": kind, **settings}}


def write_config(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` of a model, in the spelling that older versions of transformers read as well."""
    keys: dict[str, Any] = msgspec.to_builtins(config)
    return {
        **keys,
        **_SAID_BY[config.model_type],
        "architectures": [_architecture(config.model_type)],
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


# What a reader might else take for granted.
_SAID_BY: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False, "attention_bias": False},
}


def _architecture(model_type: str) -> str:
    return f"{model_type.capitalize()}ForCausalLM"
