"""Compressed files: unpacked once into the cache for reading by row, or while read forward."""

from __future__ import annotations

from collections.abc import Iterator
from io import BufferedReader

import pyarrow as pa

from sftstream.cache import cached
from sftstream.sources.rows import Stored, copy_of, derived

CODECS = {".gz": "gzip", ".zst": "zstd"}
"""Suffix -> Arrow's name for the codec."""
_BLOCK = 4 << 20
"""Bytes unpacked at a time."""


def unpacked(packed: Stored, suffix: str) -> Stored:
    """Return the unpacked copy of a file; raises ValueError if the file is damaged or truncated."""
    key = derived("unpacked", packed.key)
    return copy_of(packed, cached(key, ".unpacked", lambda: _blocks(packed, CODECS[suffix])), key)


def unpacking(file: BufferedReader, suffix: str) -> BufferedReader:
    """Return the content of an open file, unpacked during reading."""
    return BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), CODECS[suffix]))


def _blocks(packed: Stored, codec: str) -> Iterator[bytes]:
    try:
        with packed.open() as file, pa.CompressedInputStream(pa.PythonFile(file, "r"), codec) as stream:
            while block := stream.read(_BLOCK):
                yield block
            packed.require_unchanged(file)
    except OSError as error:
        raise ValueError(f"{packed.display_name} cannot be unpacked: {error}; restore the file") from None
