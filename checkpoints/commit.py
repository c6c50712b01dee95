"""The file layer: new files forced to the disk and hashed on the way, directories made visible in one step.

The protocol is that of databases: write under new names only, force the data, force the names, switch by one rename,
force that. A failed fsync is final, because the kernel may have dropped the data it complains about: the whole attempt
is given up and nothing is tried twice.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from checkpoints.digest import Digest, digesting, file_digest, threads
from checkpoints.errors import CorruptCheckpoint
from checkpoints.manifest import File

logger = logging.getLogger(__name__)

_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}
"""Errors that show a file to be broken or not to be ours. Others (permissions, memory) say nothing about the file."""

_PIECE = 1 << 24
"""Bytes that are written at once."""


class Readable(Protocol):
    """A file as it is read here."""

    def seek(self, offset: int, /) -> int: ...
    def read(self, size: int = -1, /) -> bytes: ...
    def readinto(self, buffer: Any, /) -> int: ...


class StepFiles(Protocol):
    """Where the files of one step lie, or those of an attempt at one."""

    @property
    def readers(self) -> int:
        """Threads that may read here at once."""

    def location(self, name: str) -> str:
        """A file's place in words."""

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> File:
        """Makes a new file; when it returns, the bytes survive anything, though not yet as part of a step."""

    def open(self, name: str, size: int) -> AbstractContextManager[Readable]:
        """Opens a committed file; raises `CorruptCheckpoint` if it is missing, broken or of another size."""

    def digest(self, name: str, size: int) -> str:
        """Of a whole file, which it opens likewise."""


class LocalFiles:
    """A place on a file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def readers(self) -> int:
        return threads()

    def location(self, name: str) -> str:
        return str(self.path / name)

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> File:
        return write_hashed(self.path / name, parts)

    def open(self, name: str, size: int) -> AbstractContextManager[FileIO]:
        return open_file(self.path / name, size)

    def digest(self, name: str, size: int) -> str:
        with self.open(name, size) as file:
            return file_digest(file.fileno(), size)


def make_directory(path: Path) -> None:
    """Creates a directory and its missing parents, and forces each new name to the disk."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir()
        sync(path.parent)


def sync(path: Path) -> None:
    """Forces the bytes of a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> int:
    """Write a new file part by part, force its bytes to the disk, and return its size."""
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for part in parts:
            size += len(part)
            _write_all(descriptor, part)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size


def write_hashed(path: Path, parts: Iterable[bytes | memoryview]) -> File:
    """Write a new file like `write_file`, and hash the bytes on the way."""
    with digesting() as digest:
        size = write_file(path, _digested(parts, digest))
        return File(size, digest.hexdigest())


def _digested(parts: Iterable[bytes | memoryview], digest: Digest) -> Iterator[bytes | memoryview]:
    for part in parts:
        digest.update(part)
        yield part


def publish(attempt: Path, final: Path) -> None:
    """Rename a complete directory to its final name beside it, and force the new name to the disk.

    Raises OSError if a name cannot be forced; the directory then has its old name again.
    """
    sync(attempt)
    _switch(attempt, final)


def replace(attempt: Path, final: Path, old: Path) -> None:
    """Publish a complete directory under a name that is taken, and move its holder to `old`.

    A kill between the two renames leaves no `final`. Raises OSError if a name cannot be forced;
    `final` then is again what it was.
    """
    sync(attempt)
    os.rename(final, old)
    try:
        _switch(attempt, final)
    except OSError:
        os.rename(old, final)
        raise


def _switch(attempt: Path, final: Path) -> None:
    os.rename(attempt, final)
    try:
        sync(final.parent)
    except OSError:
        os.rename(final, attempt)  # A name that may not be on the disk must not look committed.
        raise


def discard(paths: Iterable[Path]) -> None:
    """Deletes directories. Leftovers do no harm, so a failure is reported and the next save tries again."""
    for path in paths:
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning("%s could not be removed (%s); the next save tries again", path, error)


@contextmanager
def open_file(path: Path, size: int | None = None) -> Iterator[FileIO]:
    """Opens a committed file of `size` bytes, never a link, pipe or device.

    Raises:
        CorruptCheckpoint: The file is missing, of another kind or size, or the disk cannot read it.
    """
    try:
        with FileIO(path, opener=_open_unfollowed) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CorruptCheckpoint(f"{path} is not a regular file")
            if size is not None and status.st_size != size:
                raise CorruptCheckpoint(f"{path} has {status.st_size} bytes, {size} were committed")
            yield file
    except EOFError as error:
        raise CorruptCheckpoint(f"{path} became shorter while it was read") from error
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from error


def read_into(file: Readable, begin: int, target: memoryview) -> None:
    """Fills `target` with the bytes of `file` from `begin` on; EOFError if there are too few."""
    file.seek(begin)
    while target:
        count = file.readinto(target)
        if not count:
            raise EOFError
        target = target[count:]


def _open_unfollowed(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a pipe that was planted in place of a file would wait for a writer for ever.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _write_all(descriptor: int, part: bytes | memoryview) -> None:
    rest, end = memoryview(part), os.lseek(descriptor, 0, os.SEEK_CUR)
    while rest:
        count = os.write(descriptor, rest[:_PIECE])
        # Dirty pages that are said not to be needed are written at once: the disk works while the next ones are hashed.
        os.posix_fadvise(descriptor, end, count, os.POSIX_FADV_DONTNEED)
        rest, end = rest[count:], end + count
