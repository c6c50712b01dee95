"""Files on a local disk, and the proof that their content is still that of their identity.

Size, times and inode of a file (its seal) are compared often, since a comparison costs a
microsecond. If they differ, the content is read: a changed file is an error, and a file that was
only touched goes on with a new seal.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from sftstream.cache import cached, derived, digest_of, found
from sftstream.sources.rows import FileIdentity, identify, identify_open

Seal = tuple[int, int, int, int]
"""Size in bytes, times of modification and of the inode's change in nanoseconds, and inode."""
_BLOCK = 4 << 20
"""Bytes read at a time for a digest."""
_FULL = ".sha256"


@dataclass(eq=False)
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
    """Seal of the file at `path` when its content was last compared with `content`."""
    content: FileIdentity
    """Identity of the file at `path`."""
    original: Stored | None = None
    """The user's file, if `path` is a copy."""

    def open(self) -> FileIO:
        """Open the file; raises RuntimeError if its content has changed."""
        file = FileIO(self.path)
        self.require_unchanged(file)
        return file

    def require_unchanged(self, file: FileIO | None = None) -> None:
        """Raise RuntimeError if the content of the file, by default of that at `path`, has changed.

        The seal is compared first. Renews the seal of a file that was only touched.
        """
        now = sealed(os.stat(self.path) if file is None else os.fstat(file.fileno()))
        if now == self.seal:
            return
        # Opened by descriptor, since a file that was replaced has another content at its path.
        path = self.path if file is None else Path(f"/proc/self/fd/{file.fileno()}")
        if now[0] != self.seal[0] or not self._has_content(path, now):
            raise RuntimeError(f"{self.display_name} changed while it was read; restore the file, or start again")
        self.seal = now

    def digest_in_full(self, interrupted: Callable[[], bool], *, quiet: bool) -> str:
        """Return the SHA-256 of all bytes of the user's file, as described in `RowFile`."""
        users = self.original or self
        with users.open() as file:
            return full_digest(file, users.seal, interrupted, quiet=quiet)

    def _has_content(self, path: Path, seal: Seal) -> bool:
        """Return True if the file at `path` has the content of before.

        Raises RuntimeError if nobody can tell.
        """
        with FileIO(path) as file:
            if identify_open(file, self.content.name, full=not self.content.sampled) != self.content:
                return False
            if self.content.sampled:
                if (before := known_full_digest(self.seal)) is None:
                    raise RuntimeError(
                        f"{self.display_name} was touched or changed before the digest of all its bytes was known, so "
                        "nobody can tell if its content is the same; restore the file, or start again"
                    )
                if full_digest(file, seal) != before:
                    return False
            return sealed(os.fstat(file.fileno())) == seal


def stored(path: Path, display_name: str | None = None, *, full: bool = False) -> Stored:
    """Read the user's file at `path` once to compute its digest, and return it as a Stored."""
    seal = sealed(path.stat())
    identity = identify(path, full=full)
    # A change outside the sample changes the times or the inode.
    key = derived(identity.sha256, identity.size, *(seal if identity.sampled else ()))
    return Stored(path, display_name or str(path), identity, key, seal, identity)


def copy_of(original: Stored, path: Path, key: str) -> Stored:
    """Return the copy at `path` in the cache, to be read in place of `original`."""
    seal = sealed(path.stat())
    content = FileIdentity(name=path.name, size=seal[0], sha256=digest_of(path))
    users = original.original or original
    return Stored(path, original.display_name, original.identity, key, seal, content, users)


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


def sealed(stat: os.stat_result) -> Seal:
    """Return the seal of a file: a value that changes when the file changes."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


class Interrupted(Exception):
    """The computation of a digest was interrupted."""


def full_digest(
    file: FileIO, seal: Seal, interrupted: Callable[[], bool] = lambda: False, *, quiet: bool = False
) -> str:
    """Return the SHA-256 of all bytes of an open file: 1 s a GB, once a machine.

    The cache keeps the digest by the seal. Without `quiet`, a wait for another process that
    computes the digest is logged. Raises Interrupted if `interrupted()` turns true, and
    RuntimeError if the file changes meanwhile.
    """
    made = cached(_key(seal), _FULL, lambda: _digest(file, seal, interrupted), quiet=quiet)
    return made.read_text()


def known_full_digest(seal: Seal) -> str | None:
    """Return the digest that `full_digest` has computed for a seal; None if it has not."""
    made = found(_key(seal), _FULL)
    return made.read_text() if made else None


def _key(seal: Seal) -> str:
    return derived("full digest", *seal)


def _digest(file: FileIO, seal: Seal, interrupted: Callable[[], bool]) -> Iterator[bytes]:
    digest, buffer = hashlib.sha256(), bytearray(_BLOCK)
    file.seek(0)
    while size := file.readinto(buffer):
        if interrupted():
            raise Interrupted
        digest.update(memoryview(buffer)[:size])
    if sealed(os.fstat(file.fileno())) != seal:
        raise RuntimeError(f"{file.name} changed while it was read; restore the file, or start again")
    yield digest.hexdigest().encode()
