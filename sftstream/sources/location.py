"""Define locations of files: the interface, and the class for local paths."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Protocol

from sftstream.sources.rows import FileIdentity, Seal, Stored, sealed, stored

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\..*)?")


class FileLocation(Protocol):
    """A file, a directory or a glob, local or remote."""

    @property
    def display_name(self) -> str:
        """The location as the user wrote it, for messages."""

    @property
    def name(self) -> str:
        """Last part of the path."""

    def is_file(self) -> bool: ...

    def is_directory(self) -> bool: ...

    def child(self, name: str) -> FileLocation:
        """Return the location of `name` in this directory."""

    def files(self) -> list[FileLocation]:
        """Return the files of a directory, sorted, without hidden files and subdirectories."""

    def matches(self) -> list[FileLocation]:
        """Return the files that match this glob, sorted."""

    def stored(self) -> Stored:
        """Return the file on a local disk, downloaded if remote; raises ValueError if
        unreadable."""

    def open(self) -> BufferedReader:
        """Open the file without downloading it; raises OSError."""

    def change_marker(self) -> object:
        """Return a value that changes when the file changes, without reading the file.

        For example size and modification time. Raises OSError.
        """

    def fingerprint(self) -> tuple[object, FileIdentity]:
        """Return the change marker and the identity, without downloading the file.

        Raises ValueError if the server sends no version that identifies the content.
        """


@dataclass(frozen=True)
class LocalLocation:
    """A local path."""

    path: Path
    full: bool = False
    """True if the digest covers every byte, also of files above 256 MiB."""

    @property
    def display_name(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def is_file(self) -> bool:
        return self.path.is_file()

    def is_directory(self) -> bool:
        return self.path.is_dir()

    def child(self, name: str) -> LocalLocation:
        return replace(self, path=self.path / name)

    def files(self) -> list[FileLocation]:
        paths = sorted(path for path in self.path.iterdir() if path.is_file() and path.name[0] != ".")
        return [replace(self, path=path) for path in paths]

    def matches(self) -> list[FileLocation]:
        paths = sorted(map(Path, glob.glob(str(self.path), recursive=True)))
        return [replace(self, path=path) for path in paths if path.is_file()]

    def stored(self) -> Stored:
        try:
            return stored(self.path, full=self.full)
        except OSError as error:
            raise ValueError(f"{self.display_name} cannot be read: {error.strerror or error}") from None

    def open(self) -> BufferedReader:
        return self.path.open("rb")

    def change_marker(self) -> Seal:
        return sealed(self.path.stat())

    def fingerprint(self) -> tuple[Seal, FileIdentity]:
        read = self.stored()
        return read.seal, read.identity


def require_whole(directory: str, names: list[str]) -> None:
    """Raise ValueError if files are missing among names such as `train-00001-of-00005.jsonl`."""
    found: dict[tuple[str, int, str], set[int]] = {}
    for match in filter(None, map(_SHARD.fullmatch, names)):
        series = (match["stem"], int(match["count"]), match["suffix"] or "")
        found.setdefault(series, set()).add(int(match["number"]))
    for (stem, count, suffix), numbers in found.items():
        if missing := sorted(set(range(count)) - numbers):
            raise ValueError(
                f"{directory} lacks {len(missing)} of {count} files, first {stem}-{missing[0]:05}-of-{count:05}{suffix}; "
                "restore the files, or name the present files by a glob"
            )
