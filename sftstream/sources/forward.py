"""The rows of a file one after the other, for what is neither fetched nor indexed: each as it would be read by number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BufferedReader, BytesIO
from itertools import accumulate
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from sftstream.sources.arrow import UNREADABLE, Batches, source_of
from sftstream.sources.compressed import unpacking
from sftstream.sources.delimited import divided, header, record
from sftstream.sources.kinds import suffixes
from sftstream.sources.location import FileLocation
from sftstream.sources.remote import lost
from sftstream.sources.rows import BOM, UNDECODABLE, Decode, LocatesRows, decoded_json

Row = Callable[[Decode], Any]
"""Decodes a row that has come by, with this where it is JSON; raises `BrokenRow`."""
_BATCH = 1000
"""Rows of a Parquet file decoded at a time."""


class RowsFrom(NamedTuple):
    """Rows in their order, and the number of the first."""

    first: int
    rows: Iterator[Row]


class _Shard(NamedTuple):
    display_name: str

    def locate_row(self, row: int) -> str:
        return f"{self.display_name}[{row}]"


def read_forward(location: FileLocation, at: int) -> RowsFrom:
    """The rows from `at` on, and before it as many as the kind of file asks for.

    Raises ValueError, also later, where the file is not what its name says.
    """
    kind, packed = suffixes(location.name)
    file = unpacking(location.open(), packed) if packed else location.open()
    return READERS[kind](file, _Shard(location.display_name), at)


def _json_lines(file: BufferedReader, shard: _Shard, _at: int) -> RowsFrom:
    return RowsFrom(0, _lines(_past_bom(file), shard))


def _json(file: BufferedReader, shard: _Shard, _at: int) -> RowsFrom:
    array = _past_bom(file).peek(4096).lstrip().startswith(b"[")
    return RowsFrom(0, _elements(file, shard) if array else _lines(file, shard))


def _past_bom(file: BufferedReader) -> BufferedReader:
    if file.peek(len(BOM)).startswith(BOM):
        file.read(len(BOM))
    return file


def _lines(file: Iterable[bytes], shard: LocatesRows) -> Iterator[Row]:
    for row, line in enumerate(line for line in file if line.strip()):
        yield partial(decoded_json, line, shard, row)


def _elements(file: BufferedReader, shard: _Shard) -> Iterator[Row]:
    try:
        elements = msgspec.json.decode(file.read(), type=list[msgspec.Raw])
    except UNDECODABLE as error:
        raise ValueError(f"it is not a JSON array of conversations: {error}") from None
    for row, element in enumerate(elements):
        yield partial(decoded_json, bytes(element), shard, row)


def _delimited(file: BufferedReader, shard: _Shard, _at: int, *, delimiter: str) -> RowsFrom:
    texts = filter(None, (b"".join(lines).strip(b"\r\n") for lines in divided(_past_bom(file), delimiter)))
    columns = header(next(texts, b""), delimiter, shard.display_name)
    return RowsFrom(0, (partial(_record, text, delimiter, columns, shard, row) for row, text in enumerate(texts)))


def _record(text: bytes, delimiter: str, columns: list[str], shard: _Shard, row: int, _decode: Decode) -> Any:
    return record(text, delimiter, columns, shard, row)


def _parquet(file: BufferedReader, shard: _Shard, at: int) -> RowsFrom:
    """Row groups that lie before `at` are not read."""
    opened = ParquetFile(_seekable(file), page_checksum_verification=True)
    groups = range(opened.num_row_groups)
    ends = list(accumulate((opened.metadata.row_group(group).num_rows for group in groups), initial=0))
    wanted = [group for group in groups if ends[group + 1] > at]
    first = ends[wanted[0]] if wanted else ends[-1]
    batches = opened.iter_batches(_BATCH, row_groups=wanted) if wanted else ()
    return RowsFrom(first, _in_batches(batches, shard, first))


def _arrow(file: BufferedReader, shard: _Shard, _at: int) -> RowsFrom:
    _, batches = source_of(shard.display_name, pa.PythonFile(_seekable(file), "r"))
    return RowsFrom(0, _in_batches(batches, shard, 0))


def _in_batches(batches: Iterable[pa.RecordBatch], shard: _Shard, first: int) -> Iterator[Row]:
    for batch in batches:
        rows = Batches(shard.display_name, batch.schema, [batch], first)
        for row in range(len(rows)):
            yield partial(rows.read, row)
        first += len(rows)


def _seekable(file: BufferedReader) -> Any:
    return file if file.seekable() else BytesIO(file.read())


READERS: dict[str, Callable[[BufferedReader, _Shard, int], RowsFrom]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_delimited, delimiter=","),
    ".tsv": partial(_delimited, delimiter="\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
}


def failures() -> tuple[type[Exception], ...]:
    """What reading on raises where a file is damaged, or out of reach."""
    return *UNREADABLE, *lost(), ValueError
