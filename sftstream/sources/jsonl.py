"""JSON lines: a row of JSON text on each line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from io import BufferedReader, FileIO

import numpy as np
from numpy.typing import NDArray

from sftstream.sources.row_index import IndexedFile, Integers
from sftstream.sources.rows import BOM, FileIdentity, RowsFrom, Stored, begins_with, skip_bom

_CHUNK = 1 << 20
"""Bytes searched for line breaks at a time: small enough for a core's cache."""


class JsonLines(IndexedFile):
    """Lines of a file by number; blank lines do not count."""

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored, "lines", divide)

    def read(self, row: int) -> bytes:
        return self._index.read(row)

    def rows_of(self, before: FileIdentity) -> int | None:
        """Return the rows of the file `before` if lines were appended to it, else None."""
        if not begins_with(self._stored, before):
            return None
        with self._stored.open() as file:
            border = os.pread(file.fileno(), 2, max(0, before.size - 1))
        # A last line without a line break goes on, unless the appended bytes begin with one.
        return self._index.rows_before(before.size) if b"\n" in border or before.size == 0 else None


def lines_forward(file: BufferedReader, _name: str, _start: int) -> RowsFrom:
    """Read the lines of a file from the first line."""
    return RowsFrom(0, (partial(bytes, line) for line in skip_bom(file) if line.strip()))


def divide(file: FileIO, size: int) -> Iterator[tuple[Integers, Integers]]:
    """Yield the borders of lines that are not blank, and their numbers, in constant memory.

    For the file b"1\\n\\n22\\n": borders [0, 3, 6], lines [0, 2, 3].
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
    """Return True for each line of white space alone, reading only lines that begin with any."""
    blank: NDArray[np.bool_] = starts == ends
    suspect = chunk[np.maximum(starts - position, 0)] <= ord(" ")
    suspect[:1] |= starts[:1] < position  # begins in an earlier chunk
    for i in np.flatnonzero(suspect & ~blank):
        blank[i] = not os.pread(file.fileno(), int(ends[i] - starts[i]), int(starts[i])).strip()
    return blank
