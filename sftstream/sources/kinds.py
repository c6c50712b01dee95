"""The kinds of files, by suffix, and the two readers of each kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from io import BufferedReader
from pathlib import PurePath
from typing import NamedTuple

from sftstream.sources.arrow import arrow, arrow_forward
from sftstream.sources.compressed import CODECS, unpacked, unpacking
from sftstream.sources.delimited import Delimited, records_forward
from sftstream.sources.json_array import JsonArray, begins_array, elements_forward
from sftstream.sources.jsonl import JsonLines, lines_forward
from sftstream.sources.location import FileLocation
from sftstream.sources.parquet import parquet, parquet_forward
from sftstream.sources.rows import RowFile, RowsFrom, Stored

_HEAD = 4096
"""First bytes of a .json file, read to tell a JSON array from JSON lines."""


class FileKind(NamedTuple):
    """The two readers of one kind of file."""

    by_number: Callable[[Stored], RowFile]
    """Opens a file on a local disk for random access."""
    forward: Callable[[BufferedReader, str, int], RowsFrom]
    """Reads an open file, given its name, from a start row or any earlier row to the end."""


def _json_by_number(stored: Stored) -> RowFile:
    # Many published .json files hold JSON lines.
    with stored.open() as file:
        array = begins_array(file.read(_HEAD))
    return JsonArray(stored) if array else JsonLines(stored)


def _json_forward(file: BufferedReader, name: str, start: int) -> RowsFrom:
    forward = elements_forward if begins_array(file.peek(_HEAD)) else lines_forward
    return forward(file, name, start)


def _delimited(delimiter: str) -> FileKind:
    return FileKind(partial(Delimited, delimiter=delimiter), partial(records_forward, delimiter=delimiter))


KINDS = {
    ".jsonl": FileKind(JsonLines, lines_forward),
    ".ndjson": FileKind(JsonLines, lines_forward),
    ".json": FileKind(_json_by_number, _json_forward),
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": FileKind(parquet, parquet_forward),
    ".arrow": FileKind(arrow, arrow_forward),
}
"""Suffix of a file name -> readers."""
KNOWN = f"{', '.join(KINDS)}, and these with {' or '.join(CODECS)}"
"""The known suffixes, for messages."""


def is_known(name: str) -> bool:
    """Return True if a file name has a known suffix."""
    return _suffixes(name)[0] in KINDS


def open_file(location: FileLocation) -> RowFile:
    """Open a file for reading by row number.

    Raises ValueError if the suffix is unknown, or the content does not fit the suffix.
    """
    kind, packed = _suffixes(location.name)
    if kind not in KINDS:
        raise ValueError(f"{location.display_name} has the unknown suffix {kind + packed!r}; known are {KNOWN}")
    stored = location.stored()
    return KINDS[kind].by_number(unpacked(stored, packed) if packed else stored)


def read_forward(location: FileLocation, start: int) -> RowsFrom:
    """Read the rows of a file from row `start`, or any earlier row, to the end.

    Raises ValueError, now or during reading, if the content does not fit the suffix.
    """
    kind, packed = _suffixes(location.name)
    file = unpacking(location.open(), packed) if packed else location.open()
    return KINDS[kind].forward(file, location.display_name, start)


def _suffixes(name: str) -> tuple[str, str]:
    """Return the suffixes of kind and compression: "a.jsonl.gz" -> (".jsonl", ".gz")."""
    path = PurePath(name)
    packed = path.suffix if path.suffix in CODECS else ""
    return PurePath(name.removesuffix(packed)).suffix, packed
