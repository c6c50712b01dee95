"""A run in one TOML file: typed, checked once, with `section.key=value` overrides."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from sftstream import DataConfig, SourceConfig
from trainer.distributed.mesh import ParallelConfig
from trainer.llama.blocks import Recompute
from trainer.llama.model import LlamaConfig
from trainer.training.optimizer import OptimizerConfig, ScheduleConfig


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the run is called and when it ends."""

    name: str = "run"
    """Output goes to `runs/<name>`; the same name goes on where it was."""
    seed: int = 0
    """Keys the weights of a new model and the order of the data."""
    steps: int | None = None
    """Optimizer steps after which the run ends; may be raised later."""
    epochs: int | None = None
    """Or passes over all conversations."""
    deterministic: bool = True
    """Only kernels that give the same bits each time; what has none is an error."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What layers compute in. auto: bfloat16 on a GPU, float32 on a CPU."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """What weights, gradients and optimizer are kept in. bfloat16 takes half the memory, and an update of less than a 256th
    of a weight is lost."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the finished model's weights are stored in."""
    recompute: Recompute = "none"
    """Activations that the backward pass computes again: none, those inside the feed-forward, all but a layer's input."""
    compile: bool = False
    """Compile the layers: minutes at the start, faster steps; rounds otherwise."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs: one of them ends the run")
        for field in ("steps", "epochs"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"{field} = {value} must be at least 1")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed} must fit 64 bits: from -2**63 to 2**63 - 1")
        if Path(self.name).name != self.name or self.name in ("", ".", ".."):
            raise ValueError(f"name = {self.name!r} must be a plain directory name under runs/")

    @property
    def directory(self) -> Path:
        """Where everything of this run goes."""
        return Path("runs") / self.name

    @property
    def export_directory(self) -> Path:
        """Directory of the finished model, in the Hugging Face layout."""
        return self.directory / "export"


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Hugging Face directory or hub name to start from, or the shape of a new Llama."""

    init_from: str | None = None
    shape: LlamaConfig | None = None

    def __post_init__(self) -> None:
        if (self.init_from is None) == (self.shape is None):
            raise ValueError("give either init_from (a Hugging Face directory or hub name) or the shape of a new model")


class CheckpointConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When to save, where, and how much to keep."""

    root: str | None = None
    """A directory, or a URL such as `s3://bucket/my-run`, of this run alone; by default `runs/<name>/checkpoints`."""
    every: int = 100
    """Steps between checkpoints; the end of a run is saved as well."""
    keep: int = 3
    """Newest checkpoints that stay."""
    keep_every: int | None = None
    """Those of steps that are multiples of it stay as well."""
    keep_best: int | None = None
    """As many of those with the lowest validation loss stay as well."""
    fresh_start: bool = False
    """Begin anew where all checkpoints are damaged, and leave them aside. Where any is whole the run goes on from it."""
    background: bool = True
    """Write while the next steps are taken, from a copy in host memory; the last checkpoint of a run is waited for."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """continue: say what went wrong and try again at the next checkpoint, except after the last step."""

    def __post_init__(self) -> None:
        for field in ("every", "keep", "keep_every", "keep_best"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"{field} = {value} must be at least 1")


class ValidationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Conversations that are not trained on; their loss is taken in the course of the run."""

    sources: tuple[SourceConfig, ...]
    """As data.sources; template, masks and packing are those of `[data]`. One pass, in order, each time the same packs."""
    every: int = 100
    """Steps between."""
    global_batches: int | None = None
    """Of data.global_batch packs, the first so many; by default all of a pass. They stay in memory, 24 bytes a token."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name at least one [[validation.sources]] with a path")
        for field in ("every", "global_batches"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"{field} = {value} must be at least 1")


class EvaluationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Questions that the finished model answers; the last message of each conversation is the answer expected."""

    path: str
    """A file of conversations in any known layout."""
    show: int = 5
    """Answers to print."""
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if self.show < 0 or self.max_new_tokens < 1:
            raise ValueError(
                f"show = {self.show} must not be negative and max_new_tokens = {self.max_new_tokens} be at least 1"
            )


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole run."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig | None = None
    evaluation: EvaluationConfig | None = None

    def __post_init__(self) -> None:
        if self.checkpoint.keep_best is not None:
            self._require_judged_checkpoints()
        if self.validation is not None:
            self.held_out(self.validation.sources)  # raises for sources that do not go together
        if self.schedule.over == "data" and self.run.epochs is None:
            raise ValueError(
                'schedule.over = "data" needs run.epochs: an endless stream makes no progress; use "steps"'
            )
        if self.schedule.over == "data" and any(source.streaming for source in self.data.sources):
            raise ValueError(
                'schedule.over = "data" needs the number of conversations, which a streamed source does not tell; use "steps"'
            )
        if self.schedule.decays_to_run_end:
            self.schedule.decay_end(self.run.steps)  # raises if the run's length is not known

    def _require_judged_checkpoints(self) -> None:
        if self.validation is None:
            raise ValueError("checkpoint.keep_best keeps those of the lowest validation loss; add a [validation] table")
        saves, validates = self.checkpoint.every, self.validation.every
        meet = math.lcm(saves, validates)
        if meet > max(saves, validates) or (self.run.steps is not None and meet > self.run.steps):
            raise ValueError(
                f"checkpoint.keep_best needs steps that are validated and saved, but checkpoint.every = {saves} and "
                f"validation.every = {validates} meet at step {meet} only; make one a multiple of the other, within the run"
            )

    def held_out(self, sources: tuple[SourceConfig, ...]) -> DataConfig:
        """One pass over other sources in the order in which they lie, all else as for training."""
        return msgspec.structs.replace(
            self.data, sources=sources, shuffle=False, epochs=1, stages=(), ends_with="all", accept_changed=()
        )


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config in `path` with `section.key=value` overrides; raises ValueError naming the key that is wrong."""
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"config {str(path)!r} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config {str(path)!r} is not TOML: {error}") from None
    for override in overrides:
        _override(table, override)
    return parse_config(table)


def parse_config(table: dict[str, Any]) -> TrainConfig:
    """A config from its TOML tables."""
    for name in ("run", "data", "model"):
        if not isinstance(table.get(name, {}), dict):
            raise ValueError(f"{name} = {table[name]!r} is a value, not a table")
    run, data = table.get("run", {}), table.get("data", {})
    for key in ("seed", "epochs"):
        if key in data:
            raise ValueError(f"data.{key} is set by run.{key} in a training run; move it there")
        if key in run:
            data = {**data, key: run[key]}
    # In the file the shape stands beside init_from.
    model = dict(table.get("model", {}))
    own = {key: model.pop(key) for key in ("init_from",) if key in model}
    if model:
        own["shape"] = model
    try:
        return msgspec.convert({**table, "data": data, "model": own}, TrainConfig)
    except msgspec.ValidationError as error:
        raise ValueError(f"config: {str(error).replace('$.model.shape', '$.model')}") from None


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"{override!r} is no override; write section.key=value")
    *path, last = key.split(".")
    node: Any = table
    for name in path:
        node = node[_number(key, name, node)] if isinstance(node, list) else node.setdefault(name, {})
        if not isinstance(node, dict | list):
            raise ValueError(f"override {key!r}: {name!r} is a value, not a table")
    node[_number(key, last, node) if isinstance(node, list) else last] = _value(text)


def _number(key: str, name: str, array: list[Any]) -> int:
    if not name.isdecimal() or int(name) >= len(array):
        raise ValueError(f"override {key!r}: {name!r} is none of the {len(array)} there are, which are counted from 0")
    return int(name)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string
