"""Write new files to the disk, and make a directory visible by a single rename.

Example: a save of step 120 by two ranks under the root `checkpoints/`, with the attempt's token
0123456789abcdef. Each line ends with the call that forces the change:

    mkdir checkpoints/.step-00000120.tmp-0123456789abcdef             rank 0
    write .../rank00000.safetensors                fsync the file     rank 0
    write .../rank00001.safetensors                fsync the file     rank 1
    write .../manifest.json                        fsync the file     rank 0, once both have written
    fsync checkpoints/.step-00000120.tmp-0123456789abcdef             rank 0: the names of the files
    rename to checkpoints/step-00000120            fsync checkpoints/ rank 0: the name of the step

Before the rename, a kill or a power cut leaves a directory with a dot in front, ignored by readers
and deleted by the next save. After the last fsync, the step survives a power cut. In between, the
directory has either name, and is complete under both.

A failed fsync is final, because the kernel may have dropped the data: the whole attempt is given
up, and no file is written twice.
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
from typing import Any, NamedTuple, Protocol

from checkpoints.digest import Digest, digesting, file_digest, threads
from checkpoints.errors import CorruptCheckpoint
from checkpoints.manifest import File

logger = logging.getLogger(__name__)

_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}
"""Error numbers of a broken or foreign file. Other numbers (permissions, memory) show no damage."""

_PIECE = 1 << 24
"""Bytes per write."""


Marker = tuple[int, ...] | str
"""Cheap value that changes when a file changes: size, times and inode, or a store's own key."""


class Checked(NamedTuple):
    """The digest of a file, and a marker taken before the first byte was read."""

    digest: str
    marker: Marker


class Readable(Protocol):
    """The methods of an open file used by a load."""

    def seek(self, offset: int, /) -> int: ...
    def read(self, size: int = -1, /) -> bytes: ...
    def readinto(self, buffer: Any, /) -> int: ...


class StepFiles(Protocol):
    """The files of a step, or of an attempt at a step, in any kind of storage."""

    @property
    def readers(self) -> int:
        """Number of threads for parallel reads."""

    def location(self, name: str) -> str:
        """Return the path or URL of a file, for messages."""

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> File:
        """Write a new file. On return the bytes survive a power cut, but belong to no step yet."""

    def open(self, name: str, size: int, marker: Marker | None = None) -> AbstractContextManager[Readable]:
        """Open a committed file.

        Raises CorruptCheckpoint if the file is missing, broken or not `size` bytes long, or has
        another marker than `marker`, at the start or at the end.
        """

    def check(self, name: str, size: int) -> Checked:
        """Return digest and marker of a whole file. Raises CorruptCheckpoint like `open`."""


class LocalFiles:
    """The files of a step, or of an attempt at a step, in a directory of a file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def readers(self) -> int:
        return threads()

    def location(self, name: str) -> str:
        return str(self.path / name)

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> File:
        return write_hashed(self.path / name, parts)

    def open(self, name: str, size: int, marker: Marker | None = None) -> AbstractContextManager[FileIO]:
        return open_file(self.path / name, size, marker)

    def check(self, name: str, size: int) -> Checked:
        with self.open(name, size) as file:
            marker = _marker(os.fstat(file.fileno()))
            return Checked(file_digest(file.fileno(), size), marker)


def make_directory(path: Path) -> None:
    """Make a directory and missing parents, and force each new name to the disk."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir()
        sync(path.parent)


def sync(path: Path) -> None:
    """Force the bytes of a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> int:
    """Write a new file part by part, force the bytes to the disk, and return the size in bytes.

    Raises OSError, with the path, if the disk is full or broken.
    """
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for part in parts:
            size += len(part)
            _write_all(descriptor, part)
        os.fsync(descriptor)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
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
    """Rename a complete directory to a final name beside the first, and force the new name.

    Raises OSError if a name cannot be forced; the directory then has the first name again.
    """
    sync(attempt)
    _switch(attempt, final)


def publish_over(attempt: Path, final: Path, old: Path) -> None:
    """Publish a complete directory under an existing name; the old directory moves to `old`.

    A kill between the two renames leaves no `final`. Raises OSError if a name cannot be forced;
    `final` is then unchanged.
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
    """Delete directories. Leftovers do no harm: a failure is only logged."""
    for path in paths:
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning("%s could not be deleted (%s); the next save or export tries again", path, error)


@contextmanager
def open_file(path: Path, size: int | None = None, marker: Marker | None = None) -> Iterator[FileIO]:
    """Open a committed file of `size` bytes for reading; never a link, pipe or device.

    Raises:
        CorruptCheckpoint: The file is missing, of another kind or size, or unreadable on the disk,
            or has changed since `marker` was taken.
    """
    try:
        with FileIO(path, opener=_open_unfollowed) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CorruptCheckpoint(f"{path} is not a regular file")
            if size is not None and status.st_size != size:
                raise CorruptCheckpoint(f"{path} has {status.st_size} bytes; {size} were committed")
            require_marker(path, marker, _marker(status))
            yield file
            require_marker(path, marker, _marker(os.fstat(file.fileno())))
    except EOFError as error:
        raise CorruptCheckpoint(f"{path} became shorter during the read") from error
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from error


def require_marker(location: Path | str, expected: Marker | None, actual: Marker) -> None:
    """Raise CorruptCheckpoint if a file has changed since the marker `expected` was taken."""
    if expected is not None and expected != actual:
        raise CorruptCheckpoint(f"{location} changed after it was verified; load the step again")


def _marker(status: os.stat_result) -> Marker:
    # The time of the last change of the inode cannot be set back by a program.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def read_into(file: Readable, begin: int, target: memoryview) -> None:
    """Fill `target` with the bytes of `file` from offset `begin` on.

    Raises EOFError if the file is shorter.
    """
    file.seek(begin)
    while target:
        count = file.readinto(target)
        if not count:
            raise EOFError
        target = target[count:]


def _open_unfollowed(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a pipe planted in place of a file would wait for a writer forever.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _write_all(descriptor: int, part: bytes | memoryview) -> None:
    rest, end = memoryview(part), os.lseek(descriptor, 0, os.SEEK_CUR)
    while rest:
        count = os.write(descriptor, rest[:_PIECE])
        # The advice makes the kernel write these pages now, while the next piece is hashed.
        os.posix_fadvise(descriptor, end, count, os.POSIX_FADV_DONTNEED)
        rest, end = rest[count:], end + count
