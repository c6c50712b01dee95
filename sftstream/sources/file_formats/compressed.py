"""Decompress files: once into the cache, or while the file is read from beginning to end."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

import pyarrow as pa

from sftstream.cache import cached
from sftstream.sources.file_formats.zstd_frames import Frames
from sftstream.sources.rows import Place, Text, derived
from sftstream.sources.skipping import skip_bytes
from sftstream.sources.stored import Stored, copy_of

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
"""Suffix -> name of the codec."""
DAMAGED = (OSError, EOFError, lzma.LZMAError)
"""Errors of a codec if the content is damaged or truncated."""
BEGINNING = Place(0)
_BLOCK = 4 << 20
"""Number of bytes decompressed at a time."""


def unpacked(packed: Stored, codec: str) -> Stored:
    """Return a decompressed copy of a file; raises ValueError if it is damaged or truncated."""
    key = derived("unpacked", packed.key)
    return copy_of(packed, cached(key, ".unpacked", lambda: _blocks(packed, codec)), key)


def unpacking(file: Any, codec: str) -> BufferedReader:
    """Return a reader that decompresses an open file; reading raises the errors in `DAMAGED`."""
    if codec == "xz":
        return BufferedReader(lzma.LZMAFile(file))
    return BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), codec))


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
        raise ValueError(f"{packed.display_name} cannot be unpacked: {error}; restore the file") from None
