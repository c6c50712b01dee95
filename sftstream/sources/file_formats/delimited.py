"""Read CSV and TSV files: a header, then records with the same number of cells (RFC 4180).

A quoted cell may contain line breaks, so a record may have several lines.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from io import BufferedReader, FileIO
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from sftstream.records import BrokenRow
from sftstream.sources.row_index import IndexedFile, Integers
from sftstream.sources.rows import BOM, RowsFrom, Text, after_bom, refuse_carriage_returns
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
    Raises ValueError for the same files as `records_forward`.
    """

    def __init__(self, stored: Stored, delimiter: str) -> None:
        name = stored.display_name
        super().__init__(stored, f"whole records {delimiter}", lambda file, _: _divide(file, delimiter, name))
        self._delimiter = delimiter
        self._columns = _header(self._index.head().removeprefix(BOM), delimiter, name)

    def read(self, row: int) -> dict[str, str]:
        return _record(self._index.read(row), self._delimiter, self._columns)


def records_forward(text: Text, start: int, rest: Text | None = None, *, delimiter: str) -> RowsFrom:
    """Read the records of a file in order.

    `rest` is the content from record `start` on. Without `rest`, the first record is record 0, as
    in `lines_forward`. Raises ValueError if the header is unusable, and during reading if a quote
    or a carriage return may join rows to one record.
    """
    whole = _Records(text.file, delimiter, text.display_name)
    records = _Records(rest.file, delimiter, text.display_name, whole.columns) if rest else whole
    place = (rest or text).place
    read = _located(records, whole) if rest else records
    rows = (partial(_record, record, delimiter, whole.columns) for record in read)
    return RowsFrom(start if rest else 0, rows, lambda: place(records.end.offset))


class _Border(NamedTuple):
    """A border between records."""

    offset: int
    """Number of bytes before the border."""
    line: int
    """Number of lines before the border."""


class _Records:
    """The records of a file that are not blank, without the header; can be iterated over once.

    `csv.reader` divides the lines. It reads on after every mistake: a quote that is left open joins
    all rows up to the next quote to one record. So iteration raises ValueError at a record that is
    longer than a line, and is not CSV or has more or fewer cells than the header.
    """

    def __init__(
        self, file: BufferedReader, delimiter: str, display_name: str, columns: list[str] | None = None
    ) -> None:
        """Read `file` from its beginning, or from a record on if the `columns` are given."""
        self._file, self._delimiter, self.display_name = file, delimiter, display_name
        self._lines: list[bytes] = []
        """Lines of the record that is being read."""
        self._ended = False
        """True if the file ended inside the record."""
        self.begin = self.end = _Border(0 if columns else after_bom(file), 0)
        """Borders before and after the record read last."""
        self.columns = columns or []
        """Names of the columns; empty while the header is read."""
        self._read = self._divided()
        if not columns:
            self.columns = _header(next(self._read, b""), delimiter, display_name)

    def __iter__(self) -> Iterator[bytes]:
        return self._read

    def _divided(self) -> Iterator[bytes]:
        reader = csv.reader(self._decoded(), delimiter=self._delimiter, strict=True)
        while True:
            try:
                if (cells := next(reader, None)) is None:
                    return
                mistake = _miscounted(cells, self.columns)
            except csv.Error as error:
                mistake = f"is not CSV: {_reason(error)}"
            record = b"".join(self._lines)
            self.begin, self.end = self.end, _Border(self.end.offset + len(record), self.end.line + len(self._lines))
            self._lines.clear()
            if mistake:
                self._require_one_row(record, mistake)
            if record := record.strip(b"\r\n"):
                yield record

    def _decoded(self) -> Iterator[str]:
        for line in self._file:
            self._lines.append(line)
            text = line.decode("latin-1")  # quotes and line breaks are the same bytes in UTF-8
            # A carriage return alone would end the record, and the rest of the line would be lost.
            yield text.rstrip("\r\n").replace("\r", " ") + "\n" if "\r" in text else text
        self._ended = bool(self._lines)

    def _require_one_row(self, record: bytes, mistake: str) -> None:
        """Raise ValueError if the broken record read last may hold more rows than one."""
        text = record.decode("latin-1").replace("\r", " ")
        place = f"{self.display_name}:{self.begin.line + 1}"
        if self._ended:
            (*_, unclosed) = next(csv.reader([text], delimiter=self._delimiter))
            line = self.begin.line + text.count("\n") - unclosed.count("\n") + 1
            raise ValueError(
                f"{self.display_name}:{line} opens a quote that no later line closes; remove or close the quote, "
                "or restore the rest of the file"
            )
        if self.end.line > self.begin.line + 1 or _is_open(text, self._delimiter):
            raise ValueError(
                f"{place} begins a record of several lines that {mistake}; remove or close the quote that joins the lines, "
                "or correct the record"
            )
        if b"\r" in record.strip(b"\r\n"):
            refuse_carriage_returns(place)


def _is_open(line: str, delimiter: str) -> bool:
    """Return True if a quote is open at the end of a line, as the next row may begin there."""
    reader = csv.reader([line, ""], delimiter=delimiter)
    with suppress(csv.Error):  # a cell that is too long
        next(reader)
    return reader.line_num > 1


def _located(records: _Records, whole: _Records) -> Iterator[bytes]:
    """Yield `records`, the line of whose first is unknown. At an error, read the `whole` file up to
    the same error, which names the line; raises RuntimeError if the whole file has no error."""
    try:
        yield from records
    except ValueError as error:
        deque(whole, maxlen=0)
        raise RuntimeError(
            f"{whole.display_name} has no row at the place of the state's bookmark: the source changed, or the state is "
            "damaged; restore the source, or use another state"
        ) from error


def _header(text: bytes, delimiter: str, display_name: str) -> list[str]:
    """Return the column names of a header.

    The first name may be empty, because pandas writes such a column for its index. Raises
    ValueError if the header is unreadable, a name is repeated, or another name is empty.
    """
    try:
        columns = _cells(text, delimiter)
    except (csv.Error, UnicodeDecodeError) as error:
        if b"\r" in text.strip(b"\r\n"):
            refuse_carriage_returns(display_name)
        raise ValueError(
            f"{display_name} has no readable header: {_reason(error)}; write column names into the first line"
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
        raise BrokenRow(f"is not CSV: {_reason(error)}") from None
    if mistake := _miscounted(cells, columns):
        raise BrokenRow(mistake)
    return {column: cell for column, cell in zip(columns, cells, strict=True) if cell and column}


def _reason(error: csv.Error | UnicodeDecodeError) -> str:
    """Return the message of an error as a printable line; `csv` quotes a tab as itself."""
    return str(error).replace("\t", "\\t")


def _miscounted(cells: list[str], columns: list[str]) -> str:
    """Return the words for a record with more or fewer cells than columns, else "".

    No columns are an unread header, which may have any number of cells.
    """
    if not columns or len(cells) == len(columns):
        return ""
    return f"has {len(cells)} cells for the {len(columns)} columns of the header"


def _cells(text: bytes, delimiter: str) -> list[str]:
    """Return the cells of a record. Line breaks before and after the record are ignored."""
    return next(csv.reader([text.strip(b"\r\n").decode()], delimiter=delimiter, strict=True), [])


def _divide(file: FileIO, delimiter: str, display_name: str) -> Iterator[tuple[Integers, Integers]]:
    """Yield byte offsets and line numbers of the records after the header, for `RowIndex`."""
    records = _Records(open(file.fileno(), "rb", closefd=False), delimiter, display_name)  # noqa: SIM115
    borders = chain((records.begin for _ in records), (records.end for _ in range(1)))
    while len(part := np.fromiter(chain.from_iterable(islice(borders, _PART)), np.int64).reshape(-1, 2)):
        yield part[:, 0], part[:, 1]
