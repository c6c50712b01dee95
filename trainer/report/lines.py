"""Read the JSON lines of a file that a run may still be writing, and note damaged lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from trainer.whole_file import DAMAGED

Record = TypeVar("Record")

MOST_NOTES = 5
"""Number of damaged lines of a file that are named."""


class LineReader(Generic[Record]):
    """The lines of a file as records of `kind`. Each call of `new` goes on after the last line.

    A damaged line is left out and noted in `damage`. A last line without its end is not yet read,
    since a run may be writing the line.
    """

    def __init__(self, path: Path, kind: Any) -> None:
        self.damaged = 0
        """Number of damaged lines."""
        self.notes: list[str] = []
        """Path, number and reason of the first `MOST_NOTES` damaged lines."""
        self._path = path
        self._kind = kind
        self._decoder = msgspec.json.Decoder(kind)
        self._offset = self._number = 0

    def new(self) -> Iterator[Record]:
        """Yield the records of further lines. A missing file has no lines.

        Raises OSError if the file cannot be read.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                self._number += 1
                record = self._record(line)
                if record is not None:
                    yield record

    def note(self, reason: str) -> None:
        """Note the line read last as damaged."""
        self.damaged += 1
        if self.damaged <= MOST_NOTES:
            self.notes.append(f"{self._path}:{self._number} was left out: {reason}")

    @property
    def damage(self) -> list[str]:
        """Lines for the user about damaged lines; [] if there are none."""
        more = self.damaged - len(self.notes)
        return [*self.notes, *([f"{self._path}: {more:,} further lines were left out"] if more else [])]

    def _record(self, line: bytes) -> Record | None:
        try:
            decoded: Record = self._decoder.decode(line)
        except DAMAGED as error:
            return self._loosely(line, error)
        return decoded

    def _loosely(self, line: bytes, error: Exception) -> Record | None:
        """Return the record of a line with NaN or Infinity, which Python writes beside JSON."""
        try:
            converted: Record = msgspec.convert(json.loads(line), self._kind)
        except (ValueError, RecursionError):
            self.note(str(error))
            return None
        return converted
