"""Find the shape of a run's model, build the model over ranks, and fill its first weights."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import msgspec

from sftstream import count_token_ids, differences, identify_file
from trainer.config import ModelConfig, TrainConfig
from trainer.distributed.mesh import Topology, named_dtype
from trainer.llama.blocks import import_compiler, prepare_blocks
from trainer.llama.config import LlamaConfig
from trainer.llama.hf_config import find_model, read_config
from trainer.llama.init import init_adapters, init_weights
from trainer.llama.lora.files import WEIGHTS, is_adapter, load_adapters, read_adapter_config
from trainer.llama.lora.layers import LoraConfig
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
    adapter: Path | None = None
    """Directory of the first adapter; None for new adapters, and without `[lora]`."""
    name: str | None = None
    """Directory or hub name of the model under adapters, as given; None without `[lora]`."""

    @cached_property
    def digest(self) -> str:
        """Digest of the first weights, wherever they lie: "random", or 64 hexadecimal characters.

        Files above 256 MiB are sampled, as sources are. Raises ValueError if a file is missing.
        """
        if self.init_from is None:
            return "random"
        digest = hashlib.sha256()
        adapter = () if self.adapter is None else (self.adapter / WEIGHTS,)
        for path in (*weight_files(self.init_from), *adapter):
            try:
                identity = identify_file(path)
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error.strerror}; restore model.init_from") from None
            digest.update(f"{identity.name} {identity.size} {identity.sha256}\n".encode())
        return digest.hexdigest()


def find_source(config: ModelConfig, tokenizer: str, lora: LoraConfig | None = None) -> ModelSource:
    """Return the shape and directory of the `[model]` table.

    `tokenizer` is a directory or hub name. Downloads a hub model if it is not cached.

    Raises ValueError if `init_from` is not found or not supported, or does not suit `lora`.
    """
    if config.init_from:
        directory = find_model(config.init_from)
        if is_adapter(directory):
            return _adapter_source(config.init_from, directory, lora)
        if lora is not None:
            return _base_source(config.init_from, directory, lora)
        shape = read_config(directory)
        if config.resize_vocabulary:
            return _resized(shape, directory, count_token_ids(tokenizer))
        return ModelSource(shape, directory)
    assert config.shape is not None
    return ModelSource(config.shape, None)


def _base_source(name: str, directory: Path, lora: LoraConfig) -> ModelSource:
    shape = read_config(directory)
    lora.require_suits(shape)
    return ModelSource(shape, directory, name=name)


def _adapter_source(name: str, directory: Path, lora: LoraConfig | None) -> ModelSource:
    """Return the source of an adapter that a run trains on.

    Raises ValueError if the `[lora]` table differs from the adapter's settings.
    """
    stored, base = read_adapter_config(directory)
    if lora is None:
        raise ValueError(
            f"model.init_from = {name!r} is a PEFT adapter; set lora = {stored.toml} to train it on, or merge the adapter "
            "into its model to train all weights"
        )
    given = lora.identity | {"quantize": None}  # the files of an adapter do not tell
    if changed := differences(stored.identity, given, "lora"):
        raise ValueError(
            f"the adapter in model.init_from = {name!r} has other settings (adapter -> now): {'; '.join(changed)}. Set "
            f"lora = {stored.toml} to train it on"
        )
    return replace(_base_source(base, find_model(base), lora), adapter=directory)


def _resized(shape: LlamaConfig, directory: Path, tokens: int) -> ModelSource:
    if tokens <= shape.vocab_size:
        return ModelSource(shape, directory)
    rows = -(-tokens // ROWS) * ROWS
    return ModelSource(msgspec.structs.replace(shape, vocab_size=rows), directory, shape.vocab_size)


def build_model(config: TrainConfig, source: ModelSource, topology: Topology, *, initialize: bool) -> Llama:
    """Build the model of a run, spread over all ranks, without its attention kernel. Collective.

    `initialize` fills the weights from `source` or at random; False leaves the trained weights for
    a checkpoint to fill. Frozen weights always come from `source`.
    """
    model = build(
        source.shape,
        topology.mesh,
        topology.device,
        capacity=config.data.capacity,
        compute_dtype=named_dtype(config.run.compute_dtype, topology.device),
        weights_dtype=named_dtype(config.run.weights_dtype, topology.device),
        reshard_after_forward=config.parallel.reshards,
        replicas=config.parallel.groups,
        lora=config.lora,
    )
    assert config.run.recompute != "auto"
    assert config.run.compile != "auto"
    with ThreadPoolExecutor(1, "compiler") as beside:
        if config.run.compile:
            beside.submit(import_compiler)
        if source.init_from and (initialize or config.lora):
            load_weights(model, source.init_from, source.rows_before)
        if initialize:
            _initialize(model, source, config.run.seed)
    prepare_blocks(
        model,
        recompute=config.run.recompute,
        compiled=config.run.compile,
        float8=config.run.float8,
    )
    return model


def _initialize(model: Llama, source: ModelSource, seed: int) -> None:
    """Fill the weights that `source.init_from` does not hold."""
    if source.init_from is None:
        init_weights(model, seed)
    if source.adapter is not None:
        load_adapters(model, source.adapter)
    elif model.lora is not None:
        init_adapters(model, seed)
