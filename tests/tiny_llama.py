"""A Llama small enough to check every number, and random packs for it."""

from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
import transformers
from torch import Tensor

from sftstream import IGNORE_INDEX
from trainer.llama.attention import Segments
from trainer.llama.config import LlamaConfig
from trainer.llama.export import export
from trainer.llama.init import init_weights
from trainer.llama.model import Llama
from trainer.llama.selection import Slices

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    initializer_range=0.2,
)
TIED = msgspec.structs.replace(CONFIG, tie_word_embeddings=True)
QWEN2 = msgspec.structs.replace(CONFIG, model_type="qwen2")
QWEN3 = msgspec.structs.replace(CONFIG, model_type="qwen3", head_dim=6)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "grouped heads, untied": {},
    "tied": {"tie_word_embeddings": True},
    "one key per query": {"num_key_value_heads": 8},
    "one key for all": {"num_key_value_heads": 1},
    "head size given": {"head_dim": 16},
    "llama3 scaling": {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}},
    "linear scaling": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}},
    "uneven feed-forward": {"intermediate_size": 50},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}


def public_llama(**keys: object) -> transformers.PreTrainedModel:
    """Return a model of transformers with `CONFIG` changed by `keys`, and all weights random."""
    fields = msgspec.to_builtins(CONFIG)
    given = {key: value for key, value in fields.items() if value is not None and key != "rope_theta"}
    config = transformers.AutoConfig.for_model(**(given | keys))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)  # equal norms (1) or biases (0) could be swapped unnoticed
    return model


def built(config: LlamaConfig, seed: int = 0) -> Llama:
    model = Llama(config)
    init_weights(model, seed)
    return model


class PackTensors(NamedTuple):
    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    labels: Tensor


def segments(*lengths: int) -> Segments:
    return Segments(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths))


def pack_of(*lengths: int, seed: int = 0) -> PackTensors:
    """Return random conversations of the given lengths; about half of the tokens are trained."""
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    labels = torch.randint(CONFIG.vocab_size, (tokens,), generator=draw)
    labels[torch.rand(tokens, generator=draw) < 0.5] = IGNORE_INDEX
    labels[0] = IGNORE_INDEX
    return PackTensors(
        torch.randint(CONFIG.vocab_size, (tokens,), generator=draw),
        torch.cat([torch.arange(length) for length in lengths]),
        segments(*lengths),
        labels,
    )


def loss_of(model: Llama, pack: PackTensors) -> Tensor:
    return model(pack.input_ids, pack.position_ids, pack.segments, labels=pack.labels)


def trained_loss_of(model: Llama, pack: PackTensors) -> Tensor:
    """Return the same loss from the trained positions alone."""
    positions = torch.nonzero(pack.labels >= 0).flatten()
    sliced = Slices.of(positions, len(pack.labels), model.tp) if model.tp > 1 else positions
    return model(pack.input_ids, pack.position_ids, pack.segments, sliced, pack.labels[positions])


def gradients(model: Llama) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def exported(directory: Path) -> Path:
    """Export a model of `CONFIG` with initial weights into `directory`, and return `directory`."""
    export(built(CONFIG), CONFIG, directory)
    return directory
