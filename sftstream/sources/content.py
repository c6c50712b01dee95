"""Recognize a file by its first bytes: compression, format, and common mistakes."""

from __future__ import annotations

import codecs
import json

import msgspec

from sftstream.excerpt import excerpt
from sftstream.records import UNDECODABLE, RawRow
from sftstream.sources.rows import BOM

HEAD = 1 << 16
"""Number of first bytes of a file that are examined."""
_MAGIC = 6
"""Length of the longest mark in `_CODECS`. Fewer bytes may be a truncated mark."""
_CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bz2"}
_TABLES = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\xff\xff\xff\xff": ".arrow"}
_OTHERS = {
    b"SQLite format 3": "a SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy file",
    b"ORC": "an ORC table",
    b"Obj\x01": "an Avro file",
    b"%PDF": "a PDF document",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}
"""First bytes of formats that are not read."""
_ARCHIVES = (b"PK\x03\x04", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07")
_HTML = (b"<!doctype html", b"<html", b"<head", b"<?xml")
_LINES = 10
"""Number of lines at the beginning of a file of which one must be JSON."""
_HOLDERS = frozenset(
    {"train", "training", "test", "validation", "valid", "val", "dev", "eval"}
    | {"rows", "data", "dataset", "examples", "items", "samples", "records"}
)
"""Typical keys of a JSON object that contains all rows of a file: `{"train": [...]}`."""


def codec_of(head: bytes) -> str | None:
    """Return the codec of compressed content, recognized by its first bytes, else None."""
    return next((codec for magic, codec in _CODECS.items() if head.startswith(magic)), None)


def is_readable(head: bytes) -> bool:
    """Return True if the first bytes are of a table (Parquet, Arrow) or of UTF-8 text."""
    return _table(head) is not None or _is_text(head)


def kind_of(head: bytes, suffix: str) -> str:
    """Return the suffix of the format that the first bytes show, or `suffix` if they show none.

    For example ".parquet" for bytes that begin with `PAR1`, also if `suffix` is ".jsonl".
    """
    if table := _table(head):
        return table
    text = head.removeprefix(BOM).lstrip()
    if suffix in (".jsonl", ".ndjson", ".json") or text[:1] not in (b"{", b"[") or not _is_text(head):
        return suffix
    is_header = suffix in (".csv", ".tsv") and not _is_json(text.partition(b"\n")[0])
    return suffix if is_header else ".json"


def is_array(head: bytes, *, lines: bool) -> bool:
    """Return True if the first bytes begin a JSON array of rows, False for JSON lines.

    `lines` is True if the suffix of the file is that of JSON lines. Examples:

        [{"messages": ...},        an array over several lines
        [1, 2], then [3, 4]        JSON lines: the first line is a whole list, and more lines follow
        [{"messages": ...}]        an array: a single line with a list of objects
        [1, 2]                     JSON lines if `lines`, else an array
        [1, oops]                  JSON lines (with a broken row) if `lines`, else an array
    """
    line, _, rest = head.removeprefix(BOM).lstrip().partition(b"\n")
    if not line.startswith(b"["):
        return False
    try:
        elements = msgspec.json.decode(line)
    except UNDECODABLE as error:
        return not lines or "truncated" in str(error)
    return not rest.strip() and (not lines or all(isinstance(row, dict) for row in elements))


def require_rows(head: bytes, display_name: str) -> None:
    """Raise ValueError if the file cannot contain rows: an archive, a web page, UTF-16 text, ..."""
    text = head.removeprefix(BOM).lstrip()
    if head.startswith(b"version https://git-lfs.github.com/spec"):
        raise ValueError(f"{display_name} is a pointer of Git LFS, not the file itself; fetch the file by git lfs pull")
    if text[:20].lower().startswith(_HTML):
        raise ValueError(f"{display_name} is a web page; download the file itself, not the page that shows the file")
    if head.startswith(_ARCHIVES) or head[257:262] == b"ustar":
        raise ValueError(f"{display_name} is an archive of files; unpack the archive and name the files inside")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or _has_wide_letters(head):
        raise ValueError(f"{display_name} is UTF-16 or UTF-32 text; convert the file to UTF-8, for example by iconv")
    if head and not head.strip(b"\0"):
        raise ValueError(f"{display_name} begins with {len(head):,} zero bytes, as after a crash; restore the file")
    other = next((name for magic, name in _OTHERS.items() if head.startswith(magic)), None)
    if other and (not _is_text(head) or other == "a PDF document"):
        raise ValueError(f"{display_name} is {other}, which is not read; write the rows as JSON lines or Parquet")


def shows_rows(head: bytes) -> bool:
    """Return True if the first bytes alone, without a suffix, show a table or JSON rows."""
    text = head.removeprefix(BOM).lstrip()
    line = text.partition(b"\n")[0]
    is_json = text[:1] in (b"{", b"[") and (_is_truncated(line) or not _is_broken(line))
    return _table(head) is not None or (is_json and _is_text(head))


def require_lines(head: bytes, display_name: str) -> None:
    """Raise ValueError if a file is not JSON lines.

    Objects written over several lines are recognized, and a file whose first ten lines are no JSON:
    comma-separated values, Python's notation, objects with a comma after each, ...
    """
    line, _, rest = head.removeprefix(BOM).lstrip().partition(b"\n")
    begun = rest.lstrip()[:1]
    if line.startswith(b"{") and begun and begun not in (b"{", b"[") and not _is_json(line) and _is_truncated(line):
        raise ValueError(
            f"{display_name} holds JSON objects written over several lines; write each row on a line of its own, for "
            f"example by jq -c . {display_name}"
        )
    lines = [line for line in head.removeprefix(BOM).split(b"\n")[:-1] if line.strip()][:_LINES]
    if len(lines) == _LINES and all(map(_is_broken, lines)):
        raise ValueError(
            f"{display_name} is not JSON lines: none of its first {_LINES} lines is JSON, such as "
            f"{excerpt(lines[0].decode(errors='replace'))}; write a JSON object on each line, or name the file by its kind"
        )


def require_row(text: RawRow, display_name: str) -> None:
    """Raise ValueError if the only row of a file contains many rows: `{"train": [...]}`."""
    try:
        row = msgspec.json.decode(text) if isinstance(text, bytes) else text
    except UNDECODABLE:
        return
    held = [key for key in row if key in _HOLDERS and _holds_rows(row[key])] if isinstance(row, dict) else []
    if held:
        raise ValueError(
            f"{display_name} is one JSON object with rows under {', '.join(map(repr, held))}; write the rows as a file "
            f"of their own, for example by jq -c '.{held[0]}[]' {display_name}"
        )


def _table(head: bytes) -> str | None:
    return next((suffix for magic, suffix in _TABLES.items() if head.startswith(magic)), None)


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut off
    except UnicodeDecodeError:
        return False
    return len(head) >= _MAGIC and b"\0" not in head


def _has_wide_letters(head: bytes) -> bool:
    """Return True if every second of the first four bytes is zero, as in UTF-16 of English text."""
    first = head[:4]
    return len(first) == 4 and (first[0::2] == b"\0\0") != (first[1::2] == b"\0\0")


def _is_json(line: bytes) -> bool:
    try:
        msgspec.json.decode(line)
    except UNDECODABLE:
        return False
    return True


def _is_broken(line: bytes) -> bool:
    """Return True for a line that is not JSON, not even JSON with values such as NaN."""
    if _is_json(line):
        return False
    try:
        json.loads(line)
    except RecursionError:
        return False
    except ValueError:
        return True
    return False


def _is_truncated(line: bytes) -> bool:
    try:
        msgspec.json.decode(line)
    except UNDECODABLE as error:
        return "truncated" in str(error)
    return False


def _holds_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
