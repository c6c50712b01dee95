"""CSV and TSV: a header, then records of as many cells, quoted as in RFC 4180, so that a cell may hold line breaks."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator
from io import FileIO
from itertools import chain
from typing import Any

import numpy as np

from sftstream.sources.rows import BOM, BrokenRow, FileIdentity, Placed, Stored
from sftstream.sources.spans import Integers, Spans

_CELL = 64 << 20
"""Characters of a cell. Python's own limit of 131,072 is less than a long conversation has."""
_PART = 1 << 16
csv.field_size_limit(_CELL)


class Delimited:
    """Cells are text. Of an empty one a file cannot say whether it means nothing or a text of nothing; the row lacks it."""

    def __init__(self, stored: Stored, delimiter: str) -> None:
        self._stored = stored
        self._delimiter = delimiter
        self._spans = Spans(stored, f"records {delimiter}", lambda file, _: _divide(file, delimiter))
        self._columns = self._header()

    @property
    def identity(self) -> FileIdentity:
        return self._stored.identity

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, row: int) -> dict[str, str]:
        try:
            cells = self._cells(self._spans.read(row))
        except (csv.Error, UnicodeDecodeError) as error:
            self._spans.require_lines(row)
            raise BrokenRow(f"{self.place(row)} is not CSV: {error}") from None
        if len(cells) != len(self._columns):
            self._spans.require_lines(row)
        return record(self._columns, cells, self, row)

    def place(self, row: int) -> str:
        return self._spans.place(row)

    def __reduce__(self) -> tuple[Any, ...]:
        return Delimited, (self._stored, self._delimiter)

    def _header(self) -> list[str]:
        try:
            columns = self._cells(self._spans.head().removeprefix(BOM))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{self._stored.shown} has no readable header: {error}") from None
        return header(self._stored.shown, columns)

    def _cells(self, record: bytes) -> list[str]:
        """The cells of one record, with blank lines around it."""
        text = record.decode().strip("\r\n")
        return next(csv.reader([text], delimiter=self._delimiter, strict=True), [])


def header(shown: str, columns: list[str]) -> list[str]:
    """The names of the columns; raises ValueError where they are none."""
    if "" in columns or len(set(columns)) < len(columns):
        raise ValueError(f"{shown} has a header {columns}, in which a name is missing or comes twice")
    return columns


def record(columns: list[str], cells: list[str], file: Placed, row: int) -> dict[str, str]:
    """Raises `BrokenRow` where there are more cells than columns, or fewer."""
    if len(cells) != len(columns):
        raise BrokenRow(f"{file.place(row)} has {len(cells)} cells, and the header names {len(columns)}")
    return {column: cell for column, cell in zip(columns, cells, strict=True) if cell}


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
    """First byte and line of each record as Python's own reader finds them, and last the file's end."""
    position = file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)

    def lines() -> Iterator[str]:
        nonlocal position
        for line in open(file.fileno(), "rb", closefd=False):  # noqa: SIM115
            position += len(line)
            yield line.decode("latin-1")  # every border is one ASCII byte in UTF-8

    reader = csv.reader(lines(), delimiter=delimiter)
    while True:
        start, number = position, reader.line_num
        try:
            record = next(reader, None)
        except csv.Error:
            record = ["refused when it is read"]
        if record is None:
            yield start, number
            return
        if record:
            yield start, number
