"""Decompress files: once into the cache, or while the file is read from beginning to end."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

import pyarrow as pa

from sftstream.cache import cached
from sftstream.sources.rows import derived
from sftstream.sources.stored import Stored, copy_of

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
"""Suffix -> name of the codec."""
DAMAGED = (OSError, EOFError, lzma.LZMAError)
"""Errors of a codec if the content is damaged or truncated."""
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


def _blocks(packed: Stored, codec: str) -> Iterator[bytes]:
    try:
        with packed.open() as file, unpacking(file, codec) as stream:
            while block := stream.read(_BLOCK):
                yield block
            packed.require_unchanged(file)
    except DAMAGED as error:
        raise ValueError(f"{packed.display_name} cannot be unpacked: {error}; restore the file") from None
