"""How a checkpoint of a run becomes a Hugging Face directory: kept in it, so that nothing else is needed for that."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from checkpoints import Recipe, Rows
from trainer.llama.export import Tokenizer, config_files
from trainer.llama.hf_config import StrPath
from trainer.llama.model import LlamaConfig
from trainer.llama.weights import layout

MODEL = "model"
"""Where the parameters are in a checkpoint's tensors."""


def recipe(
    config: LlamaConfig,
    dtype: torch.dtype,
    tokenizer: Tokenizer,
    stop_token_ids: Iterable[int],
    init_from: StrPath | None = None,
) -> Recipe:
    """For parameters of `dtype`, under the names that the model gives them."""
    tensors: dict[str, list[Rows]] = {}
    for name, pieces in layout(config).items():
        start = 0
        for piece in pieces:
            tensors.setdefault(piece.tensor, []).append(Rows(f"{MODEL}.{name}", start, piece.rows))
            start += piece.rows
    return Recipe(tensors, config_files(config, dtype, tokenizer, stop_token_ids, init_from))
