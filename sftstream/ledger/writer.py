"""Write the ledger of a run step by step. A resumed run first removes the steps that it repeats."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from sftstream.door import Door
from sftstream.ledger.files import (
    JOURNAL,
    SESSIONS,
    UNAPPLIED,
    closed_files,
    frame,
    publish,
    read_closed,
    read_journal,
    state_file,
    state_files,
    write_closed,
)
from sftstream.ledger.records import Session, StepSegments, Unapplied
from sftstream.ledger.segments import Segments
from sftstream.state import DataState

MOST_OPEN = 1 << 20
"""Number of segments in the journal, 32 MB, at which steps are closed before any checkpoint."""
STATES_KEPT = 3
"""Number of newest data states to keep; a run may resume from a checkpoint before the newest."""


class LedgerWriter:
    """Writer of the ledger in `directory`. The constructor removes all steps after `step`.

    `step` is the step of the checkpoint that the run resumes from, so the run repeats the removed
    steps. Bytes that a full disk does not accept wait in memory for the next write. Raises
    ValueError if a closed file is damaged, OSError if a file cannot be opened.
    """

    def __init__(self, directory: Path, step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        kept = _cut_back(directory, step)
        self._first = kept + 1
        """First step that is not in a closed file."""
        self._steps = [found for found in read_journal(directory) if kept < found.step <= step]
        """Steps that are not in a closed file, in order."""
        self._open_segments = sum(len(found.segments) for found in self._steps)
        self._state: tuple[DataState, Mapping[int, bytes]] | None = None
        self._last = self._steps[-1].step if self._steps else kept
        self._waiting = b""
        self._journal = self._open_journal()
        self._unapplied = _unapplied_up_to(directory, step)
        self._unapplied_waits = True
        self._write_unapplied()

    def begin(self, session: Session) -> None:
        """Append a session to `sessions.jsonl`."""
        path = self._directory / SESSIONS
        content = path.read_bytes() if path.exists() else b""
        torn = len(content) - (content.rfind(b"\n") + 1)
        with path.open("ab") as file:
            file.truncate(len(content) - torn)  # a kill during a write left a part of a line
            file.write(msgspec.json.encode(session) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def add(self, step: int, segments: Segments) -> None:
        """Append the segments of a step, ordered by pack, to the journal.

        The step is safe on disk only after `sync` or `close`. An error of the disk is raised there.
        """
        if not self._steps:
            self._first = step
        self._last = step
        self._steps.append(StepSegments(step, segments))
        self._open_segments += len(segments)
        self._waiting += frame(self._steps[-1])
        with suppress(OSError):  # the next write tries again, and sync raises the error
            self._write()
            if self._open_segments >= MOST_OPEN:
                self._close_steps()

    def add_unapplied(self, record: Unapplied) -> None:
        """Append a step whose update was not applied.

        The record is safe on disk only after `sync` or `close`. An error of the disk is raised
        there.
        """
        self._unapplied.append(record)
        self._unapplied_waits = True
        with suppress(OSError):
            self._write_unapplied()

    def keep_state(self, state: DataState, streams: Mapping[int, bytes]) -> None:
        """Remember the data state after the last added step; the next `close` writes the state.

        `state` is the data state without streams, `streams` the encoded states of all streams.
        """
        self._state = (state, streams)

    def close(self) -> None:
        """Close the steps of the journal and write the remembered data state.

        Call it before a checkpoint of the last step is written. Raises OSError if the disk does not
        accept the files.
        """
        if self._steps:
            self._close_steps()
        self._write_unapplied()
        self._write_state()

    def sync(self) -> None:
        """Force the journal to the disk. Raises OSError if the disk does not accept the bytes."""
        self._write()
        os.fsync(self._journal)
        self._write_unapplied()

    def end(self) -> None:
        """Force the journal to the disk and close its file. Raises OSError like `sync`."""
        try:
            self.sync()
        finally:
            os.close(self._journal)

    def _close_steps(self) -> None:
        self._first = write_closed(self._directory, self._first, self._steps).last + 1
        self._steps, self._open_segments, self._waiting = [], 0, b""
        os.ftruncate(self._journal, 0)

    def _write_unapplied(self) -> None:
        """Write the file of steps without an update as a whole, or remove it if there are none."""
        if not self._unapplied_waits:
            return
        path = self._directory / UNAPPLIED
        if self._unapplied:
            partial = path.with_name(f".{UNAPPLIED}")
            partial.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in self._unapplied))
            publish(partial, path)
        else:
            path.unlink(missing_ok=True)
        self._unapplied_waits = False

    def _write_state(self) -> None:
        if self._state is None:
            return
        run, streams = self._state
        self._state = None
        path = state_file(self._directory, self._last)
        partial = path.with_name(f".{path.name}")
        partial.write_bytes(msgspec.msgpack.encode({"run": run, "streams": dict(sorted(streams.items()))}))
        publish(partial, path)
        for old in list(state_files(self._directory).values())[:-STATES_KEPT]:
            old.unlink()

    def _open_journal(self) -> int:
        """Replace the journal by a journal of `self._steps`, and return its file descriptor."""
        path = self._directory / JOURNAL
        partial = path.with_name(f".{JOURNAL}")
        partial.write_bytes(b"".join(map(frame, self._steps)))
        publish(partial, path)
        return os.open(path, os.O_WRONLY | os.O_APPEND)

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[os.write(self._journal, self._waiting) :]


def _unapplied_up_to(directory: Path, step: int) -> list[Unapplied]:
    path = directory / UNAPPLIED
    lines = path.read_bytes().splitlines() if path.exists() else []
    with Door(f"{path} was not written by a run"):
        records = [msgspec.json.decode(line, type=Unapplied) for line in lines]
    return [record for record in records if record.step <= step]


def _cut_back(directory: Path, step: int) -> int:
    """Remove closed steps and data states after `step`; return the last closed step left, or 0."""
    for number, path in state_files(directory).items():
        if number > step:
            path.unlink()
    for file in closed_files(directory):
        if file.last > step:
            steps = read_closed(file) if file.first <= step else []
            if kept := [found for found in steps if found.step <= step]:
                write_closed(directory, file.first, kept)
            file.path.unlink()
    for left in directory.glob(".*"):
        left.unlink()  # a kill interrupted the writing of this file
    return max((file.last for file in closed_files(directory)), default=0)
