"""What every kind of storage offers: rows by number, and an identity that changes when the content does."""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import msgspec

SAMPLED_ABOVE = 256 << 20
"""Bytes above which a file's digest samples it: SHA-256 of 256 MB takes 0.2 s, of 1 TB a quarter of an hour."""
_DESCRIPTORS, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
OPEN_FILES = 1 << 16 if _DESCRIPTORS == resource.RLIM_INFINITY else max(16, _DESCRIPTORS // 8)
"""Files of a kind that a process keeps open: a source may have more shards than a process may have descriptors."""
BOM = b"\xef\xbb\xbf"
_BLOCK, _BLOCKS = 1 << 20, 128


class BrokenRow(ValueError):
    """This row cannot be read; the rows around it can."""


UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What `msgspec.json.decode` raises on bytes that are no JSON, or JSON nested deeper than Python follows."""


Decode = Callable[[bytes], Any]
"""Makes a row of its JSON text; raises what is `UNDECODABLE`."""

PLAIN: Decode = msgspec.json.decode
"""Objects as dicts."""


class FileIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds, wherever it lies and whenever it was written."""

    name: str
    size: int
    sha256: str
    sampled: bool = False
    """The digest is of a part of the content."""


class LocatesRows(Protocol):
    """Rows that have places."""

    def locate_row(self, row: int) -> str:
        """Where an editor finds the row, for messages."""


class RowFile(LocatesRows, Protocol):
    """One file of rows."""

    @property
    def identity(self) -> FileIdentity: ...

    def __len__(self) -> int: ...

    def read(self, row: int, decode: Decode = PLAIN) -> Any:
        """The decoded row, by `decode` where it is JSON; raises `BrokenRow`, or RuntimeError where the file has changed."""


def decoded_json(text: bytes, file: LocatesRows, row: int, decode: Decode = PLAIN) -> Any:
    """Raises `BrokenRow`."""
    try:
        return decode(text)
    except UNDECODABLE as error:
        raise BrokenRow(f"{file.locate_row(row)} is not JSON: {error}") from None


def renamed(content: Any, columns: Mapping[str, str], file: LocatesRows, row: int) -> Any:
    """A row with the columns that a source's `columns` names; raises `BrokenRow` where it has none of them."""
    if not isinstance(content, Mapping):
        return content
    result = {name: content[column] for name, column in columns.items() if column in content}
    if not result:
        wanted, found = sorted(columns.values()), sorted(map(str, content))
        raise BrokenRow(f"{file.locate_row(row)} has none of the columns {wanted}; it has {found}")
    return result


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
