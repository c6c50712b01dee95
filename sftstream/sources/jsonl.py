"""JSON lines: one object a line, reached by byte offset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from sftstream.sources.rows import BOM, UNDECODABLE, BrokenRow

_CHUNK = 64 << 20


class JsonLines:
    """Rows are the lines that hold anything; blank ones are none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts, self._ends, self._lines = _index(path)
        self._file = path.open("rb", buffering=0)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, row: int) -> Any:
        start, end = int(self._starts[row]), int(self._ends[row])
        # pread and not a memory map: a file truncated under the run is then an error here, not a bus error.
        line = os.pread(self._file.fileno(), end - start, start)
        if len(line) < end - start:
            raise RuntimeError(f"{self.place(row)} is no longer there: the file shrank while it was read; restore it")
        try:
            return msgspec.json.decode(line)
        except UNDECODABLE as error:
            raise BrokenRow(f"{self.place(row)} is not JSON: {error}") from None

    def place(self, row: int) -> str:
        return f"{self.path}:{int(self._lines[row]) + 1}"

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonLines, (self.path,)


def _index(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Start, end (without the line break) and line number of each row."""
    newlines = [np.empty(0, np.int64)]
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            newlines.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
    ends = np.concatenate([*newlines, [size]]).astype(np.int64)
    starts = np.concatenate([[_bom_length(path)], ends[:-1] + 1]).astype(np.int64)
    rows = np.flatnonzero(ends - starts > 0)
    rows = rows[~_blank(path, starts[rows], ends[rows])]
    return starts[rows], ends[rows], rows


def _bom_length(path: Path) -> int:
    with path.open("rb") as file:
        return len(BOM) if file.read(len(BOM)) == BOM else 0


def _blank(path: Path, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Lines of white space alone. Only short ones are looked at: nothing else is shorter than `{}`."""
    blank = np.zeros(len(starts), bool)
    with path.open("rb") as file:
        for i in np.flatnonzero(ends - starts < len("{}")):
            file.seek(int(starts[i]))
            blank[i] = not file.read(int(ends[i] - starts[i])).strip()
    return blank
