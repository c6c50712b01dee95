"""JSON lines: one object a line, reached by byte offset."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import FileIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftstream.sources.row_index import Integers, RowIndex
from sftstream.sources.rows import BOM, PLAIN, BrokenRow, Decode, FileIdentity, Stored, decoded_json

_CHUNK = 1 << 20
"""Bytes searched at a time: what fits a core's cache is searched at memory speed."""


class JsonLines:
    """Rows are the lines that hold anything; blank ones are none."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._index = RowIndex(stored, "lines", divide)

    @property
    def identity(self) -> FileIdentity:
        return self._stored.identity

    def __len__(self) -> int:
        return len(self._index)

    def read(self, row: int, decode: Decode = PLAIN) -> Any:
        try:
            return decoded_json(self._index.read(row), self, row, decode)
        except BrokenRow:
            self._index.require_lines(row)
            raise

    def locate_row(self, row: int) -> str:
        return self._index.locate_row(row)


def divide(file: FileIO, size: int) -> Iterator[tuple[Integers, Integers]]:
    """Where lines that hold anything begin, and their numbers. Memory is that of a chunk, whatever the file's size."""
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
    """Lines of white space alone. Those that begin with any are looked at one by one; few do."""
    blank: NDArray[np.bool_] = starts == ends
    suspect = chunk[np.maximum(starts - position, 0)] <= ord(" ")
    suspect[:1] |= starts[:1] < position  # it began in an earlier chunk
    for i in np.flatnonzero(suspect & ~blank):
        blank[i] = not os.pread(file.fileno(), int(ends[i] - starts[i]), int(starts[i])).strip()
    return blank
