"""The digest of a file: SHA-256 over the SHA-256 of each block of 64 MiB, so that several cores can hash one file.

One core hashes 1.6 GB/s, which is less than disks and page caches give.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

BLOCK = 1 << 26

_MOST_THREADS = 32
"""Of one process, whatever its cores: each has a buffer."""

_CACHED = 1 << 18
"""Bytes that are read at once: few enough to be hashed while they are still in a core's cache."""

_BEHIND = 4
"""Blocks that hashing may be behind; what was given for them is held until then."""


class Digest:
    """Takes a file's bytes in order, in parts of any size, and hashes them in threads of `pool`."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._pieces: list[memoryview] = []
        self._room = BLOCK
        self._blocks: list[Future[bytes]] = []

    def update(self, part: bytes | memoryview) -> None:
        """Takes more; the memory must stay as it is until `hexdigest` returns."""
        rest = memoryview(part)
        while rest:
            piece, rest = rest[: self._room], rest[self._room :]
            self._pieces.append(piece)
            self._room -= len(piece)
            if not self._room:
                self._close_block()

    def hexdigest(self) -> str:
        """Of all that was given."""
        if self._pieces:
            self._close_block()
        return hashlib.sha256(b"".join(block.result() for block in self._blocks)).hexdigest()

    def _close_block(self) -> None:
        self._blocks.append(self._pool.submit(_hashed, self._pieces))
        self._pieces, self._room = [], BLOCK
        if len(self._blocks) > _BEHIND:
            self._blocks[-1 - _BEHIND].result()


def threads() -> int:
    """Two for each core that this process may use, since some wait for the disk; ranks of one host have a share each."""
    share = 2 * len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(share, 2), _MOST_THREADS)


@contextmanager
def digesting() -> Iterator[Digest]:
    """A digest with threads of its own."""
    with ThreadPoolExecutor(threads()) as pool:
        yield Digest(pool)


def file_digest(descriptor: int, size: int) -> str:
    """Of an open file of `size` bytes, whose blocks are read and hashed beside each other. EOFError if it is shorter."""
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
        sha256.update(pieces.pop(0))  # Let go of as it is done: it may be the last that holds its memory.
    return sha256.digest()
