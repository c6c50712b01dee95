"""Define the records of a ledger beside its segments: sessions, states, lines of other files."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from sftstream.config import DataConfig
from sftstream.identity import Identity
from sftstream.ledger.segments import Segments
from sftstream.records import Ref


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A start of the run's command, first or resumed, as a line of `sessions.jsonl`.

    The session made the steps after `after`, up to the step at which the next session began.
    """

    after: int
    """Steps done before the session."""
    mesh: dict[str, int]
    """Sizes of the topology by name, for example `{"dp": 2, "tp": 1}`."""
    workers: int
    """Loader processes of each data-parallel shard."""
    version: str
    """Version of this package."""
    directory: str
    """Working directory, from which relative paths of `data` start."""
    data: DataConfig
    identity: Identity
    accepted: tuple[str, ...] = ()
    """Differences of data or settings that the run has accepted so far."""


class StepSegments(NamedTuple):
    """The conversations of a step, ordered by pack."""

    step: int
    segments: Segments


class StepLine(msgspec.Struct, frozen=True):
    """The part of a line of `metrics.jsonl` that an audit compares."""

    step: int
    tokens: int
    trained_tokens: int
    rows: int
    """Conversations trained and rows refused since the start of the run."""
    refused: int
    batch_digest: str


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
