"""Rows that are stretches of a file's bytes: an index of where each begins, built once a machine and mapped by all processes."""

from __future__ import annotations

import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftstream.cache import cached
from sftstream.sources.rows import BOM, OPEN_FILES, FileIdentity, Stored, derived

Integers = NDArray[np.int64]
Divider = Callable[[FileIO, int], Iterable[tuple[Integers, Integers]]]
"""Divides an open file of some size: where rows begin and on which lines (from 0), in any number of parts. The last border is
the last row's end."""

_MAGIC = b"rowspan1"
_TRAILER = struct.Struct("<8s64sqq")
"""Magic and version, key, rows, shifts. It comes last, so that an index without one was not written to its end."""


class Opened(NamedTuple):
    """A file, and its index as it is mapped."""

    file: FileIO
    borders: memoryview[int]
    shifts: memoryview[int]


class RowIndex:
    """The rows of one file, at 8 bytes of index each."""

    def __init__(self, stored: Stored, layout: str, divide: Divider) -> None:
        self._stored = stored
        self._key = derived("spans", layout, stored.key)
        self._index = cached(
            self._key,
            ".spans",
            lambda: _index(stored, self._key, divide),
            lambda path: _counts(path, self._key) is not None,
        )
        self._rows = len(_opened(self).borders) - 1

    def __len__(self) -> int:
        return self._rows

    def read(self, row: int) -> bytes:
        """The row's bytes and what stands between it and the next; raises RuntimeError where they are no longer there."""
        file, borders, _ = _opened(self)
        start, end = borders[row], borders[row + 1]
        # pread and not a memory map: a file truncated under the run is then an error here, not a bus error.
        span = os.pread(file.fileno(), end - start, start)
        if len(span) < end - start:
            raise RuntimeError(
                f"{self.locate_row(row)} is no longer there: the file shrank while it was read; restore it"
            )
        return span

    def head(self) -> bytes:
        """What stands before the first row."""
        file, borders, _ = _opened(self)
        return os.pread(file.fileno(), borders[0], 0)

    def locate_row(self, row: int) -> str:
        """The row's first line, counted from 1."""
        return f"{self._stored.display_name}:{row + bisect_right(_opened(self).shifts, row) + 1}"

    def require_lines(self, row: int) -> None:
        """Asked of a row that makes no sense: raises RuntimeError if it is not the row's fault."""
        file, borders, _ = _opened(self)
        for border in borders[row : row + 2]:
            if border not in (0, len(BOM), self._stored.seal[0]) and os.pread(file.fileno(), 1, border - 1) != b"\n":
                raise RuntimeError(
                    f"{self.locate_row(row)} does not begin where its index says; "
                    f"the file changed while it was read, or {self._index} is damaged: delete that"
                )

    def open(self) -> Opened:
        """Raises RuntimeError where the file or its index is no longer what it was."""
        counts = _counts(self._index, self._key)
        if counts is None:
            raise RuntimeError(f"{self._index} was damaged while it was used; start again, and it is made anew")
        borders, shifts = counts[0] + 1, counts[1]
        with self._index.open("rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        numbers = mapped[: 8 * (borders + shifts)].cast("q")
        return Opened(self._stored.open(), numbers[:borders], numbers[borders:])


class IndexedFile:
    """A file whose rows are ranges of bytes; a kind of file adds `read`."""

    def __init__(self, stored: Stored, layout: str, divide: Divider) -> None:
        self._stored = stored
        self._index = RowIndex(stored, layout, divide)

    @property
    def identity(self) -> FileIdentity:
        return self._stored.identity

    def __len__(self) -> int:
        return len(self._index)

    def locate_row(self, row: int) -> str:
        return self._index.locate_row(row)

    def require_intact(self, row: int) -> None:
        self._index.require_lines(row)


def _index(stored: Stored, key: str, divide: Divider) -> Iterator[bytes]:
    """The borders; for each line on which no row begins, the row that it comes before or lies in, plus one; the trailer."""
    count, shift = 0, 0
    shifts = [np.empty(0, np.int64)]
    with stored.open() as file:
        for borders, lines in divide(file, stored.seal[0]):
            yield borders.astype("<i8").tobytes()
            rows = np.arange(count, count + len(borders))
            steps = np.diff(lines - rows, prepend=shift)
            shifts.append(np.repeat(rows, steps))
            count, shift = count + len(rows), shift + int(steps.sum())
        stored.require_unchanged(file)
    shifted = np.concatenate(shifts)
    yield shifted.astype("<i8").tobytes()
    yield _TRAILER.pack(_MAGIC, key.encode(), count - 1, len(shifted))


def _counts(path: Path, key: str) -> tuple[int, int] | None:
    """Rows and shifts of an index; None where the file is none, or another's."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - _TRAILER.size, 0))
        magic, found, rows, shifts = _TRAILER.unpack(file.read().ljust(_TRAILER.size, b"\0"))
    whole = size == 8 * (rows + 1 + shifts) + _TRAILER.size
    return (rows, shifts) if (magic, found, whole) == (_MAGIC, key.encode(), True) else None


@lru_cache(maxsize=OPEN_FILES)
def _opened(index: RowIndex) -> Opened:
    return index.open()
