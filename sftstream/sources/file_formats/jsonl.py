"""Read JSON lines: files with the JSON text of one row on each line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from io import BufferedReader, FileIO

import numpy as np
from numpy.typing import NDArray

from sftstream.sources.row_index import IndexedFile, Integers
from sftstream.sources.rows import BOM, FileIdentity, RowsFrom, Text, after_bom, refuse_carriage_returns
from sftstream.sources.stored import Stored, begins_with

_CHUNK = 1 << 20
"""Number of bytes searched for line breaks at a time; they fit into the cache of a core."""
_JOINT = re.compile(rb"[}\]][ \t]*\r\s*[{\[]")


class JsonLines(IndexedFile):
    """Lines of a file by number. Blank lines have no number."""

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored, "lines", divide)

    def read(self, row: int) -> bytes:
        line = _without_blank_lines(self._index.read(row))
        if _joins_rows(line):
            refuse_carriage_returns(self.locate_row(row))
        return line

    def rows_of(self, before: FileIdentity) -> int | None:
        """Return the number of rows of the file `before` if only lines were appended, else None."""
        if not begins_with(self._stored, before):
            return None
        with self._stored.open() as file:
            border = os.pread(file.fileno(), 2, max(0, before.size - 1))
        # Without a line break at the border, the appended bytes would continue the last old line.
        return self._index.rows_before(before.size) if b"\n" in border or before.size == 0 else None


def lines_forward(text: Text, start: int, rest: Text | None = None) -> RowsFrom:
    """Read the lines of a file in order, without blank lines.

    `rest` is the content from line `start` on. Without `rest`, the first line is line 0, so that
    the reader can make bookmarks on the way to line `start`. A line that carriage returns divide
    into rows raises ValueError when it is read.
    """
    lines = _Lines(rest.file, 0) if rest else _Lines(text.file, after_bom(text.file))
    place = (rest or text).place
    rows = (partial(_row, line, text.display_name) for line in lines)
    return RowsFrom(start if rest else 0, rows, lambda: place(lines.position))


def _without_blank_lines(content: bytes) -> bytes:
    """Return the first line of a row's bytes; all bytes if another line is not blank."""
    end = content.find(b"\n") + 1
    return content if content[end:].strip() else content[:end]


def _row(line: bytes, display_name: str) -> bytes:
    if _joins_rows(line):
        refuse_carriage_returns(display_name)
    return line


def _joins_rows(line: bytes) -> bool:
    """Return True if a carriage return stands between two JSON objects or lists."""
    return line.find(b"\r", 0, -2) >= 0 and _JOINT.search(line) is not None


class _Lines:
    """The lines of a file that are not blank, and the position after the last line read."""

    def __init__(self, file: BufferedReader, position: int) -> None:
        self._file = file
        self.position = position
        """Number of bytes before the next line."""

    def __iter__(self) -> Iterator[bytes]:
        for line in self._file:
            self.position += len(line)
            if line.strip():
                yield line


def divide(file: FileIO, size: int) -> Iterator[tuple[Integers, Integers]]:
    """Yield byte offsets and line numbers of the lines that are not blank, then of the file's end.

    Needs constant memory. For the file b"1\\n\\n22\\n" the offsets are [0, 3, 6] and the line
    numbers [0, 2, 3].
    """
    buffer = bytearray(_CHUNK)
    chunk = np.frombuffer(buffer, np.uint8)
    start = len(BOM) if file.read(len(BOM)) == BOM else 0
    line, position = 0, file.seek(0)
    while position < size and (read := file.readinto(buffer)):
        breaks = np.flatnonzero(chunk[:read] == ord("\n")) + position
        starts = np.concatenate([[start], breaks + 1])
        rows = np.flatnonzero(~_blank(file, starts[:-1], breaks, chunk, position))
        yield starts[rows], rows + line
        start, line, position = int(starts[-1]), line + len(breaks), position + read
    tail = [start] if os.pread(file.fileno(), size - start, start).strip() else []
    yield np.array([*tail, size]), np.arange(line, line + len(tail) + 1)


def _blank(
    file: FileIO, starts: Integers, ends: Integers, chunk: NDArray[np.uint8], position: int
) -> NDArray[np.bool_]:
    """Return True for each blank line. Reads only lines that begin with white space."""
    blank: NDArray[np.bool_] = starts == ends
    suspect = chunk[np.maximum(starts - position, 0)] <= ord(" ")
    suspect[:1] |= starts[:1] < position  # begins in an earlier chunk
    for i in np.flatnonzero(suspect & ~blank):
        blank[i] = not os.pread(file.fileno(), int(ends[i] - starts[i]), int(starts[i])).strip()
    return blank
