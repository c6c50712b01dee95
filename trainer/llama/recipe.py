"""The recipe for the export of a checkpoint, saved in the checkpoint: an export needs no run."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from checkpoints import Recipe, Rows
from trainer.llama.config import LlamaConfig
from trainer.llama.export import Tokenizer, config_files
from trainer.llama.hf_config import StrPath
from trainer.llama.weights import layout

MODEL = "model"
"""The key of the parameters in the state of a checkpoint."""


def recipe(
    config: LlamaConfig,
    dtype: torch.dtype,
    tokenizer: Tokenizer,
    stop_token_ids: Iterable[int],
    init_from: StrPath | None = None,
) -> Recipe:
    """Return the recipe for the export of a checkpoint with parameters of `dtype`.

    The exported files equal the files of `trainer.llama.export.export` for the model.
    """
    tensors: dict[str, list[Rows]] = {}
    for name, pieces in layout(config).items():
        start = 0
        for piece in pieces:
            tensors.setdefault(piece.tensor, []).append(Rows(f"{MODEL}.{name}", start, piece.rows))
            start += piece.rows
    return Recipe(tensors, config_files(config, dtype, tokenizer, stop_token_ids, init_from))
