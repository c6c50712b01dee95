"""What a stream is made of: the `[data]` table of a run's config."""

from __future__ import annotations

import itertools
from typing import Literal

import msgspec

Shuffle = bool | Literal["shards"]


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Conversations from one place."""

    path: str
    """What is there on this machine comes first: a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow; compressed as .gz or
    .zst too), a glob of files or a directory (read in sorted order), a dataset that `save_to_disk` wrote, a directory laid
    out like a dataset of the Hugging Face hub. Else a remote path with a scheme (hf://, s3://, gs://, https://, ...), which
    is fetched once; else a hub name, `organisation/name`."""
    split: str | None = None
    """Of a dataset of the hub or one laid out like it, as `datasets` writes it ("train", "train[:10%]"), or of a saved
    dataset. May be left out where there is only one."""
    subset: str | None = None
    """Of a dataset of the hub or one laid out like it, where it has several."""
    revision: str | None = None
    """Of a dataset of the hub: a branch, tag or commit."""
    columns: dict[str, str] | None = None
    """For layouts that are not known: the name that is -> the name of the column here. The row then has these columns and no
    others."""
    weight: float | None = None
    """Share that is drawn from here, relative to the other weights. Without weights sources are drawn in proportion to
    their size, so that they end an epoch together. Weights are given for all sources or for none."""
    repeat: float = 1.0
    """Passes over this source in an epoch of the whole; 0.5 takes half of its rows, another half in the next epoch. Where it is
    streamed, half of its shards."""
    shuffle: Shuffle | None = None
    """For this source other than `data.shuffle`."""
    streaming: bool = False
    """Read forward, shard by shard, for what is too large to be fetched or indexed. Rows come in the order of their shard; a
    resume reads the open shards again up to its place. Mixed with others it needs a weight."""
    digest: Literal["sampled", "full"] = "sampled"
    """What a resume knows of files above 256 MB: 128 evenly spread megabytes, or every byte, at 0.8 s a GB."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; name a file, a glob, a directory or a dataset")
        if self.columns is not None and not self.columns:
            raise ValueError("columns is empty, so that no column would be read; name some, or leave it out")
        for field in ("weight", "repeat"):
            value = getattr(self, field)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{field} = {value} must be a positive number")


class StageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Other weights from a point of the run on."""

    after: int
    """Rows of the whole run that are drawn before."""
    weights: tuple[float, ...]
    """One for each source, in their order; 0 rests a source."""

    def __post_init__(self) -> None:
        if self.after < 1:
            raise ValueError(
                f"after = {self.after} must be at least 1; the sources' own weights hold from the beginning"
            )
        if not all(0 <= weight < float("inf") for weight in self.weights) or not any(self.weights):
            raise ValueError(f"weights = {list(self.weights)} must not be negative, and not all be 0")


class TokenizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tokenizer and the chat template, as the model has them."""

    path: str
    """A Hugging Face tokenizer's directory or hub name."""
    template: str | None = None
    """A Jinja chat template: a file's path or the text itself. Default: the tokenizer's own."""
    backend: Literal["auto", "huggingface", "fastokens"] = "auto"
    """What computes the ids: Hugging Face's `tokenizers`, or fastokens once it has proved to give the same; "auto" does so where
    it is installed. A resume wants the same again."""
    date: str | None = None
    """The day (YYYY-MM-DD) that a template prints as today. Default: the day on which the stream first starts; a resume
    keeps it."""


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of a conversation is trained, and what becomes of one that does not fit."""

    train_on: tuple[Literal["assistant", "user", "system", "tool", "all"], ...] = ("assistant",)
    """Whose words are trained. A message with `train: false` or `weight: 0` never is."""
    train_turns: Literal["all", "last"] = "all"
    """last: only the last message of those."""
    train_reasoning: bool = True
    train_tool_calls: bool = True
    history: Literal["as_rendered", "per_turn", "error"] = "as_rendered"
    """Where a template prints earlier turns otherwise than when they were said (thoughts are forgotten): train what is
    printed, or make one example a turn as inference sees it, or refuse the conversation."""
    overflow: Literal["drop", "truncate", "split"] = "drop"
    """A conversation longer than `capacity`: refuse it, cut it after the last answer that fits, or make several of it, cut
    before a user's message and each with the system prompt again."""
    capacity: int = 8192
    """Tokens of a pack."""

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"capacity = {self.capacity} must be at least 1")
        if not self.train_on:
            raise ValueError('train_on is empty, so nothing would be trained; name a role: ["assistant"]')


class DataConfig(Policy, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A deterministic sequence of packs, whatever hardware reads it."""

    sources: tuple[SourceConfig, ...]
    tokenizer: TokenizerConfig
    streams: int = 64
    """Logical streams. Fixed for a run; shards x workers must divide it. Few for little data: a stream should hold several
    windows of conversations."""
    global_batch: int = 64
    """Packs of an optimizer step over all shards."""
    shuffle: Shuffle = True
    """A new order of rows each epoch, drawn from `seed`. "shards" orders a source's files or shards and leaves the rows of each
    as they lie, as a source that is streamed needs it; false takes everything as it lies."""
    window: int = 256
    """Conversations that a stream plans into packs at a time. More fills better and reorders more."""
    workers: int = 1
    """Loader processes of a shard; 0 loads in the training process. Never changes what is trained on."""
    prefetch: int = 16
    """Packs that each worker keeps ready. With more than a window gives it need not wait while another worker reads its own.
    Never changes what is trained on."""
    seed: int = 0
    """Keys the order of rows."""
    epochs: int | None = None
    """Passes over all conversations; None goes on for ever."""
    mix_by: Literal["conversations", "tokens", "trained_tokens"] = "conversations"
    """What weights are shares of."""
    stages: tuple[StageConfig, ...] = ()
    """Weights that hold later in the run, by rising `after`."""
    ends_with: Literal["all", "first"] = "all"
    """With weights and epochs: the stream ends when every source has ended, or the first."""
    accept_changed: tuple[str, ...] = ()
    """Differences from the state's data and settings that a resume takes as they are, by name: "data.sources[2]",
    "data.capacity". Each is put on record in the state."""
    max_refused: float = 1.0
    """Share of rows that may be refused, from 0 to 1; a run that refuses more stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.max_refused <= 1:
            raise ValueError(f"max_refused = {self.max_refused} is a share, from 0 to 1")
        for field in ("streams", "global_batch", "window", "prefetch"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} = {getattr(self, field)} must be at least 1")
        if self.workers < 0:
            raise ValueError(f"workers = {self.workers} must be 0 (load in the training process) or more")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs = {self.epochs} must be at least 1; leave it out for an endless stream")
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
        for source in self.sources:
            if source.streaming:
                self._check_streaming(source)
        if self.epochs is None and any(source.repeat != 1 for source in self.sources):
            raise ValueError("repeat counts passes in an epoch and needs epochs; an endless stream is mixed by weights")
        if self.stages and not all(weighted):
            raise ValueError("stages change weights, so the sources need weights for the beginning")
        for before, stage in itertools.pairwise((None, *self.stages)):
            if stage is not None and len(stage.weights) != len(self.sources):
                raise ValueError(
                    f"a stage has {len(stage.weights)} weights for {len(self.sources)} sources; give one for each"
                )
            if before is not None and stage is not None and stage.after <= before.after:
                raise ValueError(f"stages come by rising after, but {stage.after} follows {before.after}")

    def _check_streaming(self, source: SourceConfig) -> None:
        if self.shuffle_of(source) is True:
            raise ValueError(
                f"source {source.path!r} is streamed, and its rows cannot be reached in any order; "
                'shuffle = "shards" shuffles its shards, false nothing'
            )
        if len(self.sources) > 1 and source.weight is None:
            raise ValueError(
                f"source {source.path!r} is streamed, so that its size is not known; give weights to all sources"
            )

    def shuffle_of(self, source: SourceConfig) -> Shuffle:
        """What holds for this source."""
        return self.shuffle if source.shuffle is None else source.shuffle
