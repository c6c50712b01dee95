"""Arrow record batches, mapped from a file. What is stored in columns of another kind is copied into such a file once."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from io import BufferedReader, BytesIO
from itertools import accumulate, islice
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.ipc

from sftstream.cache import cached
from sftstream.records import UNDECODABLE, BrokenRow
from sftstream.sources.rows import (
    OPEN_FILES,
    FileIdentity,
    ReadRow,
    RowsFrom,
    Stored,
    copy_of,
    derived,
)

Source = tuple[pa.Schema, Iterable[pa.RecordBatch]]
Decoder = Callable[[Any], Any]
UNREADABLE = (pa.ArrowException, OSError)
"""What Arrow raises on a file that is none, or is damaged."""
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
_FILE, _END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"
"""How the format for random access begins, and how the one for streams ends."""


class Batches:
    """The rows of record batches, as Python values.

    Columns hold null for what a row lacks, in structs at any depth; here a row lacks it again. `Json` text is decoded.
    """

    def __init__(self, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
        self._batches = [batch for batch in batches if batch.num_rows]
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        self._plain = _struct(schema)
        self._valid: set[int] = set()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, row: int) -> Mapping[str, Any]:
        index = bisect_right(self._ends, row)
        batch = self._batches[index]
        try:
            if index not in self._valid:
                _validate(batch)
                self._valid.add(index)
            return self._plain(batch.slice(row - self._ends[index] + batch.num_rows, 1).to_pylist()[0])
        except pa.ArrowInvalid as error:
            raise BrokenRow(f"is in a damaged record batch: {error}") from None
        except UNDECODABLE as error:
            raise BrokenRow(f"cannot be decoded: {error}") from None


class Arrow:
    """An Arrow file of either format, whose pages lie in memory once for all processes."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._rows = len(_opened(stored)[0])

    @property
    def identity(self) -> FileIdentity:
        return self._stored.identity

    def __len__(self) -> int:
        return self._rows

    def read(self, row: int) -> Mapping[str, Any]:
        batches, mapped = _opened(self._stored)
        if mapped.size() < len(mapped):  # to touch what was cut off would be a bus error
            raise RuntimeError(
                f"{self.locate_row(row)} is no longer there: the file shrank while it was read; restore it"
            )
        return batches.read(row)

    def locate_row(self, row: int) -> str:
        return f"{self._stored.display_name}[{row}]"

    def require_intact(self, row: int) -> None:
        """Do nothing: a table has no row index."""


def arrow(stored: Stored) -> Arrow:
    """The rows of an Arrow file; of a compressed one by way of a copy, since its batches cannot be mapped."""
    try:
        mapped = _mapped(stored)
        filled = (batch for batch in _source(stored, mapped)[1] if batch.num_rows)
        if all(_lies_in(mapped, batch) for batch in islice(filled, 1)):
            return Arrow(stored)
        return in_columns(stored, lambda: _checked(*_source(stored, mapped)))
    except UNREADABLE as error:
        raise ValueError(f"{stored.display_name} is not a readable Arrow file: {error}") from None


def in_columns(original: Stored, source: Callable[[], Source]) -> Arrow:
    """The rows of `source`, copied once into an Arrow file in the cache."""
    key = derived("arrow", original.key)
    copy = cached(key, ".arrow", lambda: _blocks(*source()))
    return Arrow(copy_of(original, copy, key))


def arrow_forward(file: BufferedReader, name: str, _start: int) -> RowsFrom:
    """Read the rows of an Arrow file of either format from its beginning."""
    _, batches = _source_of(name, pa.PythonFile(seekable(file), "r"))
    return RowsFrom(0, rows_of(batches))


def rows_of(batches: Iterable[pa.RecordBatch]) -> Iterator[ReadRow]:
    """Read the rows of record batches, one batch after the other."""
    for batch in batches:
        rows = Batches(batch.schema, [batch])
        for row in range(len(rows)):
            yield partial(rows.read, row)


def seekable(file: BufferedReader) -> Any:
    """Return `file`, or its content in memory if it can only be read forward."""
    return file if file.seekable() else BytesIO(file.read())


def _blocks(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[bytes]:
    """The streaming format, a batch at a time."""
    sink = BytesIO()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            yield sink.getvalue()
            sink.seek(0)
            sink.truncate()
    yield sink.getvalue()


def _mapped(stored: Stored) -> mmap.mmap:
    with stored.open() as file:
        if not stored.seal[0]:
            raise ValueError(f"{stored.display_name} is empty; remove it or write it again")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _source_of(display_name: str, file: pa.NativeFile) -> Source:
    """The batches of an open file of either format; raises ValueError where it was cut."""
    if file.read_at(len(_FILE), 0) == _FILE:
        reader = pa.ipc.open_file(file)
        return reader.schema, map(reader.get_batch, range(reader.num_record_batches))
    # A stream that is cut between two batches reads like a shorter one.
    if file.read_at(len(_END), max(file.size() - len(_END), 0)) != _END:
        raise ValueError(f"{display_name} lacks the mark at its end: the file was cut, or is still being written")
    file.seek(0)
    reader = pa.ipc.open_stream(file)
    return reader.schema, reader


def _source(stored: Stored, mapped: mmap.mmap) -> Source:
    return _source_of(stored.display_name, pa.BufferReader(pa.py_buffer(mapped)))


def _checked(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Source:
    def checked() -> Iterator[pa.RecordBatch]:
        for batch in batches:
            _validate(batch)  # Arrow aborts the process where it writes one that is damaged
            yield batch

    return schema, checked()


def _lies_in(mapped: mmap.mmap, batch: pa.RecordBatch) -> bool:
    whole = pa.py_buffer(mapped)
    buffers = (buffer for column in batch.columns for buffer in column.buffers() if buffer is not None)
    return all(whole.address <= buffer.address <= whole.address + whole.size for buffer in buffers)


@lru_cache(maxsize=OPEN_FILES)
def _opened(stored: Stored) -> tuple[Batches, mmap.mmap]:
    mapped = _mapped(stored)
    return Batches(*_source(stored, mapped)), mapped


def _validate(batch: pa.RecordBatch) -> None:
    """Raises ArrowInvalid where offsets point anywhere, at memory speed. That text is UTF-8 is left to its row."""
    batch.to_struct_array().view(_untexted(pa.struct(batch.schema))).validate(full=True)


def _untexted(kind: pa.DataType) -> pa.DataType:
    """The type with the same layout and bytes for text."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_untexted(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_untexted(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_untexted(kind.value_type)))
    return kind


def _struct(fields: Iterable[pa.Field]) -> Callable[[Any], dict[str, Any]]:
    decoders = {}
    for field in fields:
        if field.name in decoders:
            raise pa.ArrowInvalid(f"two of its fields have the name {field.name!r}")
        decoders[field.name] = _decoder(field.type)
    return lambda value: {name: decoders[name](item) for name, item in value.items() if item is not None}


def _decoder(kind: pa.DataType) -> Decoder:
    """What makes a plain value of one that Arrow gives for this type."""
    if pa.types.is_struct(kind):
        return _struct(kind)
    if pa.types.is_map(kind):
        decode = _decoder(kind.item_type)
        return lambda value: {key: None if item is None else decode(item) for key, item in value}
    if any(is_list(kind) for is_list in _LISTS):
        decode = _decoder(kind.value_type)
        return lambda value: [None if item is None else decode(item) for item in value]
    if isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.json":
        return msgspec.json.decode
    return lambda value: value
