"""Convert `config.json` of a Hugging Face model to a LlamaConfig, and back."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError

from sftstream import keep, kept, one_line, require_files
from trainer.llama.config import LlamaConfig

StrPath = str | os.PathLike[str]

_ROPE_FIELDS = {"rope_theta", "rope_scaling"}
_FIELD_KEYS = tuple(name for name in LlamaConfig.__struct_fields__ if name not in _ROPE_FIELDS)
"""Keys of `config.json` with the name and meaning of a field of LlamaConfig."""
_REQUIRED = tuple(
    field.name
    for field in msgspec.structs.fields(LlamaConfig)
    if field.required and field.name != "num_key_value_heads"  # every architecture has a default
)
"""Required keys of `config.json`: transformers' defaults would describe a different model."""
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
"""Keys with a single supported value, because the model computes nothing else."""
# Older spellings that transformers reads, and keys of other libraries without effect on the model.
_ALSO_ACCEPTED = {
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "torch_dtype",
    "max_sequence_length",
    "is_llama_config",
    "unsloth_version",
}
_CODE = Path(__file__).read_bytes()
"""The code that decides what is read from a `config.json`."""
_MODEL_TYPES = get_args(get_type_hints(LlamaConfig)["model_type"])


def find_model(name: str) -> Path:
    """Return the directory of a model or a PEFT adapter, downloaded if necessary.

    `name` is a local directory or a name on the Hugging Face hub. The hub's cache keeps the
    download for later calls on this machine. Ranks may call at the same time: one rank downloads,
    the rest wait.

    Raises ValueError if `name` is neither a directory nor on the hub, or if something
    else than a file, such as a pipe, is in the place of a file of the model.
    """
    if Path(name).is_dir():
        require_files(path for path in Path(name).iterdir() if path.suffix in (".json", ".safetensors"))
        return Path(name)
    files = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
    files += ["adapter_config.json", "adapter_model.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (OSError, HFValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"model {name!r} is neither a local directory nor available from the Hugging Face hub: {reason}; "
            "check the name, or download the model"
        ) from error


def read_config(directory: StrPath) -> LlamaConfig:
    """Read `config.json`, written by transformers 4 or 5; a missing key gets transformers' default.

    The result is kept in the cache: a start from the cache does not import transformers, which
    takes 1 to 3 s. Raises ValueError, naming the file and the key, if a size is missing, or if a
    key is unknown or has an unsupported value.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{directory} is not a Hugging Face model: it has no config.json; name the directory of a model"
        )
    content = path.read_bytes()
    read_by = content, metadata.version("transformers"), _CODE
    if found := kept(LlamaConfig, *read_by):
        return found
    try:
        config = _config(msgspec.json.decode(content, type=dict[str, Any]))
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, StrictDataclassError) as error:
        # Some are raised by transformers, for values of other types or ranges than expected.
        raise ValueError(f"{path}: {one_line(error)}") from error
    except KeyError as error:
        # Raised by transformers if keys of the rope settings are missing.
        raise ValueError(f"{path}: {error.args[0]}") from error
    keep(config, *read_by)
    return config


def _config(keys: dict[str, Any]) -> LlamaConfig:
    model_type: Any = keys.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise ValueError(f"model_type {model_type!r} is not supported: choose a model of {', '.join(_MODEL_TYPES)}")
    from transformers import CONFIG_MAPPING  # seconds that a start from the cache saves

    public = CONFIG_MAPPING[model_type]
    _check_keys(keys, public().to_dict().keys() | _ALSO_ACCEPTED | _ONLY_SUPPORTED.keys())
    # transformers reads the keys first: both layouts, with the defaults of each architecture. The
    # dtype is left out, since the weight files state the dtype of each tensor.
    typeless = {key: value for key, value in keys.items() if key not in ("dtype", "torch_dtype")}
    read = keys | public.from_dict(typeless).to_dict()
    _check_supported(read, architectures=[_architecture(model_type)])
    fields = {key: read.get(key) for key in _FIELD_KEYS}
    return msgspec.convert(fields | _rope(read["rope_parameters"]), LlamaConfig)


def _check_keys(keys: dict[str, Any], accepted: set[str]) -> None:
    missing = [key for key in _REQUIRED if key not in keys]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}: add the sizes of the model")
    for key in _REQUIRED:
        if type(keys[key]) is not int or keys[key] < 1:
            raise ValueError(f"{key} is {keys[key]!r:.80}, but the sizes of a model must be integers of at least 1")
    unknown = [key for key in keys if key not in accepted and not key.startswith("_")]
    if unknown:
        raise ValueError(
            f"unknown keys for model_type {keys['model_type']}: {', '.join(unknown)}; remove the keys if the model "
            "computes the same without"
        )


def _check_supported(read: dict[str, Any], architectures: list[str]) -> None:
    for key, supported in (_ONLY_SUPPORTED | {"architectures": architectures}).items():
        value = read.get(key)
        if value is not None and value != supported:
            remedy = _REMEDIES.get(key, "choose another model")
            raise ValueError(f"{key} is {value!r}, but only {supported!r} is supported: {remedy}")
    if set(read.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(
            f"layer_types is {read['layer_types']!r}, but only full_attention is supported: choose another model"
        )


_REMEDIES = {
    "sliding_window": "set it to null if no conversation is longer, since the window then has no effect",
    "quantization_config": "train from the weights before quantization",
}


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the fields `rope_theta` and `rope_scaling` of a LlamaConfig."""
    settings = {key: value for key, value in parameters.items() if key != "type"}  # older spelling of rope_type
    theta, rope_type = settings.pop("rope_theta"), settings.pop("rope_type")
    if (share := settings.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"partial_rotary_factor is {share!r}, but only 1.0 is supported: choose another model")
    if rope_type not in ("default", "linear", "llama3"):
        raise ValueError(
            f"rope_type is {rope_type!r}, but only default, linear, llama3 are supported: choose another model"
        )
    if rope_type == "default" and settings:
        raise ValueError(
            f"unknown keys for rope_type 'default': {', '.join(settings)}; set the rope_type of the keys, or remove them"
        )
    scaling = None if rope_type == "default" else {"rope_type": rope_type, **settings}
    return {"rope_theta": theta, "rope_scaling": scaling}


def write_config(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the keys of `config.json` for weights of `dtype`, readable by transformers 4 and 5."""
    keys: dict[str, Any] = msgspec.to_builtins(config)
    return {
        **keys,
        **_EXPLICIT_KEYS[config.model_type],
        "architectures": [_architecture(config.model_type)],
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


_EXPLICIT_KEYS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False, "attention_bias": False},
}
"""Constant keys per architecture, written because defaults differ between readers."""


def _architecture(model_type: str) -> str:
    return f"{model_type.capitalize()}ForCausalLM"
