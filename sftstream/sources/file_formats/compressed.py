"""Decompress files: once into the cache, or while the file is read from beginning to end."""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Callable, Iterator
from io import BufferedReader, RawIOBase
from typing import Any

import pyarrow as pa

from sftstream.cache import cached, derived
from sftstream.excerpt import one_line
from sftstream.sources.file_formats.zstd_frames import Frames
from sftstream.sources.rows import Place, Text
from sftstream.sources.skipping import skip_bytes
from sftstream.sources.stored import Stored, copy_of

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
"""Suffix -> name of the codec."""
DAMAGED = (OSError, EOFError, lzma.LZMAError)
"""Errors of a codec if the content is damaged or truncated."""
BEGINNING = Place(0)
_BLOCK, _PACKED = 4 << 20, 1 << 17
"""Number of bytes decompressed at a time, and of packed bytes read at a time."""


def unpacked(packed: Stored, codec: str) -> Stored:
    """Return a decompressed copy of a file; raises ValueError if it is damaged or truncated."""
    key = derived("unpacked whole" if codec == "xz" else "unpacked", packed.key)
    return copy_of(packed, cached(key, ".unpacked", lambda: _blocks(packed, codec)), key)


def unpacking(file: Any, codec: str) -> BufferedReader:
    """Return a reader that decompresses an open file; reading raises the errors in `DAMAGED`."""
    if codec in ("xz", "bz2"):
        return BufferedReader(_Streams(file, codec))
    return BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), codec))


class _Streams(RawIOBase):
    """The unpacked content of an xz or bz2 file: one or more packed streams.

    Reading raises an error in `DAMAGED` for other content after a stream, where the reader of
    `lzma` seems to be at the end. A stream may be empty, which Arrow's reader of bz2 does not read.
    """

    def __init__(self, file: Any, codec: str) -> None:
        super().__init__()
        self._file, self._padding = file, b"\0" if codec == "xz" else b""
        self._new: Callable[[], Any] = lzma.LZMADecompressor if codec == "xz" else bz2.BZ2Decompressor
        self._decoder: Any = self._new()
        """Decoder of the current stream; None after the last one."""
        self._packed = b""
        """Bytes read from the file that the decoder has not got."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._decoder is not None:
            if self._decoder.eof:
                self._begin_next()
                continue
            if self._decoder.needs_input and not self._packed:
                self._packed = self._file.read(_PACKED)
                if not self._packed:
                    raise EOFError("the file ends inside a packed stream")
            content = self._decoder.decompress(self._packed, len(buffer))
            self._packed = b""
            if content:
                buffer[: len(content)] = content
                return len(content)
        return 0

    def _begin_next(self) -> None:
        """Begin the next stream, unless the file has none.

        Raises OSError if a stream of xz is padded by zero bytes that are no multiple of four.
        """
        zeros, packed = 0, self._decoder.unused_data
        while not (stream := packed.lstrip(self._padding)) and (more := self._file.read(_PACKED)):
            zeros, packed = zeros + len(packed), more
        zeros += len(packed) - len(stream)
        if zeros % 4:
            raise OSError(f"{zeros:,} zero bytes follow a packed stream, and are no multiple of four")
        self._decoder, self._packed = self._new() if stream else None, stream


def text_from(file: BufferedReader, display_name: str, codec: str | None, place: Place = BEGINNING) -> Text:
    """Return the unpacked content of an open file from a place on; `codec` is None if the file is
    not compressed."""
    offset, skipped = place
    if offset:
        file.seek(offset)
    if codec == "zstd":
        frames = Frames(file, offset)
        text = Text(BufferedReader(frames), display_name, lambda n: Place(*frames.start(skipped + n)))
    elif codec:
        text = Text(unpacking(file, codec), display_name, lambda n: Place(0, skipped + n))
    else:
        text = Text(file, display_name, lambda n: Place(offset + n))
    if codec:
        skip_bytes(text.file, skipped, display_name)
    return text


def _blocks(packed: Stored, codec: str) -> Iterator[bytes]:
    try:
        with packed.open() as file, unpacking(file, codec) as stream:
            while block := stream.read(_BLOCK):
                yield block
            packed.require_unchanged(file)
    except DAMAGED as error:
        raise ValueError(f"{packed.display_name} cannot be unpacked: {one_line(error)}; restore the file") from None
