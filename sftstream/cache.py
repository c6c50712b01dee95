"""Files that are made once on a machine: row indexes, and copies that can be read by row. Nothing is lost by deleting them."""

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
    """The cache cannot be written."""


Blocks = Callable[[], Iterable[bytes]]
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def directory() -> Path:
    """`$SFTSTREAM_CACHE`, else `sftstream/` in the user's cache directory."""
    if given := os.environ.get("SFTSTREAM_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sftstream"


def cached(key: str, suffix: str, blocks: Blocks, fits: Callable[[Path], bool] = lambda _: True) -> Path:
    """The file that holds what `blocks` yields for `key`, made by whichever process asks first while the others wait.

    It is named by its size, so that a file which was cut is not taken for whole, and made anew where it does not `fit`.
    Raises `Unwritable`, and what `blocks` raises.
    """
    folder = _folder(key)
    if made := _find(folder, suffix, fits):
        return made
    with _lock(folder) as lock:
        alone = _alone(lock)
        # Another process may have made it while this one waited.
        return _find(folder, suffix, fits) or _make(folder, suffix, blocks, alone)


def found(key: str, suffix: str) -> Path | None:
    """The file of `cached`, where it was made before."""
    return _find(_folder(key), suffix, lambda _: True)


def _folder(key: str) -> Path:
    return directory() / key[:2] / key


def _find(folder: Path, suffix: str, fits: Callable[[Path], bool]) -> Path | None:
    files = (file for file in folder.glob(f"*{suffix}") if file.name == f"{file.stat().st_size}{suffix}")
    return next((file for file in files if fits(file)), None)


def _make(folder: Path, suffix: str, blocks: Blocks, alone: bool) -> Path:
    for left in folder.glob("*.partial") if alone else ():
        left.unlink()  # of a process that was killed
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
            f"the cache {directory()} cannot be written: {error.strerror or error}; SFTSTREAM_CACHE names another place"
        ) from None


@_writing()
def _lock(folder: Path) -> FileIO:
    folder.mkdir(parents=True, exist_ok=True)
    return FileIO(folder / "lock", "a")


@_writing()
def _alone(lock: FileIO) -> bool:
    """Waits for the lock. Some network filesystems have none, and there the same file may be made twice, which harms nothing."""
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
