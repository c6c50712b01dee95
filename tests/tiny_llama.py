"""A Llama small enough to check every number of, and packs for it."""

from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from sftstream import IGNORE_INDEX
from trainer.attention import Segments
from trainer.loss import summed_cross_entropy
from trainer.model import Llama, LlamaConfig

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


class Row(NamedTuple):
    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    labels: Tensor


def segments(*lengths: int) -> Segments:
    return Segments(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths))


def row(*lengths: int, seed: int = 0) -> Row:
    """Random conversations of these lengths; about half of their tokens are trained, the first never."""
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    labels = torch.randint(CONFIG.vocab_size, (tokens,), generator=draw)
    labels[torch.rand(tokens, generator=draw) < 0.5] = IGNORE_INDEX
    labels[0] = IGNORE_INDEX
    return Row(
        torch.randint(CONFIG.vocab_size, (tokens,), generator=draw),
        torch.cat([torch.arange(length) for length in lengths]),
        segments(*lengths),
        labels,
    )


def loss_of(model: Llama, row: Row) -> Tensor:
    return summed_cross_entropy(model(row.input_ids, row.position_ids, row.segments), row.labels)


def gradients(model: Llama) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}
