"""The recipe for the export of a checkpoint, saved in the checkpoint: an export needs no run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from msgspec import UNSET

from checkpoints import BaseTensor, Merged, Product, Recipe, Rows
from sftstream import SavedTokenizer
from trainer.llama.config import LlamaConfig
from trainer.llama.export import adapter_files, config_files
from trainer.llama.hf_config import StrPath
from trainer.llama.lora.files import CONFIG, PREFIX, trained_layout
from trainer.llama.lora.layers import A, B, LoraConfig
from trainer.llama.weights import Piece, files_of_tensors, layout

_NAMES: dict[torch.dtype, Literal["F32", "BF16"]] = {torch.float32: "F32", torch.bfloat16: "BF16"}

MODEL = "model"
"""The key of the parameters in the state of a checkpoint."""


def recipe(
    config: LlamaConfig,
    dtype: torch.dtype,
    export_dtype: torch.dtype,
    tokenizer: SavedTokenizer,
    stop_token_ids: Iterable[int],
    init_from: StrPath | None = None,
) -> Recipe:
    """Return the recipe to export a checkpoint with parameters of `dtype` as `export_dtype`.

    The exported files equal the files of `trainer.llama.export.export` for the model.
    """
    files = config_files(config, export_dtype, tokenizer, stop_token_ids, init_from)
    return Recipe(_rows(layout(config)), files, UNSET if export_dtype == dtype else _NAMES[export_dtype])


class Base(NamedTuple):
    """The model under adapters."""

    name: str
    """Directory or hub name, as the user gave it."""
    directory: Path
    digests: dict[str, str]
    """Digest of each weight file by name."""
    dtype: torch.dtype
    """Type of the weights in the run."""


def adapter_recipe(
    config: LlamaConfig,
    lora: LoraConfig,
    base: Base,
    export_dtype: torch.dtype,
    tokenizer: SavedTokenizer,
    stop_token_ids: Iterable[int],
) -> Recipe:
    """Return the recipe to export a checkpoint of adapters, alone or added to their base.

    The exported files equal those of `export_adapter`, and of `export` in `export_dtype`.
    """
    trained = _rows(trained_layout(config, lora))
    whole = config_files(config, export_dtype, tokenizer, stop_token_ids, base.directory)
    alone = adapter_files(lora, base.name, tokenizer)
    held = files_of_tensors(base.directory)
    tensors = {}
    for name in _rows(layout(config)):
        product = _product(name, lora, trained)
        rows = trained.get(name, UNSET)
        tensors[name] = BaseTensor(held[name], UNSET if product is None else product, rows)
    merged = Merged(str(base.directory.absolute()), base.digests, tensors, _NAMES[base.dtype], _NAMES[export_dtype])
    return Recipe(
        {f"{PREFIX}{name}": rows for name, rows in trained.items()},
        alone,
        stem="adapter_model",
        merged=merged,
        merged_files={name: content for name, content in whole.items() if name not in alone},
        adapter_files=[CONFIG],
    )


def _product(name: str, lora: LoraConfig, trained: Mapping[str, list[Rows]]) -> Product | None:
    stem = name.removesuffix(".weight")
    if f"{stem}.{A}.weight" not in trained:
        return None
    return Product(trained[f"{stem}.{B}.weight"], trained[f"{stem}.{A}.weight"], lora.scale)


def _rows(layout: Mapping[str, list[Piece]]) -> dict[str, list[Rows]]:
    """Return the rows of a checkpoint for each Hugging Face tensor of a layout."""
    tensors: dict[str, list[Rows]] = {}
    for name, pieces in layout.items():
        start = 0
        for piece in pieces:
            tensors.setdefault(piece.tensor, []).append(Rows(f"{MODEL}.{name}", start, piece.rows))
            start += piece.rows
    return tensors
