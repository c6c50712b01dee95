"""Define the records that ledger commands read: sessions, steps, and lines of the run's files."""

from __future__ import annotations

import os
from typing import NamedTuple

import msgspec

from sftstream.config import DataConfig
from sftstream.identity import Identity
from sftstream.ledger.segments import Segments
from sftstream.loader import PackLoader
from sftstream.records import Ref


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A start of the run's command, new or resumed, as a line of `sessions.jsonl`.

    The session made the steps `after + 1`, `after + 2`, ... up to the `after` of the next session.
    """

    after: int
    """Number of the last step before the session; 0 for a new run."""
    mesh: dict[str, int]
    """Sizes of the topology by name, for example `{"dp": 2, "tp": 1}`."""
    workers: int
    """Loader processes of each data-parallel shard."""
    version: str
    """Version of sftstream."""
    directory: str
    """Working directory of the session, the start of relative paths in `data`."""
    data: DataConfig
    identity: Identity
    accepted: tuple[str, ...] = ()
    """Differences of data or settings that the run has accepted so far."""

    @classmethod
    def of(cls, loader: PackLoader, mesh: dict[str, int], after: int, version: str) -> Session:
        """Return the session that starts after step `after` with the data of `loader`."""
        header = loader.position().header
        return cls(
            after=after,
            mesh=mesh,
            workers=loader.workers,
            version=version,
            directory=os.getcwd(),
            data=loader.config,
            identity=header.identity,
            accepted=tuple(difference for change in header.history for difference in change.differences),
        )


class StepSegments(NamedTuple):
    """The segments of a step, ordered by pack."""

    step: int
    segments: Segments


class Unapplied(msgspec.Struct, frozen=True, kw_only=True):
    """A step whose update was not applied, as a line of `unapplied.jsonl`.

    The step's loss or gradient was not finite, and the run was told to go on without the update.
    """

    step: int
    loss: str
    """Loss of the step, such as "nan"."""
    grad_norm: str
    """Norm of the gradient before clipping, such as "inf"."""
    parameters: tuple[str, ...]
    """Names of the parameters whose gradient has a norm that is not finite."""
    packs: tuple[int, ...]
    """Places in the step of the packs whose loss is not finite."""
    conversations: tuple[Ref, ...]
    """Conversations of `packs`, or of the whole step if `packs` is empty."""


class StepLine(msgspec.Struct, frozen=True):
    """The values in a line of `metrics.jsonl` that an audit compares with the ledger."""

    step: int
    tokens: int
    trained_tokens: int
    rows: int
    """Conversations trained, and rows refused or skipped, since the start of the run."""
    refused: int
    batch_digest: str
    unapplied: bool = False
    """True if the step's update was not applied."""


class RefusedLine(msgspec.Struct, frozen=True):
    """A line of `refused.jsonl`."""

    step: int
    place: str
    """Location of the row, such as `rows.jsonl:61`."""
    source: int
    row: int
    epoch: int
    reason: str
    detail: str

    @property
    def ref(self) -> Ref:
        """Reference to the row."""
        return Ref(self.source, self.row, self.epoch)
