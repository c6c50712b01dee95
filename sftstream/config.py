"""Define the `[data]` table of a run's config: sources, tokenizer, policy, packing, order."""

from __future__ import annotations

import itertools
from typing import Any, Literal, get_args

import msgspec

from sftstream.records import Role

Shuffle = bool | Literal["shards"]
"""true: all rows in a new order each epoch; "shards": files in a new order, with the rows of a file
in stored order; false: all rows in stored order."""


MOST_STEPS = 10**12
"""Limit of steps, epochs, intervals and numbers of checkpoints."""
MOST = {
    "max_row_bytes": 2**30,
    "repeat": 10**6,
    "weight": 10**15,
    "after": 10**15,
    "capacity": 2**24,
    "streams": 2**16,
    "global_batch": 2**17,
    "window": 2**17,
    "workers": 2**10,
    "prefetch": 2**12,
    "seed": 2**63 - 1,
    "epochs": MOST_STEPS,
}
"""Largest value of each number in the `[data]` table, far above any use: a larger number is a slip
that would fill the memory or take hours before the first pack."""


def _require_at_most(config: msgspec.Struct) -> None:
    for field in config.__struct_fields__:
        value = getattr(config, field)
        if isinstance(value, int | float) and field in MOST and value > MOST[field]:
            raise ValueError(f"{field} = {value} must be at most {MOST[field]}")


NamedRole = Role | Literal["tool_call"]
"""A role in the setting `roles`; "tool_call" is an assistant's whose content is a tool call."""
ROLE_NAMES: dict[str, NamedRole] = {name: name for name in (*get_args(Role), "tool_call")}


class RowSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings for reading the rows of a source: columns, ignored columns, names of roles."""

    columns: dict[str, str] | None = None
    """Names of the columns, for files whose layout is not recognised: name in a known layout ->
    name in the files. `{instruction = "q", output = "a"}` reads column `q` as the instruction and
    column `a` as the output. All other columns are ignored. Default: the names in the files are
    used."""
    ignore: tuple[str, ...] = ()
    """Columns, and keys of messages, to ignore on purpose. Columns such as `context` and
    `functions` often contain a part of the conversation, so a row is refused if such a column has a
    value but the row's layout does not read it. `ignore = ["context"]` trains the row without the
    column; `ignore = ["messages[].thoughts"]` trains the messages without their key `thoughts`.
    Default: none."""
    roles: dict[str, NamedRole] | None = None
    """Additional names of roles: name in the files -> "system", "user", "assistant", "tool", or
    "tool_call" for messages of the assistant whose content is a tool call. `{narrator = "user"}`
    treats messages of `narrator` as messages of the user. Default: none."""
    max_row_bytes: int = 16 << 20
    """Largest size of a row in bytes; 1 to 2**30. A larger row is refused before it is parsed or
    rendered, because such a row can take minutes and gigabytes of memory. For a row of a table, the
    size is the sum over its texts."""

    verified: bool = True
    """true: read only rows of which the trained words can be proved, which are rows with turns.
    false: also train rows of plain `text`, and rows of `input_ids` with `labels` or a mask, as they
    are. The state counts these rows as unverified."""

    def __post_init__(self) -> None:
        if self.columns is not None and not self.columns:
            raise ValueError(
                "columns is empty, so no column would be read; name at least one column, or leave columns out"
            )
        if self.max_row_bytes < 1:
            raise ValueError(f"max_row_bytes = {self.max_row_bytes} must be at least 1")
        _require_at_most(self)
        if both := sorted({*self.ignore} & {*(self.columns or ()), *(self.columns or {}).values()}):
            raise ValueError(f"columns and ignore both name {both[0]!r}; remove the name from one of the two")


class SourceConfig(RowSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One source of conversations."""

    path: str
    """Location of the source. A local path is tried first: a file (.jsonl, .ndjson, .json, .csv,
    .tsv, .parquet, .arrow, each also compressed as .gz, .zst, .bz2 or .xz), a glob or a directory
    (its files in sorted order), a dataset written by `save_to_disk`, or a directory with the layout
    of a Hugging Face hub dataset. If content and suffix of a file disagree, the content decides. If
    no local path matches: a remote path with a scheme (hf://, s3://, gs://, https://, ...), which
    is downloaded once into the cache, or the name of a hub dataset, `organisation/name`."""
    split: str | None = None
    """Split of a hub dataset, of a directory with the layout of a hub dataset, or of a dataset
    written by `save_to_disk`, in the syntax of `datasets`: "train", "train[:10%]", "train+test".
    Default: the only split."""
    subset: str | None = None
    """Subset (configuration name) of a hub dataset, or of a directory with the layout of a hub
    dataset. Default: the only subset, or the subset that `datasets` loads by default."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset. Default: the main branch."""
    weight: float | None = None
    """Weight of this source in the mixture; a positive number. Weight 2 beside weight 1 makes two
    thirds of the data, in the unit `data.mix_by`. Set weights for all sources or for none. Default:
    each source is drawn in proportion to its size, so that all sources end an epoch together."""
    repeat: float = 1.0
    """Number of passes over this source in one epoch; a positive number. With 0.5, one epoch trains
    half of the rows and the next epoch the other half. For a streamed source, 0.5 is half of the
    files instead of half of the rows. A value other than 1 needs `data.epochs`."""
    shuffle: Shuffle | None = None
    """Shuffling of this source: true, "shards" or false, as in `data.shuffle`. Default: the value
    of `data.shuffle`."""
    streaming: bool = False
    """true: read each file from its beginning to its end, without downloading or indexing it; for
    sources that are too large for the local disk. Rows keep their order inside a file, so `shuffle`
    must be "shards" or false. A resume reads each file that a stream has begun again, up to the
    saved position. If there are other sources, a streamed source needs a weight. false: download
    remote files, index all files, and read rows in any order."""
    digest: Literal["sampled", "full"] = "sampled"
    """Bytes of a file above 256 MiB that are read before the first pack, for the digest that a
    resume compares. "sampled": 128 evenly spread slices of 1 MiB; a thread reads the whole file
    beside the training, and later states hold the digest of every byte. "full": every byte, which
    takes 1 s per GB. Of smaller files, every byte is read."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; name a file, a glob, a directory or a dataset")
        super().__post_init__()
        for field in ("weight", "repeat"):
            value = getattr(self, field)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{field} = {value} must be a positive number")


class StageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mixture stage: new weights of the sources from some point of the run on."""

    after: int
    """Number of rows drawn in the whole run, over all streams, after which the weights take effect;
    at least 1."""
    weights: tuple[float, ...]
    """One weight for each source, in the order of `sources`; 0 or more, not all 0. A source with
    weight 0 is drawn only after all other sources are exhausted."""

    def __post_init__(self) -> None:
        if self.after < 1:
            raise ValueError(
                f"after = {self.after} must be at least 1; give the weights of the run's beginning in the sources"
            )
        _require_at_most(self)
        if not all(0 <= weight <= MOST["weight"] for weight in self.weights) or not any(self.weights):
            raise ValueError(
                f"weights = {list(self.weights)} must lie between 0 and {MOST['weight']}, with at least one above 0"
            )


class TokenizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tokenizer and the chat template."""

    path: str
    """Directory or hub name of a Hugging Face tokenizer."""
    template: str | None = None
    """Jinja chat template: the path of a file, the template's text, or the name of one of the
    tokenizer's templates, "name:tool_use". Default: the tokenizer's only template, or the template
    named "default"."""
    backend: Literal["auto", "huggingface", "fastokens"] = "auto"
    """Library that computes token ids. "huggingface": `tokenizers`. "fastokens": fastokens, after a
    check that both libraries compute the same ids. "auto": fastokens if it is installed and passes
    the check, else `tokenizers`. A resume needs the same library."""
    date: str | None = None
    """Day (YYYY-MM-DD) that the template prints as today's date. Default: the day of the run's
    first start, which a resume keeps."""
    variables: dict[str, Any] = {}
    """Further variables of the template: name -> text, number, true, false, list or table.
    `{enable_thinking = false}` is for Qwen3 what `chat_template_kwargs` is in an inference server.
    A row's column `chat_template_kwargs` overrides single variables for the row. Names that every
    render sets are refused: `messages`, `tools`, `add_generation_prompt`, `bos_token`, ... Default:
    no further variables."""


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings that decide which parts of a conversation are trained, and how long conversations
    are treated."""

    train_on: tuple[Literal["assistant", "user", "system", "tool", "all"], ...] = ("assistant",)
    """Roles whose messages are trained; at least one, "all" for every role. A message that the data
    excludes (`train: false`, `weight: 0`, `loss: false`, `masked: true`, ...) is never trained."""
    train_turns: Literal["all", "last"] = "all"
    """"all": train all messages of the roles in `train_on`. "last": train only the last of these
    messages in each conversation."""
    train_reasoning: bool = True
    """true: train the reasoning of trained messages. false: train only their text and calls."""
    train_tool_calls: bool = True
    """true: train the tool calls of trained messages. false: train only their text and
    reasoning."""
    history: Literal["as_rendered", "per_turn", "error"] = "as_rendered"
    """Treatment of a conversation if the template prints an earlier turn differently than the model
    generated it, for example without its reasoning. "as_rendered": train the text that the template
    prints for the whole conversation. "per_turn": make one example for each trained turn, ending
    with this turn as the model generates it. "error": refuse the conversation."""
    overflow: Literal["drop", "truncate", "split"] = "drop"
    """Treatment of a conversation that is longer than `capacity`. "drop": refuse the conversation.
    "truncate": cut it after the last answer that fits. "split": cut it before user messages into
    several examples; each example repeats the system prompt."""
    capacity: int = 8192
    """Number of tokens in a pack, padding included; 1 to 2**24."""

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"capacity = {self.capacity} must be at least 1")
        _require_at_most(self)
        if not self.train_on:
            raise ValueError('train_on is empty, so nothing would be trained; name a role: ["assistant"]')

    @property
    def in_parts(self) -> bool:
        """True if a row may make several examples, its parts."""
        return self.overflow == "split" or self.history == "per_turn"


class SkipConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Conversations to leave out of the packs, for example after a loss spike.

    All other conversations keep their places: a pack without a skipped conversation is the pack of
    a run without `skip`, bit for bit.
    """

    rows: tuple[tuple[int, int], ...] = ()
    """Rows to skip in every epoch, each as `[source, row]`, both numbers counted from 0 as in the
    ledger. Default: none."""
    steps: tuple[tuple[int, int], ...] = ()
    """Spans of steps to skip, each as `[first, last]`, counted from 1. A skipped step has empty
    packs and changes no weight. Default: none."""

    def __post_init__(self) -> None:
        for source, row in self.rows:
            if source < 0 or row < 0:
                raise ValueError(f"rows holds [{source}, {row}]; give numbers of sources and rows, counted from 0")
        for first, last in self.steps:
            if not 1 <= first <= last <= MOST_STEPS:
                raise ValueError(
                    f"steps holds [{first}, {last}]; give the first and the last step, counted from 1, at most {MOST_STEPS}"
                )


class DataConfig(Policy, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[data]` table. It decides the packs of a run, on any number of ranks and workers."""

    sources: tuple[SourceConfig, ...]
    """Sources of conversations; at least one."""
    tokenizer: TokenizerConfig
    """The tokenizer and the chat template."""
    streams: int | Literal["auto"] = "auto"
    """Number of logical streams: queues of packs, each made from a fixed subset of every epoch's
    rows; 1 to 2**16, fixed for a run. Each data-parallel shard reads some of the streams, so there
    must be at least as many streams as shards. If the number of shards divides `streams` and
    `global_batch`, all shards have the same number of packs in each step; otherwise some shards run
    empty packs. "auto": chosen at the first start of the run, from the number of rows, the lengths
    of a sample, `capacity`, `window` and the number of shards. The result is a multiple of the
    number of shards: few streams for little data, because each stream ends with a partly filled
    pack, and up to 64 for much data. A resume keeps the number on any number of shards."""
    global_batch: int = 64
    """Number of packs in an optimizer step, over all shards; 1 to 2**17."""
    shuffle: Shuffle = True
    """true: a new order of all rows in each epoch, drawn from `seed`. "shards": a new order of the
    files in each epoch, with the rows of a file in stored order; for streamed sources. false: the
    stored order."""
    window: int = 256
    """Number of examples that a stream reads together and divides into packs; 1 to 2**17. A larger
    window fills packs better, but moves conversations further from their place in the order."""
    workers: int = 1
    """Number of loader processes of a data-parallel shard; 0 loads in the training process. Does
    not affect the packs."""
    prefetch: int = 16
    """Number of packs that each worker keeps ready; 1 to 2**12. Does not affect the packs. A worker
    reads a whole window before it returns the first pack of the window. Training does not wait
    during this read if more packs are ready than a window has."""
    seed: int = 0
    """Seed of the order of rows and packs."""
    epochs: int | None = None
    """Passes over all conversations; 1 to 10**12. Default: the stream never ends."""
    mix_by: Literal["conversations", "tokens", "trained_tokens"] = "conversations"
    """Unit of the sources' weights. A source with weight 2 beside a source with weight 1 provides
    two thirds of the conversations, of the tokens, or of the trained tokens."""
    stages: tuple[StageConfig, ...] = ()
    """Mixture stages: changes of the weights during the run, in the order of `after`. All sources
    need a weight. Default: no changes."""
    ends_with: Literal["all", "first"] = "all"
    """End of a logical stream with weights and `epochs`. "all": the stream ends when all its
    sources are exhausted. "first": it ends when its first source is exhausted."""
    skip: SkipConfig = SkipConfig()
    """Rows and steps that are left out of the packs."""
    accept_changed: tuple[str, ...] = ()
    """Names of differences from the checkpoint that a resume accepts, for example
    "data.sources[2]" or "data.capacity". The state records each accepted difference. Default: a
    resume stops at any difference."""
    max_refused: float = 0.1
    """Largest share of a source's rows that may be refused for other reasons than their length,
    from 0 to 1. Judged for each source over all shards at the end of a step, from 100 rows of the
    source on; a run above the share stops. Before the whole source was read, three standard
    deviations are added for chance. 1 never stops."""
    max_too_long: float = 0.5
    """Largest share of a source's rows that may be refused for their length (longer than `capacity`
    or `max_row_bytes`), from 0 to 1. Judged like `max_refused`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("max_refused", "max_too_long"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} = {getattr(self, field)} must be a share from 0 to 1")
        for field in ("streams", "global_batch", "window", "prefetch"):
            if (value := getattr(self, field)) != "auto" and value < 1:
                raise ValueError(f"{field} = {value} must be at least 1")
        if self.workers < 0:
            raise ValueError(f"workers = {self.workers} must be 0 (load in the training process) or more")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs = {self.epochs} must be at least 1; leave it out for an endless stream")
        self._check_sources()
        for source, row in self.skip.rows:
            if source >= len(self.sources):
                raise ValueError(
                    f"skip.rows holds [{source}, {row}], but there are {len(self.sources)} sources, counted from 0"
                )

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
        """Return `source.shuffle`, or `self.shuffle` if the source has no value of its own."""
        return self.shuffle if source.shuffle is None else source.shuffle
