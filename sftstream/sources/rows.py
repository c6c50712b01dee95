"""Define the interface of files of rows, and the identity of a file's content."""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Callable, Iterator
from io import BufferedReader, FileIO
from pathlib import Path
from typing import NamedTuple, Protocol

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


class RowsFrom(NamedTuple):
    """Rows in the order of the file, and the number of the first row."""

    first: int
    rows: Iterator[ReadRow]


def skip_bom(file: BufferedReader) -> BufferedReader:
    """Return `file`, positioned after its UTF-8 byte order mark if it has one."""
    if file.peek(len(BOM)).startswith(BOM):
        file.read(len(BOM))
    return file


def derived(*words: object) -> str:
    """Return the cache key of a derived file: the SHA-256 of `words`."""
    return hashlib.sha256("\0".join(map(str, words)).encode()).hexdigest()


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
