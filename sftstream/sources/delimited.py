"""CSV and TSV: a header, then records of as many cells, quoted as in RFC 4180, so that a cell may hold line breaks."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import FileIO
from itertools import chain
from typing import Any

import numpy as np

from sftstream.sources.row_index import Integers, RowIndex
from sftstream.sources.rows import BOM, PLAIN, BrokenRow, Decode, FileIdentity, LocatesRows, Stored

_CELL = 64 << 20
"""Characters of a cell. Python's own limit of 131,072 is less than a long conversation has."""
_PART = 1 << 16
csv.field_size_limit(_CELL)


class Delimited:
    """Cells are text. Of an empty one a file cannot say whether it means nothing or a text of nothing; the row lacks it."""

    def __init__(self, stored: Stored, delimiter: str) -> None:
        self._stored = stored
        self._delimiter = delimiter
        self._index = RowIndex(stored, f"records {delimiter}", lambda file, _: _divide(file, delimiter))
        self._columns = header(self._index.head().removeprefix(BOM), delimiter, stored.display_name)

    @property
    def identity(self) -> FileIdentity:
        return self._stored.identity

    def __len__(self) -> int:
        return len(self._index)

    def read(self, row: int, _decode: Decode = PLAIN) -> dict[str, str]:
        try:
            return record(self._index.read(row), self._delimiter, self._columns, self, row)
        except BrokenRow:
            self._index.require_lines(row)
            raise

    def locate_row(self, row: int) -> str:
        return self._index.locate_row(row)

    def __reduce__(self) -> tuple[Any, ...]:
        return Delimited, (self._stored, self._delimiter)


def header(text: bytes, delimiter: str, display_name: str) -> list[str]:
    """The names of the columns; raises ValueError where they are none."""
    try:
        columns = _cells(text, delimiter)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{display_name} has no readable header: {error}") from None
    if "" in columns or len(set(columns)) < len(columns):
        raise ValueError(f"{display_name} has a header {columns}, in which a name is missing or comes twice")
    return columns


def record(text: bytes, delimiter: str, columns: list[str], file: LocatesRows, row: int) -> dict[str, str]:
    """Raises `BrokenRow`, also where there are more cells than columns, or fewer."""
    try:
        cells = _cells(text, delimiter)
    except (csv.Error, UnicodeDecodeError) as error:
        raise BrokenRow(f"{file.locate_row(row)} is not CSV: {error}") from None
    if len(cells) != len(columns):
        raise BrokenRow(f"{file.locate_row(row)} has {len(cells)} cells, and the header names {len(columns)}")
    return {column: cell for column, cell in zip(columns, cells, strict=True) if cell}


def _cells(text: bytes, delimiter: str) -> list[str]:
    """The cells of one record, with blank lines around it."""
    return next(csv.reader([text.decode().strip("\r\n")], delimiter=delimiter, strict=True), [])


def _divide(file: FileIO, delimiter: str) -> Iterator[tuple[Integers, Integers]]:
    """Where the records after the header begin."""
    starts, numbers = array("q"), array("q")
    records = _records(file, delimiter)
    header = next(records)
    for start, number in chain([next(records, header)], records):  # a file without a header ends where it begins
        starts.append(start)
        numbers.append(number)
        if len(starts) == _PART:
            yield np.array(starts), np.array(numbers)
            starts, numbers = array("q"), array("q")
    yield np.array(starts, np.int64), np.array(numbers, np.int64)


def _records(file: FileIO, delimiter: str) -> Iterator[tuple[int, int]]:
    """First byte and line of each record, and last the file's end."""
    position, number = file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0), 0
    for lines in divided(open(file.fileno(), "rb", closefd=False), delimiter):  # noqa: SIM115
        if lines[0].strip(b"\r\n"):
            yield position, number
        position, number = position + sum(map(len, lines)), number + len(lines)
    yield position, number


def divided(lines: Iterable[bytes], delimiter: str) -> Iterator[list[bytes]]:
    """The lines of each record as Python's own reader finds them; one of nothing is a blank line."""
    taken: list[bytes] = []

    def passing() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line.decode("latin-1")  # every border is one ASCII byte in UTF-8

    reader = csv.reader(passing(), delimiter=delimiter)
    while True:
        with suppress(csv.Error):  # the record is refused when it is read
            if next(reader, None) is None:
                return
        yield taken.copy()
        taken.clear()
