"""Records of a report: the lines that are read, and the summary that is drawn."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from trainer.reporting.events import MOST_SOURCES, Count, Time

Step = Annotated[int, Meta(ge=1, le=10**12)]


class StepLine(msgspec.Struct, frozen=True, gc=False):
    """A line of `metrics.jsonl`. Fields may be missing in lines of earlier versions."""

    step: Step
    loss: float | None = None
    validation_loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens: Count = 0
    trained_tokens: Count = 0
    rows: Count = 0
    refused: Count = 0
    refused_by_reason: dict[str, Count] = {}
    fill: float | None = None
    tokens_per_second: float | None = None
    gpu_tokens_per_second: float | None = None
    mfu: float | None = None
    peak_memory: float | None = None
    data_wait: float | None = None
    seconds: float | None = None
    time: Time | None = None
    validation_loss_by_source: Annotated[tuple[float | None, ...], Meta(max_length=MOST_SOURCES)] | None = None
    tokens_by_source: Annotated[tuple[Count, ...], Meta(max_length=MOST_SOURCES)] | None = None


class RefusedRow(msgspec.Struct, frozen=True, gc=False):
    """A line of `refused.jsonl`."""

    place: str
    reason: str
    detail: str = ""


class SessionLine(msgspec.Struct, frozen=True, gc=False):
    """A line of `ledger/sessions.jsonl`, as far as a report shows it."""

    after: Count
    mesh: dict[str, int] = {}
    workers: int = 0
    version: str = ""
    data: dict[str, Any] = {}
    identity: dict[str, Any] = {}
    accepted: tuple[str, ...] = ()


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """A number over the steps, in bins of equally many steps."""

    steps: tuple[int, ...]
    """Last step of each bin."""
    mean: tuple[float | None, ...]
    """Mean of each bin; None for a bin without a value."""
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]


class Best(msgspec.Struct, frozen=True):
    """The lowest validation loss."""

    step: int
    loss: float


class SourceShare(msgspec.Struct, frozen=True, kw_only=True):
    """A source in the mixture."""

    path: str
    weight: float | None
    """Weight in the config; None for a source mixed by its size."""
    tokens: int
    share: float
    """Share of the run's tokens so far, from 0 to 1."""
    curve: tuple[float | None, ...]
    """Share in each bin of the curves."""


class LaunchSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A start of the run's command, until the next start."""

    after: int
    """Last step before the launch."""
    reached: int
    """Last step of the launch; steps after the `after` of the next launch were repeated."""
    lost: int
    """Steps that the next launch repeated."""
    began: float | None
    """Unix time of the start; None if the run's version did not record times."""
    kept: float | None
    """Unix time of the last step that was not repeated; None if no step is lost."""
    ended: float | None
    """Unix time of the end, or of the last step."""
    end: str
    """The way the launch ended: "complete", "stopped on request", "killed", "error: ...", or
    "under way"."""
    mesh: dict[str, int]
    changed: tuple[str, ...]
    """Differences from the launch before: of topology, host, device or versions."""


class CheckpointSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint."""

    step: int
    time: float | None
    """Unix time of the event, or of the commit."""
    seconds: float | None
    """Time that training waited; None if the run's version did not record it."""
    kept: bool | None
    """True if the checkpoint is on disk; None if its place is not a local directory."""


class Refusals(msgspec.Struct, frozen=True, kw_only=True):
    """Rows refused for a reason."""

    reason: str
    rows: int
    examples: tuple[RefusedRow, ...]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a run, read from the files of the run."""

    name: str
    directory: str
    read_at: float
    """Unix time of the reading."""
    status: str
    """State of the run in words."""
    is_under_way: bool
    step: int
    """Finished steps."""
    share: float | None
    """Finished part of the run, from 0 to 1; None if the run's length is not known."""
    rows: int
    tokens: int
    trained_tokens: int
    seconds: float
    """Time in steps, without validation, checkpoints and interruptions."""
    refused: int
    loss: float | None
    """Loss of the last step with a finite loss."""
    steps_without_loss: int
    """Steps without a finite loss."""
    validation_loss: float | None
    best: Best | None
    tokens_per_second: float | None
    """Tokens divided by the time in steps."""
    gpu_tokens_per_second: float | None
    mfu: float | None
    """Mean over the time of the steps that have an MFU."""
    peak_memory: float | None
    fill: float | None
    trained_share: float | None
    data_wait: float | None
    """Share of the time in steps, from 0 to 1."""
    curves: dict[str, Curve]
    held_out: tuple[Curve, ...]
    """Validation loss of each held-out source; empty in a run of one held-out source."""
    mixture: tuple[SourceShare, ...]
    """Empty in a run of one source, or of a version that did not record tokens by source."""
    launches: tuple[LaunchSummary, ...]
    checkpoints: tuple[CheckpointSummary, ...]
    refusals: tuple[Refusals, ...]
    config: dict[str, str]
    identity: dict[str, str]
    environment: dict[str, str]
    damage: tuple[str, ...]
    """Lines about damaged or missing files."""
