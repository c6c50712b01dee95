"""Choose the reader of a file by its content and suffix. Each file format has two readers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePath
from typing import NamedTuple

from sftstream.sources.content import (
    HEAD,
    codec_of,
    is_array,
    is_readable,
    kind_of,
    require_lines,
    require_row,
    require_rows,
    shows_rows,
)
from sftstream.sources.file_formats.arrow import arrow, arrow_forward
from sftstream.sources.file_formats.compressed import CODECS, text_from, unpacked
from sftstream.sources.file_formats.delimited import Delimited, records_forward
from sftstream.sources.file_formats.json_array import JsonArray, elements_forward
from sftstream.sources.file_formats.jsonl import JsonLines, lines_forward
from sftstream.sources.file_formats.parquet import parquet, parquet_forward
from sftstream.sources.location import FileLocation
from sftstream.sources.rows import Place, ReadRow, RowFile, RowsFrom, Text
from sftstream.sources.stored import Stored


class FileFormat(NamedTuple):
    """The two readers of a file format."""

    by_number: Callable[[Stored], RowFile]
    """Opens a local file for reading by row number."""
    forward: Callable[[Text, int, Text | None], RowsFrom]
    """`forward(text, start, rest)` reads the rows of an open file from row `start`, or from an
    earlier row, to the end. `rest` is the content from row `start` on, or None if the place of the
    row is unknown."""


def _json_by_number(stored: Stored, *, lines: bool) -> RowFile:
    # Many published .json files contain JSON lines, and some .jsonl files contain an array.
    head = _head(stored)
    if is_array(head, lines=lines):
        return JsonArray(stored)
    codec = codec_of(_head(stored.original)) if stored.original else None
    require_lines(head, stored.display_name, codec)
    rows = JsonLines(stored)
    if len(rows) == 1:
        require_row(rows.read(0), stored.display_name, codec)
    return rows


def _json_forward(text: Text, start: int, rest: Text | None, *, lines: bool) -> RowsFrom:
    head = text.file.peek(HEAD)
    if is_array(head, lines=lines):
        return elements_forward(text, start)
    require_lines(head, text.display_name, text.codec)
    read = lines_forward(text, start, rest)
    return read if rest else read._replace(rows=_checked(read.rows, text))


def _checked(rows: Iterator[ReadRow], text: Text) -> Iterator[ReadRow]:
    """Yield `rows`; raises ValueError if the file has a single row with several rows inside."""
    for number, row in enumerate(rows):
        if number == 0 and not text.file.peek(HEAD).strip():
            require_row(row(), text.display_name, text.codec)
        yield row


def _json(*, lines: bool) -> FileFormat:
    return FileFormat(partial(_json_by_number, lines=lines), partial(_json_forward, lines=lines))


def _delimited(delimiter: str) -> FileFormat:
    return FileFormat(partial(Delimited, delimiter=delimiter), partial(records_forward, delimiter=delimiter))


FILE_FORMATS = {
    ".jsonl": _json(lines=True),
    ".ndjson": _json(lines=True),
    ".json": _json(lines=False),
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": FileFormat(parquet, parquet_forward),
    ".arrow": FileFormat(arrow, arrow_forward),
}
"""Suffix of a file name -> readers of the format."""
SUFFIXES = (*FILE_FORMATS, *CODECS)
"""Known suffixes, of formats and of compression."""
KNOWN = f"{', '.join(FILE_FORMATS)}, and these with .gz, .zst, .bz2 or .xz"
"""List of the known suffixes, for messages."""


def is_known(name: str) -> bool:
    """Return True if a file name has a known suffix."""
    return _suffixes(name)[0] in FILE_FORMATS


def open_file(location: FileLocation) -> RowFile:
    """Open a file for reading by row number.

    If content and suffix disagree, the content decides. Raises ValueError if the suffix is unknown,
    or the file cannot contain rows.
    """
    kind, packed = _suffixes(location.name)
    stored = location.stored()
    head = _head(stored)
    if codec := _codec(head, packed):
        stored = unpacked(stored, codec)
        head = _head(stored)
    require_rows(head, location.display_name)
    return _format(head, kind, location).by_number(stored)


def read_forward(location: FileLocation, start: int, place: Place | None = None) -> RowsFrom:
    """Read the rows of a file from row `start`, or from an earlier row, to the end.

    `place` is the place of row `start`; None if unknown. If content and suffix disagree, the
    content decides. Raises ValueError, now or during reading, if the file cannot contain rows.
    """
    kind, packed = _suffixes(location.name)
    name, file = location.display_name, location.open()
    codec = _codec(file.peek(HEAD), packed)
    text = text_from(file, name, codec)._replace(codec=codec)
    head = text.file.peek(HEAD)
    require_rows(head, name)
    rest = None if place is None else text_from(location.open(), name, codec, place)
    return _format(head, kind, location).forward(text, start, rest)


def _format(head: bytes, suffix: str, location: FileLocation) -> FileFormat:
    """Return the format of a file with the first bytes `head`; raises ValueError if unknown."""
    if suffix not in FILE_FORMATS and not shows_rows(head):
        raise ValueError(
            f"{location.display_name} has the unknown suffix {PurePath(location.name).suffix!r}, and its content shows "
            f"neither JSON nor a table; name the file by its kind: {KNOWN}"
        )
    return FILE_FORMATS[kind_of(head, suffix if suffix in FILE_FORMATS else ".json")]


def _codec(head: bytes, packed: str) -> str | None:
    """Return the codec shown by the first bytes, or by the suffix if the bytes are unknown."""
    return codec_of(head) or (CODECS[packed] if packed and head and not is_readable(head) else None)


def _head(stored: Stored) -> bytes:
    with stored.open() as file:
        return file.read(HEAD)


def _suffixes(name: str) -> tuple[str, str]:
    """Return the suffixes of format and compression: "a.JSONL.gz" -> (".jsonl", ".gz")."""
    path = PurePath(name.lower())
    if path.suffix in CODECS:
        return PurePath(path.stem).suffix, path.suffix
    return path.suffix, ""
