"""Where files lie, and on this machine first."""

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
    """A file, a directory, or a glob."""

    @property
    def display_name(self) -> str:
        """As the user writes it."""

    @property
    def name(self) -> str: ...

    def is_file(self) -> bool: ...

    def is_directory(self) -> bool: ...

    def child(self, name: str) -> FileLocation: ...

    def files(self) -> list[FileLocation]:
        """A directory's own files but hidden ones, sorted."""

    def matches(self) -> list[FileLocation]:
        """The files that a glob matches, sorted."""

    def stored(self) -> Stored:
        """The file on a local disk; raises ValueError where it cannot be read."""

    def open(self) -> BufferedReader:
        """The file as it lies there; raises OSError."""

    def change_marker(self) -> object:
        """What is another when the file has changed, and is had without reading it; raises OSError."""

    def fingerprint(self) -> tuple[object, FileIdentity]:
        """Its `mark`, and what tells its content from another, without fetching it; raises ValueError where nothing does."""


@dataclass(frozen=True)
class LocalLocation:
    """A path of this machine."""

    path: Path
    full: bool = False
    """Huge files are known by every byte."""

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
    """Raises ValueError where shards are missing of those that say in their names how many there are."""
    shards: dict[tuple[str, int, str], set[int]] = {}
    for match in filter(None, map(_SHARD.fullmatch, names)):
        series = (match["stem"], int(match["count"]), match["suffix"] or "")
        shards.setdefault(series, set()).add(int(match["number"]))
    for (stem, count, suffix), numbers in shards.items():
        if missing := sorted(set(range(count)) - numbers):
            raise ValueError(
                f"{directory} lacks {len(missing)} of {count} shards, {stem}-{missing[0]:05}-of-{count:05}{suffix} the first; "
                "restore them, or name the files that are there by a glob"
            )
