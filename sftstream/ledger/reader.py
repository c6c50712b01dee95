"""Read the ledger of a run, its refused rows and its metrics, in any process and while it runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from sftstream.door import Door
from sftstream.ledger.files import SESSIONS, UNAPPLIED, closed_files, read_closed, read_journal, state_files
from sftstream.ledger.records import RefusedLine, Session, StepLine, StepSegments, Unapplied
from sftstream.ledger.segments import NO_SEGMENTS, Segments
from sftstream.records import Ref
from sftstream.regular_files import require_files
from sftstream.state import DataState

Line = TypeVar("Line", bound=msgspec.Struct)


class Use(NamedTuple):
    """A use of a row in training: the fields of a segment, and the step of the segment."""

    step: int
    pack: int
    epoch: int
    part: int
    tokens: int
    trained_tokens: int


class Ledger:
    """The ledger in the directory `run` of a training run.

    Raises ValueError if the directory has no ledger.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.directory = run / "ledger"
        require_files([run / "metrics.jsonl", run / "refused.jsonl", *self.directory.glob("*")])
        if not (self.directory / SESSIONS).exists():
            raise ValueError(
                f"{run} has no ledger; name the directory of a run, such as runs/my-run, made by this version"
            )

    @cached_property
    def steps(self) -> list[StepSegments]:
        """All steps in rising order. Raises ValueError if a file is damaged."""
        # The journal first: a step that the run closes meanwhile is then read twice, never missed.
        journal = list(read_journal(self.directory))
        closed = [step for file in closed_files(self.directory) for step in read_closed(file)]
        last = closed[-1].step if closed else 0
        return [*closed, *(step for step in journal if step.step > last)]

    @cached_property
    def sessions(self) -> tuple[Session, ...]:
        """Sessions of the run, oldest first. Raises ValueError if there are none."""
        path = self.directory / SESSIONS
        sessions = tuple(_lines(path, Session))
        if not sessions:
            raise ValueError(
                f"{path} holds no session, as after a kill at the start; restore the file, or start the run again"
            )
        return sessions

    @cached_property
    def metrics(self) -> dict[int, StepLine]:
        """Lines of `metrics.jsonl` by step."""
        return {line.step: line for line in _lines(self.run / "metrics.jsonl", StepLine)}

    @cached_property
    def unapplied(self) -> list[Unapplied]:
        """Steps whose update was not applied, in rising order."""
        return _lines(self.directory / UNAPPLIED, Unapplied)

    @cached_property
    def refused(self) -> list[RefusedLine]:
        """Lines of `refused.jsonl`."""
        return _lines(self.run / "refused.jsonl", RefusedLine)

    @cached_property
    def state(self) -> tuple[int, DataState] | None:
        """The newest stored data state and its step; None if no state is stored."""
        files = list(state_files(self.directory).items())
        if not files:
            return None
        step, path = files[-1]
        with Door(f"{path} is damaged"):
            content = msgspec.msgpack.decode(path.read_bytes(), type=_StoredState, strict=False)
            return step, DataState.from_parts(content.run, content.streams)

    def session(self, step: int) -> Session:
        """Return the session that made `step`: the last session that began before the step.

        Raises ValueError if no session began before the step.
        """
        found = next((session for session in reversed(self.sessions) if session.after < step), None)
        if found is None:
            raise ValueError(f"{self.directory / SESSIONS} has no session before step {step}; restore the file")
        return found

    def segments(self, step: int) -> Segments:
        """Return the segments of a step. Raises ValueError if the ledger has no such step."""
        found = next((found.segments for found in self.steps if found.step == step), None)
        if found is None:
            known = f"steps {self.steps[0].step} to {self.steps[-1].step}" if self.steps else "no step"
            raise ValueError(f"step {step} is not in the ledger of {self.run}, which has {known}; name one of them")
        return found

    def uses(self, source: int, row: int) -> list[Use]:
        """Return each use of a row, in the order of steps."""
        uses = []
        for step, segments in self.steps:
            for found in segments[(segments["source"] == source) & (segments["row"] == row)]:
                numbers = (found[name].item() for name in Use._fields[1:])
                uses.append(Use(step, *numbers))
        return uses

    def refusals(self, source: int, row: int) -> list[RefusedLine]:
        """Return the refusals of a row."""
        return [line for line in self.refused if (line.source, line.row) == (source, row)]

    def up_to(self, step: int | None = None) -> tuple[NDArray[np.int64], Segments]:
        """Return all segments up to `step` (None: up to the last step), and the step of each.

        The steps are the first array of the result, the segments the second.
        """
        steps = [found for found in self.steps if step is None or found.step <= step]
        numbers = np.repeat([s.step for s in steps], [len(s.segments) for s in steps]).astype(np.int64)
        return numbers, np.concatenate([s.segments for s in steps]) if steps else NO_SEGMENTS


class _StoredState(msgspec.Struct):
    run: dict[str, object]
    streams: dict[int, bytes]


def refs_of(lines: Sequence[RefusedLine], step: int) -> list[Ref]:
    """Return references to the rows that were refused up to `step`."""
    return [line.ref for line in lines if line.step <= step]


def _lines(path: Path, kind: type[Line]) -> list[Line]:
    """Return the lines of a file of JSON lines. A last line without a newline is left out, because
    a kill may have interrupted its writing."""
    with Door(f"{path} cannot be read"):
        content = path.read_bytes() if path.exists() else b""
    lines = re.findall(rb"[^\n]*\n", content)
    with Door(f"{path} was not written by a run"):
        return [msgspec.json.decode(line, type=kind) for line in lines]
