"""Recognize a file by its first bytes: compression, format, and common mistakes."""

from __future__ import annotations

import codecs
import json
import re
import shlex
import struct
from collections.abc import Iterator
from pathlib import PurePath

import msgspec

from sftstream.excerpt import excerpt
from sftstream.records import UNDECODABLE, RawRow
from sftstream.sources.rows import BOM

HEAD = 1 << 16
"""Number of first bytes of a file that are examined."""
_MAGIC = 6
"""Length of the longest mark in `_CODECS`. Fewer bytes may be a truncated mark."""
_CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bz2"}
_UNPACK = {"gzip": "gzip -dc", "zstd": "zstd -dc", "xz": "xz -dc", "bz2": "bzip2 -dc"}
"""Codec -> command that unpacks its standard input."""
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
_ZIP, _OLE = b"PK\x03\x04", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
"""First bytes of a zip archive, and of office documents before 2007."""
_MEMBER = struct.Struct("<6xH10xI4xHH")
"""Header of a member of a zip archive: flags, packed size, lengths of the name and of more fields.
The name follows."""
_SIZE_FOLLOWS = 8
"""Flag of a member whose size is written after its content."""
_OFFICE = re.compile(
    rb"\[Content_Types\]\.xml|mimetype|(_rels|docProps|xl|word|ppt|visio)/.*\.(xml|rels|bin)|Index/.*\.iwa", re.DOTALL
)
"""Name of a part of an office document, which is a zip archive of such parts."""
_OFFICE_SUFFIXES = (".xlsx", ".xlsm", ".xlsb", ".ods", ".odt", ".docx", ".pptx", ".numbers")
_ZIPPED = {b".npy": "a NumPy archive", b"/data.pkl": "a file of torch.save"}
"""End of the first member's name -> other formats that are laid out as a zip archive."""
_ARCHIVES = (_ZIP, b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07")
_PAGE = re.compile(rb"(?>\s|<\?.*?\?>|<!--.*?-->)*+<(?:!doctype\s+html|html|head)\b", re.IGNORECASE | re.DOTALL)
"""Beginning of a web page, also after the declaration of XML and after comments."""
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Files that `datasets` and other tools write beside the rows of a dataset."""
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
    if head.startswith(b"version https://git-lfs.github.com/spec"):
        raise ValueError(f"{display_name} is a pointer of Git LFS, not the file itself; fetch the file by git lfs pull")
    _require_no_markup(head, display_name)
    if _is_office(head, display_name):
        raise ValueError(
            f"{display_name} is an Excel workbook or another office document (such as .xlsx, .xls, .ods or .docx); save it "
            "as CSV or JSON lines"
        )
    other = _other(head)
    if (other is None and head.startswith(_ARCHIVES)) or head[257:262] == b"ustar":
        raise ValueError(f"{display_name} is an archive of files; unpack the archive and name the files inside")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or _has_wide_letters(head):
        raise ValueError(f"{display_name} is UTF-16 or UTF-32 text; convert the file to UTF-8, for example by iconv")
    if head and not head.strip(b"\0"):
        raise ValueError(f"{display_name} begins with {len(head):,} zero bytes, as after a crash; restore the file")
    if other and (not _is_text(head) or other == "a PDF document"):
        raise ValueError(f"{display_name} is {other}, which is not read; write the rows as JSON lines or Parquet")


def shows_rows(head: bytes) -> bool:
    """Return True if the first bytes alone, without a suffix, show a table or JSON rows."""
    text = head.removeprefix(BOM).lstrip()
    line = text.partition(b"\n")[0]
    is_json = text[:1] in (b"{", b"[") and (_is_truncated(line) or not _is_broken(line))
    return _table(head) is not None or (is_json and _is_text(head))


def require_lines(head: bytes, display_name: str, codec: str | None) -> None:
    """Raise ValueError if a file is not JSON lines.

    `head` are the first unpacked bytes, and `codec` is the codec of a compressed file. Objects
    written over several lines are recognized, and a file whose first ten lines are no JSON:
    comma-separated values, Python's notation, objects with a comma after each, ...
    """
    line, _, rest = head.removeprefix(BOM).lstrip().partition(b"\n")
    begun = rest.lstrip()[:1]
    if line.startswith(b"{") and begun and begun not in (b"{", b"[") and not _is_json(line) and _is_truncated(line):
        _require_no_description(head, display_name)
        raise ValueError(
            f"{display_name} holds JSON objects written over several lines; write each row on a line of its own, "
            f"{_example('jq -c .', display_name, codec)}"
        )
    lines = [line for line in head.removeprefix(BOM).split(b"\n")[:-1] if line.strip()][:_LINES]
    if len(lines) == _LINES and all(map(_is_broken, lines)):
        raise ValueError(
            f"{display_name} is not JSON lines: none of its first {_LINES} lines is JSON, such as "
            f"{excerpt(lines[0].decode(errors='replace'))}; write a JSON object on each line, or name the file by its kind"
        )


def require_row(text: RawRow, display_name: str, codec: str | None) -> None:
    """Raise ValueError if the only row of a file contains many rows: `{"train": [...]}`.

    `codec` is the codec of a compressed file.
    """
    try:
        row = msgspec.json.decode(text) if isinstance(text, bytes) else text
    except UNDECODABLE:
        return
    held = [key for key in row if key in _HOLDERS and _holds_rows(row[key])] if isinstance(row, dict) else []
    if held:
        command = f"jq -c '.{held[0]}[]'"
        raise ValueError(
            f"{display_name} is one JSON object with rows under {', '.join(map(repr, held))}; write the rows as a file "
            f"of their own, {_example(command, display_name, codec)}"
        )


def _example(command: str, display_name: str, codec: str | None) -> str:
    """Return "for example by ...", with the line for a shell that filters a file by a command.

    The file is the standard input, since `gzip` and `zstd` refuse a file name of another suffix. A
    remote file has to be downloaded first, and is named as in the working directory.
    """
    is_remote = "://" in display_name
    name = PurePath(display_name.partition("?")[0]).name if is_remote else display_name
    steps = (f"{_UNPACK[codec]} < {shlex.quote(name)}", command) if codec else (f"{command} < {shlex.quote(name)}",)
    return f"for example{', after a download,' if is_remote else ''} by {' | '.join(steps)}"


def _require_no_markup(head: bytes, display_name: str) -> None:
    """Raise ValueError if a file is a web page or other XML."""
    text = head.removeprefix(BOM).lstrip()
    if _PAGE.match(text):
        raise ValueError(f"{display_name} is a web page; download the file itself, not the page that shows the file")
    if text.startswith(b"<?xml"):
        raise ValueError(
            f"{display_name} is XML, which is not read; write the rows as JSON lines or Parquet, or download the file again "
            "if the XML is the message of a server"
        )


def _require_no_description(head: bytes, display_name: str) -> None:
    """Raise ValueError if a file describes a dataset, so that its objects are no rows."""
    name = PurePath(display_name).name
    if name in _DESCRIPTIONS or (name == "state.json" and b'"_data_files"' in head):
        raise ValueError(
            f"{display_name} describes a dataset and holds no row; name the files with rows alone, for example by a glob"
        )


def _is_office(head: bytes, display_name: str) -> bool:
    """Return True for an office document: OLE, or a zip archive with its parts or suffix."""
    is_named = head.startswith(_ZIP) and display_name.lower().endswith(_OFFICE_SUFFIXES)
    return head.startswith(_OLE) or is_named or any(map(_OFFICE.fullmatch, _members(head)))


def _other(head: bytes) -> str | None:
    """Return the format of a file that is not read, in words; None if unknown."""
    zipped = next(_members(head), b"")
    names = [name for end, name in _ZIPPED.items() if zipped.endswith(end)]
    names += [name for magic, name in _OTHERS.items() if head.startswith(magic)]
    return next(iter(names), None)


def _members(head: bytes) -> Iterator[bytes]:
    """Yield the names of a zip archive's members that begin in its first bytes."""
    begin = 0
    while head.startswith(_ZIP, begin) and len(head) >= begin + _MEMBER.size:
        flags, size, name, more = _MEMBER.unpack_from(head, begin)
        begin += _MEMBER.size
        yield head[begin : begin + name]
        begin += name + more
        begin = head.find(_ZIP, begin) if flags & _SIZE_FOLLOWS else begin + size


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
