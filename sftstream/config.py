"""What a stream is made of: the `[data]` table of a run's config."""

from __future__ import annotations

from typing import Literal

import msgspec


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Conversations from one place."""

    path: str
    """A JSON, JSONL or Parquet file, or a glob of them (files are read in sorted order)."""
    weight: float | None = None
    """Share of the conversations drawn from here, relative to the other weights. Without weights every conversation of
    every source comes once per epoch. Weights are given for all sources or for none."""

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"weight = {self.weight} must be a positive number")


class TokenizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tokenizer and the chat template, as the model has them."""

    path: str
    """A Hugging Face tokenizer's directory or hub name."""
    template: str | None = None
    """A Jinja chat template: a file's path or the text itself. Default: the tokenizer's own."""
    date: str | None = None
    """The day (YYYY-MM-DD) that a template prints as today. Default: the day on which the stream first starts; a resume
    keeps it."""


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A deterministic sequence of packs, whatever hardware reads it."""

    sources: tuple[SourceConfig, ...]
    tokenizer: TokenizerConfig
    streams: int = 64
    """Logical streams. Fixed for a run; shards x workers must divide it. Few for little data: a stream should hold several
    windows of conversations."""
    capacity: int = 8192
    """Tokens of a pack; a longer conversation is refused and counted."""
    global_batch: int = 64
    """Packs of an optimizer step over all shards."""
    shuffle: bool = True
    """A new order of rows each epoch, drawn from `seed`."""
    train_on: tuple[Literal["assistant"], ...] = ("assistant",)
    """Whose tokens are trained."""
    window: int = 256
    """Conversations that a stream plans into packs at a time. More fills better and reorders more."""
    workers: int = 1
    """Loader processes of a shard; 0 loads in the training process. Never changes what is trained on."""
    prefetch: int = 4
    """Packs that each worker keeps ready. Never changes what is trained on."""
    seed: int = 0
    """Keys the order of rows."""
    epochs: int | None = None
    """Passes over all conversations; None goes on for ever."""

    def __post_init__(self) -> None:
        for field in ("streams", "capacity", "global_batch", "window", "prefetch"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} = {getattr(self, field)} must be at least 1")
        if self.workers < 0:
            raise ValueError(f"workers = {self.workers} must be 0 (load in the training process) or more")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs = {self.epochs} must be at least 1; leave it out for an endless stream")
        if not self.train_on:
            raise ValueError('train_on is empty, so nothing would be trained; name a role: ["assistant"]')
        self._check_sources()

    def _check_sources(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name at least one [[data.sources]] with a path")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            missing = self.sources[weighted.index(False)].path
            raise ValueError(
                f"source {missing!r} has no weight but another has; give weights to all sources or to none"
            )
        if all(weighted) and self.epochs is not None:
            raise ValueError(
                f"epochs = {self.epochs} has no meaning for weighted sources, which are drawn at fixed shares without an end; "
                "leave out the weights, or end the run by steps"
            )
