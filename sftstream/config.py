"""The `[data]` table of a run's config: sources, tokenizer, policy, packing, order."""

from __future__ import annotations

import itertools
from typing import Literal

import msgspec

from sftstream.records import Role

Shuffle = bool | Literal["shards"]
"""true: all rows in a new order each epoch; "shards": shards in a new order; false: stored
order."""


class RowSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The reading of a source's rows: columns, left out columns, names of roles."""

    columns: dict[str, str] | None = None
    """Renamed columns, for layouts that are not recognised: name in a known layout -> name of the
    column in the files. `{instruction = "q", output = "a"}` reads columns `q` and `a` as an
    instruction and an output. All other columns are ignored. Default: columns as stored."""
    ignore: tuple[str, ...] = ()
    """Columns, and keys of messages, that are left out on purpose. A row is refused if a column or
    key with a name known to carry words of a conversation (`context`, `functions`, ...) has a
    value that the row's layout does not read; `ignore = ["context"]` trains the row without the
    column. Default: nothing is left out."""
    roles: dict[str, Role] | None = None
    """Further names of roles: name in the files -> "system", "user", "assistant" or "tool".
    `{narrator = "user"}` reads a turn of `narrator` as a user's. Default: the known names alone."""
    max_row_bytes: int = 16 << 20
    """Largest row in bytes; at least 1. A larger row is refused before it is parsed or rendered,
    since a row of megabytes takes minutes and gigabytes. Of a row in a table, the texts count."""

    def __post_init__(self) -> None:
        if self.columns is not None and not self.columns:
            raise ValueError(
                "columns is empty, so no column would be read; name at least one column, or leave columns out"
            )
        if self.max_row_bytes < 1:
            raise ValueError(f"max_row_bytes = {self.max_row_bytes} must be at least 1")
        if both := sorted({*self.ignore} & {*(self.columns or ()), *(self.columns or {}).values()}):
            raise ValueError(f"columns and ignore both name {both[0]!r}; remove the name from one of the two")


class SourceConfig(RowSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One source of conversations."""

    path: str
    """Location of the source. A local path comes first: a file (.jsonl, .ndjson, .json, .csv, .tsv,
    .parquet, .arrow, each also compressed as .gz, .zst, .bz2 or .xz; the content decides over the
    suffix), a glob or a directory (files in sorted order), a dataset written by `save_to_disk`, or
    a directory laid out like a dataset of the Hugging Face hub. If no local path matches: a remote
    path with a scheme (hf://, s3://, gs://, https://, ...), fetched once into the cache, or the
    name of a hub dataset, `organisation/name`."""
    split: str | None = None
    """Split of a hub dataset, of a directory laid out like a hub dataset (both in the syntax of
    `datasets`: "train", "train[:10%]") or of a saved dataset. Default: the only split."""
    subset: str | None = None
    """Subset (configuration name) of a hub dataset, or of a directory laid out like a hub dataset.
    Default: the only subset, or the subset that `datasets` loads by default."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset. Default: the main branch."""
    weight: float | None = None
    """Share of the draws from this source, relative to the weights of all sources; a positive
    number. `data.mix_by` is the unit. Give weights to all sources or to none. Default: draws in
    proportion to the sources' sizes, so that all sources end an epoch together."""
    repeat: float = 1.0
    """Passes over this source in one epoch; a positive number. 0.5 takes half of the rows in one
    epoch and the other half in the next. Counts shards instead of rows if the source is streamed.
    A value other than 1 needs `data.epochs`."""
    shuffle: Shuffle | None = None
    """Shuffling of this source: true, "shards" or false, as in `data.shuffle`. Default: the
    value of `data.shuffle`."""
    streaming: bool = False
    """true: read shards forward, without fetching or indexing the files; for sources too large for
    the local disk. Rows keep the order of their shard, so `shuffle` must be "shards" or false. A
    resume reads each open shard again from the shard's beginning up to the saved position. Beside
    other sources a streamed source needs a weight. false: fetch remote files, index all files, and
    read rows in any order."""
    digest: Literal["sampled", "full"] = "sampled"
    """Content that identifies a file above 256 MiB to a resume. "sampled": 128 evenly spread slices
    of 1 MiB. "full": every byte, at 0.8 s a GB. Smaller files are always identified by every
    byte."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; name a file, a glob, a directory or a dataset")
        super().__post_init__()
        for field in ("weight", "repeat"):
            value = getattr(self, field)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{field} = {value} must be a positive number")


class StageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """New weights of the sources from some point of the run on."""

    after: int
    """Rows drawn in the whole run, over all streams, before the weights hold; at least 1."""
    weights: tuple[float, ...]
    """One weight for each source, in the order of `sources`; 0 or more, not all 0. A source of
    weight 0 is drawn last."""

    def __post_init__(self) -> None:
        if self.after < 1:
            raise ValueError(
                f"after = {self.after} must be at least 1; give the weights of the run's beginning in the sources"
            )
        if not all(0 <= weight < float("inf") for weight in self.weights) or not any(self.weights):
            raise ValueError(f"weights = {list(self.weights)} must be 0 or more, with at least one above 0")


class TokenizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tokenizer and the chat template."""

    path: str
    """Directory or hub name of a Hugging Face tokenizer."""
    template: str | None = None
    """Jinja chat template: the path of a file, the template's text, or the name of one of the
    tokenizer's templates, "name:tool_use". Default: the tokenizer's only template, or the template
    named "default"."""
    backend: Literal["auto", "huggingface", "fastokens"] = "auto"
    """Implementation that computes token ids. "huggingface": the `tokenizers` library. "fastokens":
    the fastokens library, after a check that both libraries give the same ids. "auto": fastokens if
    the library is installed and passes the check, else `tokenizers`. A resume needs the same
    implementation."""
    date: str | None = None
    """Day (YYYY-MM-DD) that the template prints as today's date. Default: the day on which the
    stream first starts. A resume keeps the day."""


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The trained parts of a conversation, and the treatment of long conversations."""

    train_on: tuple[Literal["assistant", "user", "system", "tool", "all"], ...] = ("assistant",)
    """Roles whose messages are trained; at least one, "all" for every role. A message excluded by a
    mark in the data (`train: false`, `weight: 0`, `loss: false`, `masked: true`, ...) is never
    trained."""
    train_turns: Literal["all", "last"] = "all"
    """Trained messages among the messages of `train_on`: "all", or only the "last"."""
    train_reasoning: bool = True
    """true: train the reasoning of trained messages. false: train only their text and calls."""
    train_tool_calls: bool = True
    """true: train the tool calls of trained messages. false: train only their text and
    reasoning."""
    history: Literal["as_rendered", "per_turn", "error"] = "as_rendered"
    """Treatment of conversations for which the template prints an earlier turn differently from the
    time of the turn's own generation (for example without the reasoning). "as_rendered": train the
    text as printed. "per_turn": make one example for each trained turn, with the text as at
    inference. "error": refuse the conversation."""
    overflow: Literal["drop", "truncate", "split"] = "drop"
    """Treatment of conversations longer than `capacity`. "drop": refuse the conversation.
    "truncate": cut after the last answer that fits. "split": make several examples, cut before a
    user message; each example repeats the system prompt."""
    capacity: int = 8192
    """Tokens of a pack; at least 1."""

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"capacity = {self.capacity} must be at least 1")
        if not self.train_on:
            raise ValueError('train_on is empty, so nothing would be trained; name a role: ["assistant"]')


class DataConfig(Policy, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that determines the packs of a run, on any number of ranks and workers."""

    sources: tuple[SourceConfig, ...]
    """Sources of conversations; at least one."""
    tokenizer: TokenizerConfig
    """The tokenizer and the chat template."""
    streams: int | Literal["auto"] = "auto"
    """Logical streams, each with a fixed part of every epoch's rows; at least 1, fixed for a run.
    "auto": chosen when the run first starts, from the number of rows, a sample of their lengths,
    `capacity`, `window` and the number of data-parallel shards: 1 to 64 times the shards' number,
    few for little data, since each stream ends with a partly filled pack. A resume keeps the
    number. Any number of shards up to `streams` can read the streams, with any number of workers.
    If shards divides `streams` and `global_batch`, all shards have the same number of packs in each
    step; otherwise some shards run empty packs."""
    global_batch: int = 64
    """Packs of an optimizer step, over all shards; at least 1."""
    shuffle: Shuffle = True
    """true: a new order of all rows each epoch, drawn from `seed`. "shards": a new order of
    files or shards each epoch, rows in stored order inside each; the shuffle for streamed
    sources. false: the stored order."""
    window: int = 256
    """Conversations that a stream plans into packs at a time; at least 1. A larger window fills
    packs better and reorders conversations more."""
    workers: int = 1
    """Loader processes of a data-parallel shard; 0 loads in the training process. Does not affect
    the packs."""
    prefetch: int = 16
    """Packs that each worker keeps ready; at least 1. Does not affect the packs. A worker reads a
    whole window before the window's first pack, so with more packs ready than a window yields no
    worker waits for another worker's read."""
    seed: int = 0
    """Key of the order of rows."""
    epochs: int | None = None
    """Passes over all conversations; at least 1. Default: the stream never ends."""
    mix_by: Literal["conversations", "tokens", "trained_tokens"] = "conversations"
    """Unit of the sources' weights: weight 2 beside weight 1 gives two thirds of the conversations,
    of the tokens, or of the trained tokens."""
    stages: tuple[StageConfig, ...] = ()
    """Changes of weights during the run, by rising `after`. Needs weights of all sources.
    Default: no changes."""
    ends_with: Literal["all", "first"] = "all"
    """End of a run with weights and `epochs`: the exhaustion of "all" sources, or of the "first"
    source to be exhausted. Applies to each logical stream."""
    accept_changed: tuple[str, ...] = ()
    """Differences from the checkpoint's data and settings that a resume accepts, by name:
    "data.sources[2]", "data.capacity". The state records each accepted difference. Default: a
    resume stops at any difference."""
    max_refused: float = 1.0
    """Largest share of refused rows, from 0 to 1. A run above the share stops, after at least 100
    rows. Default: never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.max_refused <= 1:
            raise ValueError(f"max_refused = {self.max_refused} must be a share from 0 to 1")
        for field in ("streams", "global_batch", "window", "prefetch"):
            if (value := getattr(self, field)) != "auto" and value < 1:
                raise ValueError(f"{field} = {value} must be at least 1")
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
                f"source {missing!r} has no weight but another source has; give weights to all sources or to none"
            )
        for source in self.sources:
            if source.streaming:
                self._check_streaming(source)
        if self.epochs is None and any(source.repeat != 1 for source in self.sources):
            raise ValueError("repeat needs data.epochs; set data.epochs, or mix an endless stream by weights")
        if self.stages and not all(weighted):
            raise ValueError("stages change weights; give each source a weight for the beginning of the run")
        for before, stage in itertools.pairwise((None, *self.stages)):
            if stage is not None and len(stage.weights) != len(self.sources):
                raise ValueError(
                    f"a stage has {len(stage.weights)} weights for {len(self.sources)} sources; give one for each"
                )
            if before is not None and stage is not None and stage.after <= before.after:
                raise ValueError(
                    f"stage after = {stage.after} follows {before.after}; order the stages by rising after"
                )

    def _check_streaming(self, source: SourceConfig) -> None:
        if self.shuffle_of(source) is True:
            raise ValueError(
                f"source {source.path!r} is streamed, so its rows cannot be shuffled; "
                'set shuffle = "shards" to shuffle its shards, or false'
            )
        if len(self.sources) > 1 and source.weight is None:
            raise ValueError(f"source {source.path!r} is streamed, so its size is unknown; give weights to all sources")

    @property
    def stream_count(self) -> int:
        """`streams` as a number; a loader replaces "auto" by a number."""
        assert self.streams != "auto", 'streams = "auto" has no number before a loader is open'
        return self.streams

    def shuffle_of(self, source: SourceConfig) -> Shuffle:
        """Return the shuffling of a source: the source's own value, or else `shuffle`."""
        return self.shuffle if source.shuffle is None else source.shuffle
