"""One process at a time changes a root: by a lock of the kernel, which ends with its holder however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from weakref import WeakSet

from checkpoints.errors import CheckpointError

_TAKEN = {errno.EWOULDBLOCK, errno.EACCES}
_UNKNOWN = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class Lock:
    """An exclusive flock(2) on a file that is never deleted. Its text says who took it last, for people only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def take(self) -> None:
        """Locks, or does nothing where this object already has the lock.

        Raises:
            CheckpointError: Another process has it, the file was replaced under our hands, or the file system has no locks.
        """
        if self._descriptor is None:
            self._descriptor = self._locked()
            _held.add(self)
        elif not os.path.samestat(os.fstat(self._descriptor), os.stat(self.path)):
            raise CheckpointError(
                f"{self.path} was replaced during this run, so another run may save here; start again"
            )

    def release(self) -> None:
        """Gives the lock up; nothing happens where it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()

    def _locked(self) -> int:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, _holder().encode())
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace")
            os.close(descriptor)
            raise self._refusal(error, holder) from error
        return descriptor

    def _refusal(self, error: OSError, holder: str) -> Exception:
        if error.errno in _TAKEN:
            return CheckpointError(
                f"{self.path.parent} is in use by {holder}; two runs cannot share it: stop that one, or give this one "
                "another directory"
            )
        if error.errno in _UNKNOWN:
            return CheckpointError(
                f"the file system of {self.path.parent} has no locks ({error.strerror}), so two runs could save there "
                "unnoticed; mount it with them (Lustre: -o flock, NFS: without nolock) or use another"
            )
        return error


_held: WeakSet[Lock] = WeakSet()


def _release_in_child() -> None:
    """A forked process, such as a loader's worker, would keep the lock when the one that took it was killed."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)


def _holder() -> str:
    now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} (since {now})"
