"""Unpack a Zstandard file frame by frame, so that reading can begin at any frame.

A file consists of frames that are compressed independently (RFC 8878). `zstd` writes one frame;
`pzstd`, the seekable format and concatenated files have many.
"""

from __future__ import annotations

from collections import deque
from io import BufferedReader, RawIOBase
from typing import Any

import pyarrow as pa

_MAGIC, _SKIPPABLE = b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
"""First bytes of a frame, and of a frame to be skipped after its first byte (0x50 to 0x5f)."""
_DICTIONARY, _CONTENT_SIZE = (0, 1, 2, 4), (0, 2, 4, 8)
"""Sizes in bytes of optional header fields, by their two bits in the descriptor."""
_RUN = 1
"""Type of a block that stores a single byte to be repeated."""


class Frames(RawIOBase):
    """The unpacked content of a Zstandard file from a frame on.

    Reading raises OSError if the content is damaged or truncated.
    """

    def __init__(self, file: BufferedReader, offset: int) -> None:
        """Read `file`, which is at byte `offset` of the packed file, where a frame begins."""
        super().__init__()
        self._file = _Counted(file, offset)
        self._unpacked = 0
        self._starts: deque[tuple[int, int]] = deque([(0, offset)])
        """For each frame begun: bytes unpacked before it, and its offset in the packed file."""
        self._content: Any = None
        """Reader of the frame's unpacked content; None between two frames."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._content is not None or self._begin():
            if count := int(self._content.readinto(buffer)):
                self._unpacked += count
                return count
            self._content = None
        return 0

    def start(self, position: int) -> tuple[int, int]:
        """Return the offset of a frame in the packed file, and the number of unpacked bytes from
        there to byte `position` of the content.

        The frame is the last one that begins before byte `position`. Calls must be in ascending
        order of `position`.
        """
        while len(self._starts) > 1 and self._starts[1][0] < position:
            self._starts.popleft()
        unpacked, offset = self._starts[0]
        return offset, position - unpacked

    def _begin(self) -> bool:
        """Begin the next frame with content; return False at the end of the file."""
        while True:
            offset = self._file.offset
            magic = self._file.read(4)
            if not magic:
                return False
            if magic[1:] != _SKIPPABLE or magic[0] >> 4 != 5:
                break
            self._file.read(int.from_bytes(self._file.read(4), "little"))
        if magic != _MAGIC:
            raise OSError(f"no Zstandard frame begins at byte {offset}")
        self._starts.append((self._unpacked, offset))
        self._content = pa.CompressedInputStream(pa.PythonFile(_Frame(self._file, magic), "r"), "zstd")
        return True


class _Counted:
    """A file read forward, with the offset of the next byte."""

    def __init__(self, file: BufferedReader, offset: int) -> None:
        self._file = file
        self.offset = offset

    def read(self, count: int) -> bytes:
        content = self._file.read(count)
        self.offset += len(content)
        return content


class _Frame:
    """The packed bytes of one frame, as a file that ends with the frame."""

    closed = False

    def __init__(self, file: _Counted, magic: bytes) -> None:
        self._file = file
        descriptor = file.read(1)
        flags = descriptor[0] if descriptor else 0
        single = flags >> 5 & 1
        size = _DICTIONARY[flags & 3] + (_CONTENT_SIZE[flags >> 6] or single) + (not single)
        self._ready = magic + descriptor + file.read(size)
        """Bytes read from the file and not yet returned."""
        self._left = 0
        """Bytes of the current block that are still in the file."""
        self._checksum = 4 * (flags >> 2 & 1)
        self._last = False

    def read(self, count: int) -> bytes:
        """Return up to `count` bytes; an empty result is the end of the frame."""
        if not self._ready and not self._left and not self._last:
            self._begin_block()
        if self._ready:
            content, self._ready = self._ready[:count], self._ready[count:]
            return content
        content = self._file.read(min(count, self._left))
        self._left -= len(content)
        return content

    def close(self) -> None:
        """Do nothing: other frames follow in the file."""

    def _begin_block(self) -> None:
        self._ready = self._file.read(3)
        header = int.from_bytes(self._ready, "little")
        self._last = bool(header & 1)
        self._left = 1 if header >> 1 & 3 == _RUN else header >> 3
        if self._last:
            self._left += self._checksum
