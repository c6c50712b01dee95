"""Parquet encodes rows in groups, so they are decoded once into an Arrow file in the cache, which has any of them at hand."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from pyarrow.parquet import ParquetFile

from sftstream.sources.arrow import UNREADABLE, Arrow, Source, in_columns
from sftstream.sources.rows import Stored

_BATCH = 1000
"""Rows decoded and copied at a time: memory is a row group's compressed pages and these."""


def parquet(stored: Stored) -> Arrow:
    """Its rows; raises ValueError where the file is no Parquet, or is damaged anywhere."""
    try:
        return in_columns(stored, lambda: _source(stored))
    except UNREADABLE as error:
        raise ValueError(f"{stored.display_name} is not a readable Parquet file: {error}") from None


def _source(stored: Stored) -> Source:
    file = ParquetFile(stored.path, page_checksum_verification=True)
    return file.schema_arrow, _batches(stored, file)


def _batches(stored: Stored, file: ParquetFile) -> Iterator[pa.RecordBatch]:
    yield from file.iter_batches(_BATCH)
    with stored.open():  # else what was decoded has another digest
        pass
