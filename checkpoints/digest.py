"""The digest of a file: SHA-256 over the SHA-256 of each block of 64 MiB.

Blocks let several cores hash one file: a core hashes 1.6 GB/s, less than disks and page caches
deliver.

Example: a file of 100 MiB has the blocks a (64 MiB) and b (36 MiB). The digest is the hexadecimal
form of `sha256(sha256(a).digest() + sha256(b).digest())`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

BLOCK = 1 << 26
"""Bytes of a block."""

_MOST_THREADS = 32
"""Limit of threads per process, because every thread has a buffer."""

_CACHED = 1 << 18
"""Bytes per read: few enough to be hashed while still in the cache of a core."""

_BEHIND = 4
"""Blocks taken but not yet hashed, at most. Their memory stays in use until then."""


class Digest:
    """The digest of bytes given in order, in parts of any size, hashed in the threads of `pool`."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._pieces: list[memoryview] = []
        self._room = BLOCK
        self._blocks: list[Future[bytes]] = []

    def update(self, part: bytes | memoryview) -> None:
        """Take the next bytes. The memory must not change until `hexdigest` returns."""
        rest = memoryview(part)
        while rest:
            piece, rest = rest[: self._room], rest[self._room :]
            self._pieces.append(piece)
            self._room -= len(piece)
            if not self._room:
                self._close_block()

    def hexdigest(self) -> str:
        """Return the digest of all bytes taken, 64 hexadecimal characters."""
        if self._pieces:
            self._close_block()
        return hashlib.sha256(b"".join(block.result() for block in self._blocks)).hexdigest()

    def _close_block(self) -> None:
        self._blocks.append(self._pool.submit(_hashed, self._pieces))
        self._pieces, self._room = [], BLOCK
        if len(self._blocks) > _BEHIND:
            self._blocks[-1 - _BEHIND].result()


def threads() -> int:
    """Return the number of threads for reading and hashing: two for each core of this process.

    Two, because some threads wait for the disk. The ranks of a host share the cores. At least 2, at
    most 32.
    """
    share = 2 * len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(share, 2), _MOST_THREADS)


@contextmanager
def digesting() -> Iterator[Digest]:
    """Yield a `Digest` with a new pool of threads."""
    with ThreadPoolExecutor(threads()) as pool:
        yield Digest(pool)


def file_digest(descriptor: int, size: int) -> str:
    """Return the digest of an open file of `size` bytes; blocks are read and hashed in parallel.

    Raises EOFError if the file is shorter.
    """
    with ThreadPoolExecutor(threads()) as pool:
        blocks = pool.map(lambda begin: _read(descriptor, begin, min(begin + BLOCK, size)), range(0, size, BLOCK))
        return hashlib.sha256(b"".join(blocks)).hexdigest()


def _read(descriptor: int, begin: int, end: int) -> bytes:
    sha256, buffer = hashlib.sha256(), memoryview(bytearray(_CACHED))
    while begin < end:
        count = os.preadv(descriptor, [buffer[: end - begin]], begin)
        if not count:
            raise EOFError
        sha256.update(buffer[:count])
        begin += count
    return sha256.digest()


def _hashed(pieces: list[memoryview]) -> bytes:
    sha256 = hashlib.sha256()
    while pieces:
        sha256.update(pieces.pop(0))  # Removed at once, to free the memory.
    return sha256.digest()
