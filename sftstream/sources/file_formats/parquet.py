"""Read Parquet files: by row number from a copy in Arrow format, or from beginning to end.

Parquet encodes rows in groups, so reading a single row would decode a whole group. Therefore the
file is copied once into an Arrow file in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import pyarrow as pa
from pyarrow.parquet import ParquetFile

from sftstream.door import Door
from sftstream.sources.file_formats.arrow import Arrow, Source, in_columns, rows_of, seekable
from sftstream.sources.rows import RowsFrom, Text
from sftstream.sources.stored import Stored

_BATCH = 1000
"""Number of rows decoded at a time. Memory holds these rows, and the compressed pages of their
group."""


def parquet(stored: Stored) -> Arrow:
    """Return the rows of a Parquet file; raises ValueError if damaged or not a Parquet file."""
    with Door(f"{stored.display_name} is not a readable Parquet file"):
        return in_columns(stored, lambda: _source(stored))


def parquet_forward(text: Text, start: int, _rest: Text | None = None) -> RowsFrom:
    """Read the rows of a Parquet file from the beginning of the row group with row `start`."""
    opened = ParquetFile(seekable(text.file), page_checksum_verification=True)
    groups = range(opened.num_row_groups)
    ends = list(accumulate((opened.metadata.row_group(group).num_rows for group in groups), initial=0))
    wanted = [group for group in groups if ends[group + 1] > start]
    batches = opened.iter_batches(_BATCH, row_groups=wanted) if wanted else ()
    return RowsFrom(ends[wanted[0]] if wanted else ends[-1], rows_of(batches))


def _source(stored: Stored) -> Source:
    file = ParquetFile(stored.path, page_checksum_verification=True)
    return file.schema_arrow, _batches(stored, file)


def _batches(stored: Stored, file: ParquetFile) -> Iterator[pa.RecordBatch]:
    yield from file.iter_batches(_BATCH)
    with stored.open():  # raises an error if the file changed while it was copied
        pass
