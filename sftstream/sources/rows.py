"""Define the interface of files of rows, and the identity of a file's content."""

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


Seal = tuple[int, int, int]
"""Size in bytes, modification time in nanoseconds, inode of a file."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A file on a local disk: the user's file or a copy of it, with the identity of the content."""

    path: Path
    """The user's file, or a copy in the cache."""
    display_name: str
    """The file's name in messages."""
    identity: FileIdentity
    """Identity of the user's file, also if `path` is a copy."""
    key: str
    """Key of the content; the keys of derived files in the cache are computed from it."""
    seal: Seal
    """Size, modification time and inode of the file at `path` when it was read first."""

    def open(self) -> FileIO:
        """Open the file; raises RuntimeError if the file has changed since `seal` was taken."""
        file = FileIO(self.path)
        self.require_unchanged(file)
        return file

    def require_unchanged(self, file: FileIO) -> None:
        """Raise RuntimeError if the open file has changed since `seal` was taken."""
        if sealed(os.fstat(file.fileno())) != self.seal:
            raise RuntimeError(f"{self.display_name} changed while it was read; restore the file, or start again")


def stored(path: Path, display_name: str | None = None, *, full: bool = False) -> Stored:
    """Read the user's file at `path` once to compute its digest, and return it as a Stored."""
    seal = sealed(path.stat())
    identity = identify(path, full=full)
    # A change outside the sample changes the modification time or the inode.
    key = derived(identity.sha256, identity.size, *(seal if identity.sampled else ()))
    return Stored(path, display_name or str(path), identity, key, seal)


def begins_with(stored: Stored, before: FileIdentity) -> bool:
    """Return True if a file begins with the whole content of the file `before`."""
    if before.sampled or before.size > stored.seal[0]:
        return False
    digest, left = hashlib.sha256(), before.size
    with stored.open() as file:
        while left and (block := file.read(min(left, _BLOCK))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest() == before.sha256


def copy_of(original: Stored, path: Path, key: str) -> Stored:
    """Return the copy at `path`, to be read in place of `original`."""
    return Stored(path, original.display_name, original.identity, key, sealed(path.stat()))


def derived(*words: object) -> str:
    """Return the cache key of a derived file: the SHA-256 of `words`."""
    return hashlib.sha256("\0".join(map(str, words)).encode()).hexdigest()


def identify(path: Path, *, full: bool = False) -> FileIdentity:
    """Return the identity of a file's content.

    The digest covers every byte if the file has up to `SAMPLED_ABOVE` bytes or `full` is True, else
    128 evenly spread slices of 1 MiB.
    """
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
    """Return the seal of a file: a value that changes when the file changes."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
