"""Where files lie, and on this machine first."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sftstream.sources.rows import Stored, stored

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\..*)?")


class Place(Protocol):
    """A file, a directory, or a glob."""

    @property
    def shown(self) -> str:
        """As the user writes it."""

    @property
    def name(self) -> str: ...

    def is_file(self) -> bool: ...

    def is_directory(self) -> bool: ...

    def child(self, name: str) -> Place: ...

    def files(self) -> list[Place]:
        """A directory's own files but hidden ones, sorted."""

    def matches(self) -> list[Place]:
        """The files that a glob matches, sorted."""

    def stored(self) -> Stored:
        """The file on a local disk; raises ValueError where it cannot be read."""


@dataclass(frozen=True)
class Local:
    """A path of this machine."""

    path: Path

    @property
    def shown(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def is_file(self) -> bool:
        return self.path.is_file()

    def is_directory(self) -> bool:
        return self.path.is_dir()

    def child(self, name: str) -> Local:
        return Local(self.path / name)

    def files(self) -> list[Place]:
        return [Local(path) for path in sorted(self.path.iterdir()) if path.is_file() and path.name[0] != "."]

    def matches(self) -> list[Place]:
        paths = sorted(map(Path, glob.glob(str(self.path), recursive=True)))
        return [Local(path) for path in paths if path.is_file()]

    def stored(self) -> Stored:
        try:
            return stored(self.path)
        except OSError as error:
            raise ValueError(f"{self.shown} cannot be read: {error.strerror or error}") from None


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
