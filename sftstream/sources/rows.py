"""Define the interface of files of rows, and the identity of a file's content."""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Callable, Iterator
from io import BufferedReader, FileIO
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

import msgspec

from sftstream.records import RawRow

SAMPLED_ABOVE = 256 << 20
"""Size in bytes above which a digest covers a sample of a file. SHA-256 takes 0.2 s for 256 MB and
15 minutes for 1 TB."""
_DESCRIPTORS, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
OPEN_FILES = 128 if _DESCRIPTORS == resource.RLIM_INFINITY else min(128, max(16, _DESCRIPTORS // 8))
"""Number of files of a format that a process keeps open. A source may have more files than a
process may have file descriptors."""
BOM = b"\xef\xbb\xbf"
_BLOCK, _BLOCKS = 1 << 20, 128


class FileIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Name, size and digest of a file. Directory and modification time do not matter."""

    name: str
    size: int
    sha256: str
    sampled: bool = False
    """True if `sha256` covers a sample of the content."""


class RowFile(Protocol):
    """The rows of one file, by number."""

    @property
    def identity(self) -> FileIdentity: ...

    def __len__(self) -> int: ...

    def read(self, row: int) -> RawRow:
        """Return a row as stored.

        Raises BrokenRow if the row cannot be read, and RuntimeError if the file has changed.
        """

    def locate_row(self, row: int) -> str:
        """Return the row's location for messages and editors: `path:line` or `path[index]`."""

    def require_intact(self, row: int) -> None:
        """Raise RuntimeError if a row is broken by a damaged row index or a changed file."""

    def require_unchanged(self) -> None:
        """Raise RuntimeError if the content of the open file has changed."""

    def digest_in_full(self, interrupted: Callable[[], bool], *, quiet: bool) -> str | None:
        """Return the SHA-256 of all bytes of the user's file; None if there is no such file.

        Takes 1 s a GB, once a machine. Raises Interrupted if `interrupted()` turns true, and
        RuntimeError if the file has changed.
        """


ReadRow = Callable[[], RawRow]
"""Function that reads and returns a row, or raises BrokenRow. If it is not called, the row is
skipped without being decoded."""


class Place(NamedTuple):
    """A byte of a file's content, in a form from which reading can begin."""

    offset: int
    """Byte of the stored file: the byte itself, or if the file is compressed a byte before it at
    which unpacking can begin."""
    skipped: int = 0
    """Number of unpacked bytes between `offset` and the byte."""


class RowsFrom(NamedTuple):
    """Rows in the order of the file, and the number of the first row."""

    first: int
    rows: Iterator[ReadRow]
    place: Callable[[], Place] | None = None
    """Returns the place from which the next row of `rows` can be read; None if the rows of the
    format can be read only from the file's beginning, or need no place."""


class Bookmark(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A row of a streamed source from which reading can begin."""

    file: int
    """Number of the file in the source."""
    row: int
    """Number of the row in the file."""
    offset: int
    skipped: int
    """The `Place` of the row."""
    digest: int
    """32-bit digest of the row and its number."""


class Text(NamedTuple):
    """The unpacked content of a text file, from the file's beginning or from a row on."""

    file: BufferedReader
    display_name: str
    place: Callable[[int], Place]
    """`place(n)` is the place of byte `n` of `file`, counted from where `file` began."""
    codec: str | None = None
    """Codec of the compressed file that is unpacked; None if unknown or not compressed."""


def after_bom(file: BufferedReader) -> int:
    """Move `file` after its UTF-8 byte order mark, and return the mark's size: 3, or 0 if the file
    has none."""
    return len(file.read(len(BOM))) if file.peek(len(BOM)).startswith(BOM) else 0


def refuse_carriage_returns(place: str) -> NoReturn:
    """Raise ValueError for text whose lines end in a carriage return alone, as of old Macs."""
    raise ValueError(
        f"{place} has lines that end in a carriage return without a line feed; convert them, for example by tr '\\r' '\\n'"
    )


def identify(path: Path, *, full: bool = False) -> FileIdentity:
    """Return the identity of a file's content.

    The digest covers every byte if the file has up to `SAMPLED_ABOVE` bytes or `full` is True, else
    128 evenly spread slices of 1 MiB.
    """
    with path.open("rb") as file:
        return identify_open(file, path.name, full=full)


def identify_open(file: BufferedReader | FileIO, name: str, *, full: bool = False) -> FileIdentity:
    """Return the identity of an open file's content, as `identify` does."""
    size = os.fstat(file.fileno()).st_size
    sampled = size > SAMPLED_ABOVE and not full
    digest = hashlib.sha256()
    starts = [i * (size - _BLOCK) // (_BLOCKS - 1) for i in range(_BLOCKS)] if sampled else range(0, size, _BLOCK)
    for start in starts:
        digest.update(os.pread(file.fileno(), _BLOCK, start))
    return FileIdentity(name=name, size=size, sha256=digest.hexdigest(), sampled=sampled)
