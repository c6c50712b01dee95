"""The recipe for the export of a checkpoint, saved in the checkpoint: an export needs no run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from msgspec import UNSET

from checkpoints import Recipe, Rows
from trainer.llama.config import LlamaConfig
from trainer.llama.export import Tokenizer, config_files
from trainer.llama.hf_config import StrPath
from trainer.llama.weights import layout

_NAMES: dict[torch.dtype, Literal["F32", "BF16"]] = {torch.float32: "F32", torch.bfloat16: "BF16"}

MODEL = "model"
"""The key of the parameters in the state of a checkpoint."""


def recipe(
    config: LlamaConfig,
    dtype: torch.dtype,
    export_dtype: torch.dtype,
    tokenizer: Tokenizer,
    template: str | None,
    stop_token_ids: Iterable[int],
    init_from: StrPath | None = None,
) -> Recipe:
    """Return the recipe to export a checkpoint with parameters of `dtype` as `export_dtype`.

    The exported files equal the files of `trainer.llama.export.export` for the model.
    """
    tensors: dict[str, list[Rows]] = {}
    for name, pieces in layout(config).items():
        start = 0
        for piece in pieces:
            tensors.setdefault(piece.tensor, []).append(Rows(f"{MODEL}.{name}", start, piece.rows))
            start += piece.rows
    files = config_files(config, export_dtype, tokenizer, template, stop_token_ids, init_from)
    return Recipe(tensors, files, UNSET if export_dtype == dtype else _NAMES[export_dtype])
