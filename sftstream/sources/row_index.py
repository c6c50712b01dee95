"""Read the rows of a file by number, with an index that is built once and kept in the cache.

All processes map the same index file. It contains little-endian int64 numbers, `borders` and
`shifts`, and a trailer. Row `i` is the bytes from `borders[i]` to `borders[i + 1]`. For each line
on which no row begins, `shifts` holds the number of the next row. So row `i` begins on line `1 + i
+ (number of shifts <= i)`. Example, with a blank line between two rows:

    content  b'{"a": 1}\\n\\n{"b": 2}\\n'
    borders  [0, 10, 19]
    shifts   [1]                         row 0 begins on line 1, row 1 on line 3
"""

from __future__ import annotations

import mmap
import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftstream.cache import cached, derived
from sftstream.sources.rows import BOM, OPEN_FILES, FileIdentity
from sftstream.sources.stored import Stored

Integers = NDArray[np.int64]
Divider = Callable[[FileIO, int], Iterable[tuple[Integers, Integers]]]
"""`divide(file, size)` yields pairs of int64 arrays: byte offsets at which rows begin, and the line
numbers of these offsets, counted from 0. The last offset of all is the end of the last row."""

_MAGIC = b"rowspan1"
_TRAILER = struct.Struct("<8s64sqq")
"""Format mark with version, cache key, number of rows, number of shifts. An index file without a
trailer is incomplete."""


class Opened(NamedTuple):
    """An open file with its mapped index."""

    file: FileIO
    borders: memoryview[int]
    shifts: memoryview[int]


class RowIndex:
    """Byte ranges of the rows of a file. The index has 8 bytes for each row."""

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
        """Return the bytes of a row, up to the first byte of the next row.

        Raises RuntimeError if the file has shrunk.
        """
        file, borders, _ = _opened(self)
        start, end = borders[row], borders[row + 1]
        # pread, not a memory map: if the file was truncated, a memory map would crash the process.
        span = os.pread(file.fileno(), end - start, start)
        if len(span) < end - start:
            raise RuntimeError(
                f"{self.locate_row(row)} is no longer there: the file shrank while it was read; restore the file"
            )
        return span

    def rows_before(self, offset: int) -> int:
        """Return the number of rows that begin before byte `offset` of the file."""
        return bisect_left(_opened(self).borders, offset, hi=self._rows)

    def head(self) -> bytes:
        """Return the bytes before the first row."""
        file, borders, _ = _opened(self)
        return os.pread(file.fileno(), borders[0], 0)

    def locate_row(self, row: int) -> str:
        """Return `path:line` of the row's first line, counted from 1."""
        return f"{self._stored.display_name}:{row + bisect_right(_opened(self).shifts, row) + 1}"

    def require_lines(self, row: int) -> None:
        """Raise RuntimeError if the row does not begin and end at a line break."""
        file, borders, _ = _opened(self)
        for border in borders[row : row + 2]:
            if border not in (0, len(BOM), self._stored.seal[0]) and os.pread(file.fileno(), 1, border - 1) != b"\n":
                raise RuntimeError(
                    f"{self.locate_row(row)} does not begin where its index says; "
                    f"the file changed while it was read, or {self._index} is damaged: delete the index and start again"
                )

    def require_unchanged(self) -> None:
        """Raise RuntimeError if the content of the open file has changed."""
        self._stored.require_unchanged(_opened(self).file)

    def open(self) -> Opened:
        """Open the file and map the index; raises RuntimeError if one of them has changed."""
        counts = _counts(self._index, self._key)
        if counts is None:
            raise RuntimeError(f"{self._index} was damaged while it was used; start again to build the index again")
        borders, shifts = counts[0] + 1, counts[1]
        with self._index.open("rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        numbers = mapped[: 8 * (borders + shifts)].cast("q")
        return Opened(self._stored.open(), numbers[:borders], numbers[borders:])


class IndexedFile:
    """Base class of files whose rows are byte ranges. A subclass for each format adds `read`."""

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

    def require_unchanged(self) -> None:
        self._index.require_unchanged()

    def digest_in_full(self, interrupted: Callable[[], bool], *, quiet: bool) -> str:
        return self._stored.digest_in_full(interrupted, quiet=quiet)

    def require_intact(self, row: int) -> None:
        self._index.require_lines(row)


def _index(stored: Stored, key: str, divide: Divider) -> Iterator[bytes]:
    """Yield the bytes of an index file: borders, shifts, trailer."""
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
    """Return the numbers of rows and shifts in an index file.

    Returns None if the index file is incomplete or has another key.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - _TRAILER.size, 0))
        magic, found, rows, shifts = _TRAILER.unpack(file.read().ljust(_TRAILER.size, b"\0"))
    whole = size == 8 * (rows + 1 + shifts) + _TRAILER.size
    return (rows, shifts) if (magic, found, whole) == (_MAGIC, key.encode(), True) else None


@lru_cache(maxsize=OPEN_FILES)
def _opened(index: RowIndex) -> Opened:
    return index.open()
