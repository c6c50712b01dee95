"""Define locations of files: the interface, and the class for local paths."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Protocol

from sftstream.sources.rows import FileIdentity
from sftstream.sources.stored import Stored, stored

_MOST_ENTRIES = 1_000_000
"""Entries of directories that a `**` may lead to, searched in seconds."""
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

    def matches(self, suffixes: Iterable[str]) -> list[FileLocation]:
        """Return the files that match this glob, sorted; `suffixes` match in any case."""

    def stored(self) -> Stored:
        """Return the file on a local disk, downloaded if remote; raises ValueError if
        unreadable."""

    def open(self) -> BufferedReader:
        """Open the file without downloading it; raises OSError."""

    def watched(self) -> Watched:
        """Return the identity of the file, without downloading it, and the check for changes.

        Raises ValueError if the server sends no version that identifies the content.
        """


class Watched(Protocol):
    """The identity of a file that is read forward, and the check for changes."""

    @property
    def identity(self) -> FileIdentity: ...

    def require_unchanged(self) -> None:
        """Raise RuntimeError if the content has changed; for a remote file a request."""


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

    def matches(self, suffixes: Iterable[str]) -> list[FileLocation]:
        if self.path.exists():
            raise ValueError(
                f"{self.display_name} is neither a file nor a directory but a pipe, a socket or a device, and can be "
                "read once or without end; write its content to a file"
            )
        paths = sorted(set(_matches(self.path, tuple(suffixes))))
        return [replace(self, path=path) for path in paths if path.is_file()]

    def stored(self) -> Stored:
        try:
            return stored(self.path, full=self.full)
        except OSError as error:
            raise ValueError(
                f"{self.display_name} cannot be read: {error.strerror or error}; restore the file or its permissions"
            ) from None

    def open(self) -> BufferedReader:
        return self.path.open("rb")

    def watched(self) -> Watched:
        return self.stored()


def _matches(pattern: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield the paths that match a glob, some of them twice.

    `**` is any depth of directories, also linked ones. Raises ValueError if `**` leads to more than
    `_MOST_ENTRIES` entries of directories.
    """
    if "**" not in pattern.parts:
        yield from map(Path, glob.glob(any_case(str(pattern), suffixes)))
        return
    depth = pattern.parts.index("**")
    rest = pattern.parts[depth + 1 :] or ("*",)
    for base in _matches(Path(*pattern.parts[:depth]), suffixes):
        for directory in list(_directories(str(base), pattern)):
            yield from _matches(Path(glob.escape(directory), *rest), suffixes)


def _directories(base: str, pattern: Path) -> Iterator[str]:
    """Yield a directory and all directories inside, without hidden ones.

    A link to a directory that contains the link is not followed.
    """
    left, seen = [(base, frozenset[tuple[int, int]]())], 0
    while left:
        directory, parents = left.pop()
        try:
            found = os.stat(directory)
            if (mark := (found.st_dev, found.st_ino)) in parents:
                continue
            with os.scandir(directory) as scan:
                entries = list(scan)
        except OSError:  # not a directory, or unreadable
            continue
        if (seen := seen + len(entries)) > _MOST_ENTRIES:
            raise ValueError(
                f"{pattern} leads to more than {_MOST_ENTRIES:,} files and directories; name a directory nearer to the "
                "files"
            )
        yield directory
        inside = parents | {mark}
        left += [(entry.path, inside) for entry in entries if entry.name[0] != "." and _is_directory(entry)]


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def any_case(pattern: str, suffixes: Iterable[str]) -> str:
    """Return a glob in which `suffixes` match in any case: "*.csv" becomes "*.[cC][sS][vV]".

    A name without wildcards is returned as it is.
    """
    directory, slash, name = pattern.rpartition("/")
    if not glob.has_magic(name):
        return pattern
    known = re.compile(rf"({'|'.join(map(re.escape, suffixes))})(?!\w)", re.IGNORECASE)
    name = known.sub(lambda suffix: re.sub("[a-z]", _either_case, suffix[0], flags=re.IGNORECASE), name)
    return f"{directory}{slash}{name}"


def _either_case(letter: re.Match[str]) -> str:
    return f"[{letter[0].lower()}{letter[0].upper()}]"


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
