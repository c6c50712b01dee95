"""What every kind of storage offers: rows by number, and an identity that changes when the content does."""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from sftstream.records import RawRow

SAMPLED_ABOVE = 256 << 20
"""Bytes above which a file's digest samples it: SHA-256 of 256 MB takes 0.2 s, of 1 TB a quarter of an hour."""
_DESCRIPTORS, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
OPEN_FILES = 1 << 16 if _DESCRIPTORS == resource.RLIM_INFINITY else max(16, _DESCRIPTORS // 8)
"""Files of a kind that a process keeps open: a source may have more shards than a process may have descriptors."""
BOM = b"\xef\xbb\xbf"
_BLOCK, _BLOCKS = 1 << 20, 128


class FileIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds, wherever it lies and whenever it was written."""

    name: str
    size: int
    sha256: str
    sampled: bool = False
    """The digest is of a part of the content."""


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
        """Raise RuntimeError if a broken row is the fault of a damaged row index or a changed file."""


ReadRow = Callable[[], RawRow]
"""Reads a row that a forward reader has reached; raises BrokenRow. A row that is skipped costs no decoding."""


class RowsFrom(NamedTuple):
    """Rows in file order, and the number of the first."""

    first: int
    rows: Iterator[ReadRow]


def skip_bom(file: BufferedReader) -> BufferedReader:
    """Return `file`, read past a UTF-8 byte order mark if there is one."""
    if file.peek(len(BOM)).startswith(BOM):
        file.read(len(BOM))
    return file


Seal = tuple[int, int, int]
"""Size, time of modification in nanoseconds, inode."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A file on a local disk whose content is known."""

    path: Path
    """Where its bytes lie: the user's own file, or a copy in the cache."""
    display_name: str
    """What the user calls it."""
    identity: FileIdentity
    """Of the user's file, whatever is read in its place."""
    key: str
    """Names in the cache what is derived from the file."""
    seal: Seal

    def open(self) -> FileIO:
        """The file, if it is still the one whose content is known; else RuntimeError."""
        file = FileIO(self.path)
        self.require_unchanged(file)
        return file

    def require_unchanged(self, file: FileIO) -> None:
        if sealed(os.fstat(file.fileno())) != self.seal:
            raise RuntimeError(f"{self.display_name} changed while it was read; restore it, or start again")


def stored(path: Path, display_name: str | None = None, *, full: bool = False) -> Stored:
    """A file of the user's, read once for its digest."""
    seal = sealed(path.stat())
    identity = identify(path, full=full)
    # What a sample does not see, a new time of modification or inode tells of.
    key = derived(identity.sha256, identity.size, *(seal if identity.sampled else ()))
    return Stored(path, display_name or str(path), identity, key, seal)


def copy_of(original: Stored, path: Path, key: str) -> Stored:
    """What is read in the place of `original`."""
    return Stored(path, original.display_name, original.identity, key, sealed(path.stat()))


def derived(*words: object) -> str:
    """A name in the cache for what is made from `words`."""
    return hashlib.sha256("\0".join(map(str, words)).encode()).hexdigest()


def identify(path: Path, *, full: bool = False) -> FileIdentity:
    """Digest of the content: all of it, or 128 evenly spread megabytes of a huge file unless it is to be `full`."""
    size = path.stat().st_size
    sampled = size > SAMPLED_ABOVE and not full
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if not sampled:
            while block := file.read(_BLOCK):
                digest.update(block)
        else:
            for i in range(_BLOCKS):
                file.seek(i * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return FileIdentity(name=path.name, size=size, sha256=digest.hexdigest(), sampled=sampled)


def sealed(stat: os.stat_result) -> Seal:
    """What is another when a file has changed."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
