"""What every kind of storage offers: rows by number, and an identity that changes when the content does."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import msgspec

SAMPLED_ABOVE = 256 << 20
"""Bytes above which a file's digest samples it: SHA-256 of 256 MB takes 0.2 s, of 1 TB a quarter of an hour."""
BOM = b"\xef\xbb\xbf"
_BLOCK, _BLOCKS = 1 << 20, 128


class BrokenRow(ValueError):
    """This row cannot be read; the rows around it can."""


UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What `msgspec.json.decode` raises on bytes that are no JSON, or JSON nested deeper than Python follows."""


class FileIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds, wherever it lies and whenever it was written."""

    name: str
    size: int
    sha256: str


class RowFile(Protocol):
    """One file of rows."""

    path: Path

    def __len__(self) -> int: ...

    def read(self, row: int) -> Any:
        """The decoded row; raises `BrokenRow`."""

    def place(self, row: int) -> str:
        """Where an editor finds the row, for messages."""


def identify(path: Path) -> FileIdentity:
    """Digest of the content: all of it, or 128 evenly spread megabytes of a huge file."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= SAMPLED_ABOVE:
            while block := file.read(_BLOCK):
                digest.update(block)
        else:
            for i in range(_BLOCKS):
                file.seek(i * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return FileIdentity(name=path.name, size=size, sha256=digest.hexdigest())
