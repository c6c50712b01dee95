"""CSV and TSV: a header, then records of as many cells, quoted as in RFC 4180, so that a cell may hold line breaks."""

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
from sftstream.sources.rows import BOM, RowsFrom, Stored, skip_bom

_CELL = 64 << 20
"""Characters of a cell. Python's own limit of 131,072 is less than a long conversation has."""
_PART = 1 << 16
csv.field_size_limit(_CELL)


class Delimited(IndexedFile):
    """The records of a file. Cells are text; the row lacks a column whose cell is empty."""

    def __init__(self, stored: Stored, delimiter: str) -> None:
        super().__init__(stored, f"records {delimiter}", lambda file, _: _divide(file, delimiter))
        self._delimiter = delimiter
        self._columns = _header(self._index.head().removeprefix(BOM), delimiter, stored.display_name)

    def read(self, row: int) -> dict[str, str]:
        return _record(self._index.read(row), self._delimiter, self._columns)


def records_forward(file: BufferedReader, name: str, _start: int, *, delimiter: str) -> RowsFrom:
    """Read the records of a file from its beginning; raises ValueError if the header is unusable."""
    texts = filter(None, (b"".join(lines).strip(b"\r\n") for lines in _divided(skip_bom(file), delimiter)))
    columns = _header(next(texts, b""), delimiter, name)
    return RowsFrom(0, (partial(_record, text, delimiter, columns) for text in texts))


def _header(text: bytes, delimiter: str, display_name: str) -> list[str]:
    """The names of the columns; raises ValueError where they are none."""
    try:
        columns = _cells(text, delimiter)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{display_name} has no readable header: {error}") from None
    if "" in columns or len(set(columns)) < len(columns):
        raise ValueError(f"{display_name} has a header {columns}, in which a name is missing or comes twice")
    return columns


def _record(text: bytes, delimiter: str, columns: list[str]) -> dict[str, str]:
    """Raises `BrokenRow`, also where there are more cells than columns, or fewer."""
    try:
        cells = _cells(text, delimiter)
    except (csv.Error, UnicodeDecodeError) as error:
        raise BrokenRow(f"is not CSV: {error}") from None
    if len(cells) != len(columns):
        raise BrokenRow(f"has {len(cells)} cells, and the header names {len(columns)}")
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
    for lines in _divided(open(file.fileno(), "rb", closefd=False), delimiter):  # noqa: SIM115
        if lines[0].strip(b"\r\n"):
            yield position, number
        position, number = position + sum(map(len, lines)), number + len(lines)
    yield position, number


def _divided(lines: Iterable[bytes], delimiter: str) -> Iterator[list[bytes]]:
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
