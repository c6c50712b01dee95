"""A lock of the kernel on a root: a single process at a time may change the root."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from datetime import UTC, datetime
from pathlib import Path
from weakref import WeakSet

from checkpoints.errors import CheckpointError, printable

_TAKEN = {errno.EWOULDBLOCK, errno.EACCES}
_NO_FILE = {errno.ELOOP, errno.EISDIR, errno.ENXIO}
"""A link, a directory, or a socket in the place of the lock's file."""
_UNKNOWN = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class Lock:
    """An exclusive flock(2) on a file that is never deleted; ends with the process.

    The text of the file names the last holder, for people only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def take(self) -> None:
        """Take the lock, or do nothing if this object holds the lock already.

        Raises:
            CheckpointError: Another process holds the lock, the file was replaced meanwhile, or the
                file system has no locks.
        """
        if self._descriptor is None:
            self._descriptor = self._locked()
            _held.add(self)
        elif not os.path.samestat(os.fstat(self._descriptor), os.stat(self.path)):
            raise CheckpointError(
                f"{self.path} was replaced during this run, so another run may save here; start this run again"
            )

    def release(self) -> None:
        """Give the lock up, if held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()

    def _locked(self) -> int:
        planted = CheckpointError(
            f"{self.path} is a link to another file, or no file, and cannot be locked; delete {self.path}"
        )
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno in _NO_FILE:
                raise planted from error
            raise
        status = os.fstat(descriptor)
        if status.st_nlink != 1 or not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise planted
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, _holder().encode())
        except OSError as error:
            holder = printable(os.pread(descriptor, 200, 0).decode(errors="replace"))
            os.close(descriptor)
            raise self._refusal(error, holder) from error
        return descriptor

    def _refusal(self, error: OSError, holder: str) -> Exception:
        if error.errno in _TAKEN:
            return CheckpointError(
                f"{self.path.parent} is in use by {holder}; two runs cannot share a directory: stop the other "
                "run, or give this run another directory"
            )
        if error.errno in _UNKNOWN:
            return CheckpointError(
                f"the file system of {self.path.parent} has no locks ({error.strerror}), so two runs could save there "
                "unnoticed; mount it with locks (Lustre: -o flock, NFS: without nolock), or save to another file system"
            )
        return error


_held: WeakSet[Lock] = WeakSet()


def _release_in_child() -> None:
    """Close the lock files in a forked process, such as a worker of a data loader.

    An open copy in the child would keep the lock after the holder is killed.
    """
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)


def _holder() -> str:
    now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} (since {now})"
