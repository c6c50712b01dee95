"""Keep derived files in a cache directory: row indexes, copies in formats with random access, and
records of values that take long to compute.

It is safe to delete the cache: missing files are made again.

A cached file is named by its size and the SHA-256 of its content, `1234-<hex>.spans`, so that a
truncated, edited or planted file is recognised and made again. It lies in a directory of mode 0700
of the user.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TypeVar

import msgspec

logger = logging.getLogger(__name__)


class Unwritable(ValueError):
    """The cache directory cannot be written, or belongs to another user."""


Value = TypeVar("Value", bound=msgspec.Struct)
Blocks = Callable[[], Iterable[bytes]]
READ_UP_TO = 256 << 20
"""Bytes up to which a cached file is read in full by each process that opens it: 0.2 s. Of a larger
file, a process reads the content only if the times or the inode differ from those of the last
check."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_PRIVATE = 0o700
_BLOCK = 1 << 20
_SILENT_WAIT = 1.0
"""Seconds of waiting for another process before a message."""
_LEVEL = {False: logging.WARNING, True: logging.DEBUG}
"""Level of the message: of a quiet wait, True."""
_checked: set[tuple[str, tuple[int, ...]]] = set()
"""Path and marks of each cached file whose content this process has checked."""


def directory() -> Path:
    """Return `$SFTSTREAM_CACHE` if set, else `sftstream/` in the user's cache directory.

    Raises Unwritable if the directory lies in the home directory of a user without one.
    """
    given = os.environ.get("SFTSTREAM_CACHE")
    path = Path(given or os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return path.expanduser() if given else path.expanduser() / "sftstream"
    except RuntimeError:
        raise Unwritable(
            f"the cache {path} has no place, since the user has no home directory; set SFTSTREAM_CACHE to a directory"
        ) from None


def derived(*words: object) -> str:
    """Return the cache key of a derived file: the SHA-256 of `words`."""
    return hashlib.sha256("\0".join(map(str, words)).encode()).hexdigest()


def kept(kind: type[Value], *parts: object) -> Value | None:
    """Return the record of the type `kind` that `keep` has kept for `parts`, or None."""
    with suppress(Unwritable, OSError, msgspec.DecodeError):  # the value is computed again
        if path := found(*_record(kind, parts)):
            return msgspec.msgpack.decode(path.read_bytes(), type=kind)
    return None


def keep(value: msgspec.Struct, *parts: object) -> None:
    """Keep a record for `parts`: all that its values depend on, such as digests and versions."""
    with suppress(Unwritable, OSError):  # without a cache each start takes as long as the first
        cached(*_record(type(value), parts), lambda: (msgspec.msgpack.encode(value),))


def _record(kind: type[msgspec.Struct], parts: tuple[object, ...]) -> tuple[str, str]:
    """Return the key and the suffix of a kept record."""
    suffix = f".{kind.__name__.lower()}"
    return derived(suffix, *kind.__struct_fields__, *parts), suffix


def cached(
    key: str, suffix: str, blocks: Blocks, fits: Callable[[Path], bool] = lambda _: True, *, quiet: bool = False
) -> Path:
    """Return the cached file of `key`; if missing, write the bytes that `blocks()` yields.

    The first process that calls `cached` writes the file while all other processes wait, with a
    message after a second unless `quiet`. A file is also written again if its content does not have
    the digest in its name, or if `fits(path)` returns False.

    Raises Unwritable, and any error of `blocks`.
    """
    folder = _private_folder(key)
    if made := _find(folder, suffix, fits):
        return made
    with _lock(folder) as lock:
        locked = _locked(lock, folder, quiet=quiet)
        try:
            # Another process may have made the file during the wait.
            return _find(folder, suffix, fits) or _make(folder, suffix, blocks, locked)
        finally:
            if locked:
                fcntl.flock(lock, fcntl.LOCK_UN)  # a process forked meanwhile shares the lock


def found(key: str, suffix: str) -> Path | None:
    """Return the cached file of `key` if it exists, else None."""
    folder = _folder(key)
    return _find(folder, suffix, lambda _: True) if all(map(_is_private, (folder.parent, folder))) else None


def digest_of(made: Path) -> str:
    """Return the SHA-256 of a cached file, from its name."""
    return made.name.partition(".")[0].partition("-")[2]


def _folder(key: str) -> Path:
    return directory() / key[:2] / key


def _is_private(folder: Path) -> bool:
    """Return True if `folder` is a directory of this user that no other user can enter."""
    try:
        found = folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _find(folder: Path, suffix: str, fits: Callable[[Path], bool]) -> Path | None:
    whole = (file for file in folder.glob(f"*{suffix}") if _is_whole(file))
    return next((file for file in whole if fits(file)), None)


def _is_whole(file: Path) -> bool:
    """Return True if `file` is a plain file of this user, with the size and digest in its name."""
    try:
        found = file.lstat()
    except FileNotFoundError:
        return False
    size = file.name.partition("-")[0]
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or size != str(found.st_size):
        return False
    marks = (found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    if (str(file), marks) in _checked:
        return True
    known = found.st_size > READ_UP_TO and _marks_file(file).is_file() and _marks_file(file).read_text() == str(marks)
    if not known and digest_of(file) != _digest(file):
        return False
    _remember(file, marks)
    return True


def _remember(file: Path, marks: tuple[int, ...]) -> None:
    _checked.add((str(file), marks))
    with suppress(OSError):  # without the marks on disk, the next process reads the file
        if file.stat().st_size > READ_UP_TO:
            _marks_file(file).write_text(str(marks))


def _marks_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.marks")


def _digest(file: Path) -> str:
    with FileIO(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _make(folder: Path, suffix: str, blocks: Blocks, locked: bool) -> Path:
    for left in folder.glob("*.partial") if locked else ():
        left.unlink()  # a killed process did not finish this file
    partial = folder / f"{secrets.token_hex(8)}.partial"
    digest = hashlib.sha256()
    try:
        with _create(partial) as file:
            for block in blocks():
                digest.update(block)
                _write(file, memoryview(block))
            return _publish(file, partial, f"-{digest.hexdigest()}{suffix}")
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
def _private_folder(key: str) -> Path:
    """Return the folder of `key`, made if missing; raises Unwritable if it is another user's."""
    folder = _folder(key)
    with suppress(FileExistsError):
        directory().mkdir(mode=_PRIVATE, parents=True)
    for part in (folder.parent, folder):
        with suppress(FileExistsError):
            part.mkdir(mode=_PRIVATE)
        found = part.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise Unwritable(
                f"the cache holds {part}, which is a link or belongs to another user; remove {part}, or set "
                "SFTSTREAM_CACHE to a directory of your own"
            )
        if found.st_mode & 0o077:
            part.chmod(_PRIVATE)
    return folder


@_writing()
def _lock(folder: Path) -> FileIO:
    return FileIO(os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+")


@_writing()
def _locked(lock: FileIO, folder: Path, *, quiet: bool) -> bool:
    """Wait for the lock and return True; return False on a filesystem without locks.

    Some network filesystems have no locks. Two processes may then write a file twice, which is
    harmless.
    """
    try:
        if not _locked_at_once(lock):
            owner = os.pread(lock.fileno(), 32, 0).decode(errors="replace").strip() or "unknown"
            logger.log(_LEVEL[quiet], "waiting for process %s, which makes a file in %s", owner, folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.pwrite(lock.fileno(), f"{os.getpid():<31}\n".encode(), 0)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _locked_at_once(lock: FileIO) -> bool:
    """Return True once the lock is taken, False if another process holds it for a second."""
    end = time.monotonic() + _SILENT_WAIT
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        else:
            return True


@_writing()
def _create(path: Path) -> FileIO:
    return FileIO(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "w")


@_writing()
def _write(file: FileIO, block: memoryview) -> None:
    while block:
        block = block[os.write(file.fileno(), block) :]


@_writing()
def _publish(file: FileIO, partial: Path, ending: str) -> Path:
    os.fsync(file.fileno())
    made = partial.rename(partial.with_name(f"{os.fstat(file.fileno()).st_size}{ending}"))
    found = made.lstat()
    _remember(made, (found.st_mtime_ns, found.st_ctime_ns, found.st_ino))
    return made
