"""Keep derived files in a cache directory: row indexes, and copies in formats with random access.

It is safe to delete the cache: missing files are made again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path


class Unwritable(ValueError):
    """The cache directory cannot be written."""


Blocks = Callable[[], Iterable[bytes]]
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def directory() -> Path:
    """Return `$SFTSTREAM_CACHE` if set, else `sftstream/` in the user's cache directory."""
    if given := os.environ.get("SFTSTREAM_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sftstream"


def cached(key: str, suffix: str, blocks: Blocks, fits: Callable[[Path], bool] = lambda _: True) -> Path:
    """Return the cached file of `key`; if missing, write the bytes that `blocks()` yields.

    The first process that calls `cached` writes the file while all other processes wait. The size
    is part of the file's name, for example `1234.spans`, so a truncated file is recognised and
    written again. A file is also written again if `fits(path)` returns False.

    Raises Unwritable, and any error of `blocks`.
    """
    folder = _folder(key)
    if made := _find(folder, suffix, fits):
        return made
    with _lock(folder) as lock:
        locked = _locked(lock)
        # Another process may have made the file during the wait.
        return _find(folder, suffix, fits) or _make(folder, suffix, blocks, locked)


def found(key: str, suffix: str) -> Path | None:
    """Return the cached file of `key` if it exists, else None."""
    return _find(_folder(key), suffix, lambda _: True)


def _folder(key: str) -> Path:
    return directory() / key[:2] / key


def _find(folder: Path, suffix: str, fits: Callable[[Path], bool]) -> Path | None:
    files = (file for file in folder.glob(f"*{suffix}") if file.name == f"{file.stat().st_size}{suffix}")
    return next((file for file in files if fits(file)), None)


def _make(folder: Path, suffix: str, blocks: Blocks, locked: bool) -> Path:
    for left in folder.glob("*.partial") if locked else ():
        left.unlink()  # a killed process did not finish this file
    partial = folder / f"{secrets.token_hex(8)}.partial"
    try:
        with _create(partial) as file:
            for block in blocks():
                _write(file, memoryview(block))
            return _publish(file, partial, suffix)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unwritable(
            f"the cache {directory()} cannot be written: {error.strerror or error}; set SFTSTREAM_CACHE to another directory"
        ) from None


@_writing()
def _lock(folder: Path) -> FileIO:
    folder.mkdir(parents=True, exist_ok=True)
    return FileIO(folder / "lock", "a")


@_writing()
def _locked(lock: FileIO) -> bool:
    """Wait for the lock and return True; return False on a filesystem without locks.

    Some network filesystems have no locks. Two processes may then write a file twice, which is
    harmless.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@_writing()
def _create(path: Path) -> FileIO:
    return FileIO(path, "x")


@_writing()
def _write(file: FileIO, block: memoryview) -> None:
    while block:
        block = block[os.write(file.fileno(), block) :]


@_writing()
def _publish(file: FileIO, partial: Path, suffix: str) -> Path:
    os.fsync(file.fileno())
    return partial.rename(partial.with_name(f"{os.fstat(file.fileno()).st_size}{suffix}"))
