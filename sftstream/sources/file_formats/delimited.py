"""Read CSV and TSV files: a header, then records with the same number of cells (RFC 4180).

A quoted cell may contain line breaks, so a record may have several lines.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from io import BufferedReader, FileIO
from itertools import chain

import numpy as np

from sftstream.records import BrokenRow
from sftstream.sources.row_index import IndexedFile, Integers
from sftstream.sources.rows import BOM, RowsFrom, Text, after_bom
from sftstream.sources.stored import Stored

_CELL = 64 << 20
"""Largest number of characters of a cell. Python's default, 131,072, is too low for some
conversations."""
_PART = 1 << 16
"""Number of borders in one array."""
csv.field_size_limit(_CELL)


class Delimited(IndexedFile):
    """Records of a file by number, as column name -> text.

    Empty cells are left out, because CSV cannot distinguish a missing value from an empty text.
    """

    def __init__(self, stored: Stored, delimiter: str) -> None:
        super().__init__(stored, f"records {delimiter}", lambda file, _: _divide(file, delimiter))
        self._delimiter = delimiter
        self._columns = _header(self._index.head().removeprefix(BOM), delimiter, stored.display_name)

    def read(self, row: int) -> dict[str, str]:
        return _record(self._index.read(row), self._delimiter, self._columns)


def records_forward(text: Text, start: int, rest: Text | None = None, *, delimiter: str) -> RowsFrom:
    """Read the records of a file in order.

    `rest` is the content from record `start` on. Without `rest`, the first record is record 0, as
    in `lines_forward`. Raises ValueError if the header is unusable.
    """
    records = _Records(text.file, after_bom(text.file), delimiter)
    read = iter(records)
    columns = _header(next(read, b""), delimiter, text.display_name)
    if rest:
        records = _Records(rest.file, 0, delimiter)
        read = iter(records)
    place = (rest or text).place
    rows = (partial(_record, record, delimiter, columns) for record in read)
    return RowsFrom(start if rest else 0, rows, lambda: place(records.position))


class _Records:
    """The records of a file that are not blank, and the position after the last record read."""

    def __init__(self, file: BufferedReader, position: int, delimiter: str) -> None:
        self._file = file
        self._delimiter = delimiter
        self.position = position
        """Number of bytes before the next record."""

    def __iter__(self) -> Iterator[bytes]:
        for lines in _divided(self._file, self._delimiter):
            record = b"".join(lines)
            self.position += len(record)
            if record := record.strip(b"\r\n"):
                yield record


def _header(text: bytes, delimiter: str, display_name: str) -> list[str]:
    """Return the column names of a header.

    The first name may be empty, because pandas writes such a column for its index. Raises
    ValueError if the header is unreadable, a name is repeated, or another name is empty.
    """
    try:
        columns = _cells(text, delimiter)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{display_name} has no readable header: {error}; write column names into the first line"
        ) from None
    if "" in columns[1:] or len(set(columns)) < len(columns):
        raise ValueError(f"{display_name} has the header {columns}; give each column a name of its own")
    return columns


def _record(text: bytes, delimiter: str, columns: list[str]) -> dict[str, str]:
    """Return column name -> cell of a record.

    Raises BrokenRow if the text is not CSV or has more or fewer cells than the header.
    """
    try:
        cells = _cells(text, delimiter)
    except (csv.Error, UnicodeDecodeError) as error:
        raise BrokenRow(f"is not CSV: {error}") from None
    if len(cells) != len(columns):
        raise BrokenRow(f"has {len(cells)} cells for the {len(columns)} columns of the header")
    return {column: cell for column, cell in zip(columns, cells, strict=True) if cell and column}


def _cells(text: bytes, delimiter: str) -> list[str]:
    """Return the cells of a record. Line breaks before and after the record are ignored."""
    return next(csv.reader([text.strip(b"\r\n").decode()], delimiter=delimiter, strict=True), [])


def _divide(file: FileIO, delimiter: str) -> Iterator[tuple[Integers, Integers]]:
    """Yield byte offsets and line numbers of the records after the header, for `RowIndex`."""
    starts, numbers = array("q"), array("q")
    records = _records(file, delimiter)
    header = next(records)
    for start, number in chain([next(records, header)], records):  # in an empty file the end is the only border
        starts.append(start)
        numbers.append(number)
        if len(starts) == _PART:
            yield np.array(starts), np.array(numbers)
            starts, numbers = array("q"), array("q")
    yield np.array(starts, np.int64), np.array(numbers, np.int64)


def _records(file: FileIO, delimiter: str) -> Iterator[tuple[int, int]]:
    """Yield byte offset and line number of each record that is not blank, then of the file's
    end."""
    position, number = file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0), 0
    for lines in _divided(open(file.fileno(), "rb", closefd=False), delimiter):  # noqa: SIM115
        if lines[0].strip(b"\r\n"):
            yield position, number
        position, number = position + sum(map(len, lines)), number + len(lines)
    yield position, number


def _divided(lines: Iterable[bytes], delimiter: str) -> Iterator[list[bytes]]:
    """Yield the lines of each record, as divided by `csv.reader`. A blank line is a record."""
    taken: list[bytes] = []

    def passing() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line.decode("latin-1")  # quotes and line breaks are the same bytes in UTF-8

    reader = csv.reader(passing(), delimiter=delimiter)
    while True:
        with suppress(csv.Error):  # reported when the record is read
            if next(reader, None) is None:
                return
        yield taken.copy()
        taken.clear()
