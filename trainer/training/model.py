"""Find the shape of a run's model, build the model over ranks, and fill its first weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from sftstream import count_token_ids, identify_file
from trainer.config import ModelConfig, TrainConfig
from trainer.distributed.mesh import Topology, named_dtype
from trainer.llama.attention import Kernel
from trainer.llama.blocks import prepare_blocks
from trainer.llama.config import LlamaConfig
from trainer.llama.hf_config import find_model, read_config
from trainer.llama.init import init_weights
from trainer.llama.loss import compile_head
from trainer.llama.model import Llama
from trainer.llama.parallel import build
from trainer.llama.weights import load_weights, weight_files

ROWS = 64
"""Divisor of the rows of a resized embedding: usual tensor-parallel sizes divide it."""


@dataclass(frozen=True)
class ModelSource:
    """Shape and first weights of a model."""

    shape: LlamaConfig
    init_from: Path | None
    """Hugging Face directory of the first weights; None for random weights."""
    rows_before: int | None = None
    """Number of tokens in `init_from` if `model.resize_vocabulary` has added rows, else None."""

    @cached_property
    def digest(self) -> str:
        """Digest of the first weights, wherever they lie: "random", or 64 hexadecimal characters.

        Files above 256 MiB are sampled, as sources are. Raises ValueError if a file is missing.
        """
        if self.init_from is None:
            return "random"
        digest = hashlib.sha256()
        for path in weight_files(self.init_from):
            try:
                identity = identify_file(path)
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error.strerror}; restore model.init_from") from None
            digest.update(f"{identity.name} {identity.size} {identity.sha256}\n".encode())
        return digest.hexdigest()


def find_source(config: ModelConfig, tokenizer: str) -> ModelSource:
    """Return the shape and directory of the `[model]` table.

    `tokenizer` is a directory or hub name. Downloads a hub model if it is not cached.

    Raises ValueError if `init_from` is not found or not supported.
    """
    if config.init_from:
        directory = find_model(config.init_from)
        shape = read_config(directory)
        if config.resize_vocabulary:
            return _resized(shape, directory, count_token_ids(tokenizer))
        return ModelSource(shape, directory)
    assert config.shape is not None
    return ModelSource(config.shape, None)


def _resized(shape: LlamaConfig, directory: Path, tokens: int) -> ModelSource:
    if tokens <= shape.vocab_size:
        return ModelSource(shape, directory)
    rows = -(-tokens // ROWS) * ROWS
    return ModelSource(msgspec.structs.replace(shape, vocab_size=rows), directory, shape.vocab_size)


def build_model(
    config: TrainConfig, source: ModelSource, topology: Topology, kernel: Kernel, *, initialize: bool
) -> Llama:
    """Build the model of a run whose choices are made, sharded over all ranks. Collective.

    `initialize` fills the weights from `source` or at random; False leaves them for a checkpoint to
    fill.
    """
    model = build(
        source.shape,
        topology.mesh,
        topology.device,
        capacity=config.data.capacity,
        compute_dtype=named_dtype(config.run.compute_dtype, topology.device),
        weights_dtype=named_dtype(config.run.weights_dtype, topology.device),
        reshard_after_forward=config.parallel.reshard_after_forward,
    )
    assert config.run.recompute != "auto"
    assert config.run.compile != "auto"
    prepare_blocks(model, recompute=config.run.recompute, compiled=config.run.compile, kernel=kernel)
    if config.run.compile:
        width = source.shape.vocab_size // topology.tp
        dtype = named_dtype(config.run.compute_dtype, topology.device)
        compile_head(config.data.capacity, width, dtype, topology.device)
    if not initialize:
        return model
    if source.init_from:
        load_weights(model, source.init_from, source.rows_before)
    else:
        init_weights(model, config.run.seed)
    return model
