"""How a checkpoint of a run becomes a Hugging Face directory: kept in it, so that nothing else is needed for that."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from checkpoints import Recipe, Rows
from trainer.llama.config import LlamaConfig
from trainer.llama.export import Tokenizer, describe
from trainer.llama.hf_config import StrPath
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
    with tempfile.TemporaryDirectory() as directory:
        describe(Path(directory), config, dtype, tokenizer, stop_token_ids, init_from)
        paths = sorted(path for path in Path(directory).rglob("*") if path.is_file())
        return Recipe(tensors, {str(path.relative_to(directory)): path.read_bytes() for path in paths})
