"""The tables of a run's TOML file, with their defaults and checks."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

import msgspec

from checkpoints import Retention
from sftstream import MOST_STEPS, DataConfig, SkipConfig, SourceConfig
from trainer.distributed.mesh import ParallelConfig
from trainer.duration import parse_duration
from trainer.llama.attention import KernelName
from trainer.llama.blocks import Recompute
from trainer.llama.config import LlamaConfig
from trainer.llama.lora.layers import LoraConfig
from trainer.track.config import TrackerConfig
from trainer.training.accepted import require_acceptable
from trainer.training.optimizer import OptimizerConfig
from trainer.training.schedule import ScheduleConfig

SCORER = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""A module and a function in it."""
MOST_NEW_TOKENS = 2**20
"""Limit of the tokens of an answer."""


def _require_at_most_steps(field: str, value: int | None) -> None:
    if value is not None and value > MOST_STEPS:
        raise ValueError(f"{field} = {value} must be at most {MOST_STEPS}")


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[run]` table: the run's name, length, device and number formats."""

    name: str = "run"
    """Directory name under `runs/` for all output. A run whose name was used before resumes from
    the newest checkpoint of `runs/<name>`."""
    seed: int = 0
    """Seed of a new model's weights and of the order of the data; any signed 64-bit integer. A
    resume needs the seed of the checkpoint."""
    root: str = "runs"
    """Directory of the directories of runs; `~` is the home directory."""
    steps: int | None = None
    """Optimizer steps at which the run ends, 1 or more. Give `steps`, `epochs` or both; with both,
    the run ends at the earlier end. A finished run with raised `steps` resumes, unless its schedule
    decays to the last step."""
    epochs: int | None = None
    """Passes over all conversations after which the run ends, 1 or more. Give `steps`, `epochs` or
    both. A finished run with raised `epochs` trains on if `data.accept_changed` holds
    "data.epochs": each row once in each new epoch, in packs that may differ from the packs of a
    run begun with more epochs."""
    skip: SkipConfig = SkipConfig()
    """Rows and steps that are left out of the packs. A resume with another `skip` than the
    checkpoint's needs `data.accept_changed = ["data.skip"]`."""
    stop_after: str | None = None
    """Time after which the run saves and stops, as a signal would make it, such as "3h50m" or
    "90s". Default: none."""
    accept_changed: tuple[str, ...] = ()
    """Settings that a resume may change: "optimizer", "schedule", a single key of the two tables
    such as "optimizer.learning_rate", or "run.attention". The checkpoints keep a record of every
    accepted change."""
    deterministic: bool = True
    """Use deterministic kernels only, so that equal runs give equal bits; an operation without a
    deterministic kernel is an error. False is faster, and two runs agree only up to rounding."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model. "auto" is a GPU if torch sees one, else the CPU."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the layers' computation. "auto" is bfloat16 on a GPU and float32 on a CPU.
    On a GPU only the attention kernel "sdpa" computes in float32."""
    weights_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of stored weights, gradients and optimizer state. bfloat16 halves their memory,
    but loses every update smaller than 1/256 of the weight. "auto" is float32, and on a GPU whose
    memory float32 exceeds under every `recompute`, bfloat16. With `[lora]` the format of the frozen
    weights only, and "auto" is the format of the computation; trained weights are float32."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the exported weights."""
    recompute: Literal["auto"] | Recompute = "auto"
    """Activations that the backward pass computes again to save memory: "none", "selective" (inside
    the feed-forward layers), or "full" (all but each layer's input). Changes no bit of layers that
    are not compiled; compiled layers round differently for each value. "auto" is the first of these
    that fits the memory of the GPU, and "none" on a CPU; for compiled layers of a resumed run, the
    checkpoint's value or the next that fits."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the layers with torch.compile: up to a minute at the first start, then faster steps.
    Rounds differently from uncompiled layers, so that a resume needs the value of the checkpoint.
    "auto" is true on a GPU and false on a CPU."""
    attention: Literal["auto"] | KernelName = "auto"
    """Attention kernel. "auto" is the fastest that is installed and passes a test at the start:
    "fa4", "fa3" and "fa2" (FlashAttention 4, 3 and 2), "torch" (in torch), "sdpa" (slow, any number
    format). Kernels round differently, so that a resume uses the kernel of the checkpoint."""
    float8: bool = False
    """Multiply the matrices of the layers in float8, with a scale for each tensor. Faster for wide
    layers, at a precision of 4 bits and fewer; embedding, attention, head and optimizer stay as
    they are. Needs an H100, L40S or later. A resume needs the value of the checkpoint."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Reaction to a step whose loss or gradient is not a finite number: "stop" the run without a
    checkpoint, or "skip" the update, leave weights and optimizer to the bit as they are, and go on
    with the next step. Both name the conversations and the parameters. A skip is recorded in
    `events.jsonl`, `metrics.jsonl` and the ledger, and counts as a step of the schedule; after
    10 skips in a row the run stops. "skip" waits for the GPU before every update."""
    profile: tuple[int, int] | None = None
    """First and last step of a profiler trace of rank 0, such as [20, 22], written to
    `runs/<name>/trace.json.gz` for https://ui.perfetto.dev. Default: none."""
    report_seconds: int = 60
    """Seconds between two updates of the page `runs/<name>/report.html`, 1 or more; 0 writes no
    page. The page is also updated at checkpoints and at the end. Updates take at most 0.2 % of the
    time of the training."""

    def __post_init__(self) -> None:
        if self.report_seconds < 0:
            raise ValueError(f"report_seconds = {self.report_seconds} must be 1 or more, or 0 for no report")
        _require_at_most_steps("report_seconds", self.report_seconds)
        if self.steps is None and self.epochs is None:
            raise ValueError("neither steps nor epochs is given, so the run would never end; give one or both")
        for field in ("steps", "epochs"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"{field} = {value} must be at least 1")
            _require_at_most_steps(field, value)
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed} must fit 64 bits: from -2**63 to 2**63 - 1")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile = {list(self.profile)} must be a first and a last step, counted from 1")
        self._require_places()
        _ = self.stop_seconds
        require_acceptable(self.accept_changed)

    def _require_places(self) -> None:
        if Path(self.name).name != self.name or self.name in ("", ".", "..") or not self.name.isprintable():
            raise ValueError(f"name = {self.name!r} must be a plain directory name under runs/")

        if not self.root or not self.root.isprintable():
            raise ValueError(f'root = {self.root!r} is no directory; name the directory of all runs, such as "runs"')
        _ = self.directory

    @property
    def directory(self) -> Path:
        """Directory of the run's output; a relative path starts at the working directory."""
        return _expanded(self.root) / self.name

    @property
    def stop_seconds(self) -> float:
        """Seconds of `stop_after`, or infinity. Raises ValueError for a text of another form."""
        return math.inf if self.stop_after is None else parse_duration("stop_after", self.stop_after)

    @property
    def export_directory(self) -> Path:
        """Directory of the finished model, in the Hugging Face layout."""
        return self.directory / "export"

    @property
    def adapter_directory(self) -> Path:
        """Directory of the finished adapter, in the layout of `peft`."""
        return self.directory / "adapter"


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[model]` table: a Hugging Face model to start from, or the shape of a new Llama."""

    init_from: str | None = None
    """Hugging Face directory or hub name of a Llama, Mistral, Qwen2 or Qwen3 model to start from.
    With `[lora]` also that of a PEFT adapter to train on, which names its model. Give either
    `init_from` or the shape."""
    shape: LlamaConfig | None = None
    """Shape of a new model. In the TOML file the keys of the shape stand directly in `[model]`."""

    resize_vocabulary: bool = False
    """Add rows to the embedding and the head of `init_from` if the tokenizer has more ids than the
    model, up to a multiple of 64 that tensor parallelism can split. Each new row is the mean of the
    model's rows. The checkpoints record the number of rows before. False: more ids are an error."""

    def __post_init__(self) -> None:
        if (self.init_from is None) == (self.shape is None):
            raise ValueError("give either init_from (a Hugging Face directory or hub name) or the shape of a new model")
        if self.resize_vocabulary and self.init_from is None:
            raise ValueError(
                "resize_vocabulary changes the model of init_from, and a new model has any size; set vocab_size instead"
            )


class CheckpointConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[checkpoint]` table: the time, the place and the number of checkpoints."""

    root: str | None = None
    """Directory, or fsspec URL such as `s3://bucket/my-run`, for the checkpoints of this run alone.
    Default: `runs/<name>/checkpoints`. `~` is the home directory."""
    every: int = 100
    """Steps between checkpoints, 1 or more. The last step of a run is always saved."""
    keep: int = Retention.keep
    """Number of newest checkpoints to keep, 1 or more; older checkpoints are deleted after each
    save."""
    keep_every: int | None = Retention.keep_every
    """Keep, beside the newest, every checkpoint at a multiple of `keep_every` steps, 1 or more.
    Default: none."""
    keep_best: int | None = Retention.keep_best
    """Keep, beside the newest, this number of checkpoints with the lowest validation loss, 1 or
    more; needs a `[validation]` table. Default: none."""
    fresh_start: bool = False
    """Start from step 0 if all checkpoints are damaged; the damaged checkpoints are kept under
    other names. False stops with an error instead. Without effect if a checkpoint is whole: the run
    resumes from it."""
    background: bool = True
    """Copy each checkpoint to host memory and write it during the next steps. The last checkpoint
    of a run is written before the run ends. False waits for every write, and needs no host memory
    for the copy."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """Reaction to a checkpoint that cannot be written: "stop" the run, or "continue" with a message
    and try again at the next checkpoint. A failure after the last step always stops."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every = {self.every} must be at least 1")
        for field in ("every", "keep", "keep_every", "keep_best"):
            _require_at_most_steps(field, getattr(self, field))
        if self.root is not None and not (self.root and self.root.isprintable()):
            raise ValueError(f"root = {self.root!r} is no directory; name a directory or URL, or leave root out")
        _ = self.retention, self.place

    @property
    def place(self) -> str | None:
        """`root` with `~` replaced by the home of a user. Raises ValueError for an unknown user."""
        return self.root if self.root is None or "://" in self.root else str(_expanded(self.root))

    @property
    def retention(self) -> Retention:
        """The steps to keep. Raises ValueError if a limit is below 1."""
        return Retention(self.keep, self.keep_every, self.keep_best)


class ValidationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[validation]` table: held-out conversations, and the steps of their validation."""

    sources: tuple[SourceConfig, ...]
    """Held-out sources, in the format of `data.sources`, read once, in order, with the
    template, mask and packing of `[data]`, so that every validation sees equal packs."""
    every: int = 100
    """Steps between validations, 1 or more."""
    global_batches: int | None = None
    """Number of global batches (`data.global_batch` packs each) to validate on, 1 or more. Default:
    all packs of the sources. The packs stay in memory, at 24 bytes per token."""
    best_by: Literal["all", "answers"] | int = "all"
    """Number that `checkpoint.keep_best` and `patience` compare: the mean loss over "all" held-out
    trained tokens, or over those of one source, given by its index in `sources`, counted from 0; or
    1 minus the mean score of the "answers", which needs `evaluation.every`. The score of an answer
    is that of `evaluation.scorer`, else 1 for an exact answer and 0 for another."""
    patience: int | None = None
    """Validations in a row without a new lowest number after which the run ends early, 1 or more;
    with `best_by = "answers"` evaluations in a row. The run is then complete: saved, exported and
    evaluated. A resume with a larger `patience` trains on. Default: no early end."""
    min_improvement: float = 0.0
    """Amount by which a number must be below the lowest to count as a new lowest for `patience`, 0
    or more; in nats for a loss."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name at least one [[validation.sources]] with a path")
        if isinstance(self.best_by, int) and not 0 <= self.best_by < len(self.sources):
            raise ValueError(
                f'best_by = {self.best_by} must be "all" or the index of a held-out source, from 0 to {len(self.sources) - 1}, '
                'or "answers"'
            )
        if not 0 <= self.min_improvement < math.inf:
            raise ValueError(f"min_improvement = {self.min_improvement} must be finite and not negative")
        for field in ("every", "global_batches", "patience"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"{field} = {value} must be at least 1")
            _require_at_most_steps(field, value)


class EvaluationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[evaluation]` table: questions for the model, with the expected answers.

    The exported model answers each conversation up to its last trained message, greedily. With
    `every` the model also answers during the training.
    """

    path: str
    """File of conversations in any layout that `data.sources` reads; the last trained message of
    each is the answer."""
    show: int = 5
    """Number of answers to print, 0 or more; all answers are written to
    `runs/<name>/answers.jsonl`."""
    max_new_tokens: int = 64
    """Tokens after which an answer is cut off, 1 to 2**20."""
    every: int | None = None
    """Steps between evaluations during the training, 1 or more. All ranks generate together, with
    the model as it is spread over them; each token costs a forward pass over the questions.
    Default: only the exported model answers."""
    scorer: str | None = None
    """Function `module:function` that gets prompt, expected answer and given answer as texts, and
    returns a score, more for a better answer. Needs `--allow-code` on the command line. Default:
    none, answers are compared exactly."""

    def __post_init__(self) -> None:
        if self.show < 0 or self.max_new_tokens < 1:
            raise ValueError(
                f"show = {self.show} must be 0 or more, and max_new_tokens = {self.max_new_tokens} must be 1 or more"
            )
        if self.max_new_tokens > MOST_NEW_TOKENS:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens} must be at most {MOST_NEW_TOKENS}")
        _require_at_most_steps("show", self.show)
        if self.every is not None and self.every < 1:
            raise ValueError(f"every = {self.every} must be at least 1")
        _require_at_most_steps("every", self.every)
        if self.scorer is not None and not SCORER.fullmatch(self.scorer):
            raise ValueError(f"scorer = {self.scorer!r} names no function; write it as module:function")


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All tables of a run's TOML file."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    lora: LoraConfig | None = None
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig | None = None
    evaluation: EvaluationConfig | None = None
    trackers: tuple[TrackerConfig, ...] = ()
    """Trackers that get the numbers of the run, a `[[trackers]]` table for each. Default: none."""

    def __post_init__(self) -> None:
        if len({tracker.target for tracker in self.trackers}) < len(self.trackers):
            raise ValueError(
                "two [[trackers]] tables name the same run of a tracker, which would get each step twice; "
                "remove one of the tables, or give one another project, name or url"
            )
        if self._judges_answers and (self.evaluation is None or self.evaluation.every is None):
            raise ValueError(
                'validation.best_by = "answers" compares the scores of answers during the training; set evaluation.path and '
                'evaluation.every, or best_by = "all"'
            )
        if self.checkpoint.keep_best is not None:
            self._require_judged_checkpoints()
        if self.lora is not None:
            self._require_adaptable(self.lora)
        if self.validation is not None:
            self.held_out(self.validation.sources)  # raises ValueError for sources that cannot be mixed
        if self.schedule.over == "data" and self.run.epochs is None:
            raise ValueError(
                'schedule.over = "data" needs run.epochs, since an endless stream has no end to decay to; set '
                'run.epochs, or schedule.over = "steps"'
            )
        if self.schedule.over == "data" and any(source.streaming for source in self.data.sources):
            raise ValueError(
                'schedule.over = "data" needs the number of conversations, which is unknown for a streamed source; use '
                'schedule.over = "steps" with schedule.steps'
            )
        if self.schedule.decays_to_run_end:
            self.schedule.decay_interval(self.run.steps)  # raises if the length is unknown or too short

    def _require_adaptable(self, lora: LoraConfig) -> None:
        model = self.model
        lora.require_base(model.init_from, resizes=model.resize_vocabulary, evaluates=self.evaluation is not None)
        lora.require_layers(float8=self.run.float8, muon=self.optimizer.kind == "muon")

    @property
    def _judges_answers(self) -> bool:
        return self.validation is not None and self.validation.best_by == "answers"

    @property
    def patience(self) -> int | None:
        """Validations without a new lowest loss that end the run; None without an early end."""
        return self.validation.patience if self.validation else None

    def _require_judged_checkpoints(self) -> None:
        if self.validation is None:
            raise ValueError(
                f"checkpoint.keep_best = {self.checkpoint.keep_best} compares validation losses; add a [validation] table"
            )
        table, saves, judges = "validation", self.checkpoint.every, self.validation.every
        if self._judges_answers and self.evaluation is not None and self.evaluation.every is not None:
            table, judges = "evaluation", self.evaluation.every
        meet = math.lcm(saves, judges)
        if meet > max(saves, judges) or (self.run.steps is not None and meet > self.run.steps):
            raise ValueError(
                f"checkpoint.keep_best needs steps that are both saved and judged, but checkpoint.every = {saves} and "
                f"{table}.every = {judges} first meet at step {meet}; make one a multiple of the other, and both at "
                "most run.steps"
            )

    def held_out(self, sources: tuple[SourceConfig, ...]) -> DataConfig:
        """Return the data config of one unshuffled pass over held-out `sources`.

        Other settings are those of training, without limits on refused rows.

        Raises ValueError if the sources cannot be mixed.
        """
        return msgspec.structs.replace(
            self.data,
            sources=sources,
            shuffle=False,
            epochs=1,
            stages=(),
            ends_with="all",
            skip=SkipConfig(),
            accept_changed=(),
            max_refused=1.0,
            max_too_long=1.0,
        )


def _expanded(root: str) -> Path:
    try:
        return Path(root).expanduser()
    except RuntimeError:
        raise ValueError(f"root = {root!r} names the home of an unknown user; write the whole path") from None
