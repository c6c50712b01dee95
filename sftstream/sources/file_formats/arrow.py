"""Read Arrow files by row number, mapped into memory. Also used for copies of Parquet files."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from io import BufferedReader, BytesIO, FileIO
from itertools import accumulate, chain, islice
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.ipc

from sftstream.cache import cached, derived
from sftstream.door import Door
from sftstream.excerpt import one_line
from sftstream.records import UNDECODABLE, BrokenRow, Unreadable
from sftstream.sources.rows import OPEN_FILES, FileIdentity, ReadRow, RowsFrom, Text
from sftstream.sources.stored import Stored, copy_of

Source = tuple[pa.Schema, Iterable[pa.RecordBatch]]
Decoder = Callable[[Any], Any]
_UNHOLDABLE = (pa.ArrowException, *UNDECODABLE, ValueError, TypeError, KeyError, ArithmeticError)
"""Errors of Arrow when it converts a value to Python: numbers and dates out of range, keys that
cannot be hashed, unknown time zones, text that is not UTF-8."""
_LISTS = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)
_BINARY = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
"""Text type -> binary type with the same memory layout."""
_FILE, _END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"
"""First bytes of the Arrow file format, and last bytes of the Arrow stream format."""


class Batches:
    """Rows of record batches by number, as Python values.

    A table stores null for a field that a row does not have. `read` leaves out such fields, also
    inside structs: `{"role": "user", "name": null}` is read as `{"role": "user"}`. Text of the type
    `arrow.json` is decoded. A value that Python cannot represent, for example a date in the year
    20000, is read as an `Unreadable`.
    """

    def __init__(self, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
        self._batches = [batch for batch in batches if batch.num_rows]
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        self._decoders = _decoders(schema)
        self._valid: set[int] = set()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, row: int) -> Mapping[str, Any]:
        index = bisect_right(self._ends, row)
        batch = self._batches[index]
        if index not in self._valid:
            try:
                _validate_batch(batch)
            except pa.ArrowInvalid as error:
                raise BrokenRow(f"is in a damaged record batch: {one_line(error)}") from None
            self._valid.add(index)
        row += batch.num_rows - self._ends[index]
        values = {}
        for column, (name, decode) in zip(batch.columns, self._decoders.items(), strict=True):
            try:
                if (value := column[row].as_py()) is not None:
                    values[name] = decode(value)
            except _UNHOLDABLE as error:
                values[name] = Unreadable(one_line(error))
        return values


class Opened(NamedTuple):
    """Rows of an open file, the mapped file, and its descriptor."""

    batches: Batches
    mapped: mmap.mmap
    file: FileIO


class Arrow:
    """Rows of an Arrow file by number. All processes share the memory of the mapped file."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._rows = len(_opened(stored).batches)

    @property
    def identity(self) -> FileIdentity:
        return self._stored.identity

    def __len__(self) -> int:
        return self._rows

    def read(self, row: int) -> Mapping[str, Any]:
        batches, mapped, _ = _opened(self._stored)
        if mapped.size() < len(mapped):  # reading a page that was cut off would crash the process
            raise RuntimeError(
                f"{self.locate_row(row)} is no longer there: the file shrank while it was read; restore the file"
            )
        return batches.read(row)

    def locate_row(self, row: int) -> str:
        return f"{self._stored.display_name}[{row}]"

    def require_intact(self, row: int) -> None:
        """Do nothing: an Arrow file has no row index."""

    def require_unchanged(self) -> None:
        self._stored.require_unchanged(_opened(self._stored).file)

    def digest_in_full(self, interrupted: Callable[[], bool], *, quiet: bool) -> str:
        return self._stored.digest_in_full(interrupted, quiet=quiet)


def arrow(stored: Stored) -> Arrow:
    """Return the rows of an Arrow file.

    A file with compressed batches cannot be mapped, so it is copied into the cache. Raises
    ValueError if the file is not a readable Arrow file.
    """
    with Door(f"{stored.display_name} is not a readable Arrow file"):
        mapped = _mapped(stored)
        filled = (batch for batch in _source(stored, mapped)[1] if batch.num_rows)
        if all(_lies_in(mapped, batch) for batch in islice(filled, 1)):
            return Arrow(stored)
        return in_columns(stored, lambda: _checked(*_source(stored, mapped)))


def in_columns(original: Stored, source: Callable[[], Source]) -> Arrow:
    """Return the rows of `source()`, which are copied once into an Arrow file in the cache."""
    key = derived("arrow", original.key)
    copy = cached(key, ".arrow", lambda: _blocks(*source()))
    return Arrow(copy_of(original, copy, key))


def arrow_forward(text: Text, start: int, _rest: Text | None = None) -> RowsFrom:
    """Read the rows of an Arrow file (file or stream format) from the beginning of the record batch
    with row `start`."""
    _, read = _source_of(text.display_name, pa.PythonFile(seekable(text.file), "r"))
    batches, first = iter(read), 0
    for batch in batches:
        if first + batch.num_rows > start:
            return RowsFrom(first, rows_of(chain([batch], batches)))
        first += batch.num_rows
    return RowsFrom(first, iter(()))


def rows_of(batches: Iterable[pa.RecordBatch]) -> Iterator[ReadRow]:
    """Yield for each row of the batches a function that reads the row."""
    for batch in batches:
        rows = Batches(batch.schema, [batch])
        for row in range(len(rows)):
            yield partial(rows.read, row)


def seekable(file: BufferedReader) -> Any:
    """Return `file` if it is seekable, else a copy of its content in memory."""
    return file if file.seekable() else BytesIO(file.read())


def _blocks(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[bytes]:
    """Yield the bytes of an Arrow stream, one batch at a time."""
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
            raise ValueError(f"{stored.display_name} is empty; remove the file or write it again")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _source_of(display_name: str, file: pa.NativeFile) -> Source:
    """Return schema and batches of an open file in the file or the stream format.

    Raises ValueError if the file was truncated.
    """
    if file.read_at(len(_FILE), 0) == _FILE:
        reader = pa.ipc.open_file(file)
        return reader.schema, map(reader.get_batch, range(reader.num_record_batches))
    # Without this check, a stream truncated between two batches would seem complete.
    if file.read_at(len(_END), max(file.size() - len(_END), 0)) != _END:
        raise ValueError(
            f"{display_name} lacks the end mark of an Arrow stream: the file was truncated, or is still being written; "
            "write the file again, or wait for its end"
        )
    file.seek(0)
    reader = pa.ipc.open_stream(file)
    return reader.schema, reader


def _source(stored: Stored, mapped: mmap.mmap) -> Source:
    return _source_of(stored.display_name, pa.BufferReader(pa.py_buffer(mapped)))


def _checked(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Source:
    def checked() -> Iterator[pa.RecordBatch]:
        for batch in batches:
            _validate_batch(batch)  # Arrow aborts the process if it writes a damaged batch
            yield batch

    return schema, checked()


def _lies_in(mapped: mmap.mmap, batch: pa.RecordBatch) -> bool:
    mapping = pa.py_buffer(mapped)
    buffers = (buffer for column in batch.columns for buffer in column.buffers() if buffer is not None)
    return all(mapping.address <= buffer.address <= mapping.address + mapping.size for buffer in buffers)


@lru_cache(maxsize=OPEN_FILES)
def _opened(stored: Stored) -> Opened:
    mapped = _mapped(stored)
    return Opened(Batches(*_source(stored, mapped)), mapped, stored.open())


def _validate_batch(batch: pa.RecordBatch) -> None:
    """Raise ArrowInvalid if any offset, index or length in the batch is invalid.

    Text is not checked, because text that is not UTF-8 breaks only its own row.
    """
    for column in batch.columns:
        column.validate()
        _validate(column)


def _validate(array: pa.Array) -> None:
    """Raise ArrowInvalid if an offset or index at any depth is invalid.

    Arrow's own check of a nested array would also refuse text that is not UTF-8. So each level is
    checked alone, with nulls in place of the level below.
    """
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        _validate(array.storage)
    elif kind in _BINARY:
        array.view(_BINARY[kind]).validate(full=True)
    elif pa.types.is_struct(kind):
        for index in range(kind.num_fields):
            _validate(array.field(index))
    elif pa.types.is_map(kind):
        _outline(array, pa.list_(pa.null()), len(array.keys)).validate(full=True)
        _validate(array.keys)
        _validate(array.items)
    elif any(is_list(kind) for is_list in _LISTS):
        _outline(array, _list_of_nulls(kind), len(array.values)).validate(full=True)
        _validate(array.values)
    elif pa.types.is_dictionary(kind):
        pa.DictionaryArray.from_arrays(array.indices, pa.nulls(len(array.dictionary)), safe=True)
        _validate(array.dictionary)
    elif pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        array.validate()  # not the values: a date out of range matters to its own row only
    else:
        array.validate(full=True)


def _outline(array: pa.Array, kind: pa.DataType, children: int) -> pa.Array:
    """Return a list array with the offsets of `array` and `children` nulls as its values."""
    buffers = array.buffers()[: kind.num_buffers]
    return pa.Array.from_buffers(kind, len(array), buffers, offset=array.offset, children=[pa.nulls(children)])


def _list_of_nulls(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_large_list(kind):
        return pa.large_list(pa.null())
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(pa.null(), kind.list_size)
    if pa.types.is_list_view(kind):
        return pa.list_view(pa.null())
    return pa.large_list_view(pa.null()) if pa.types.is_large_list_view(kind) else pa.list_(pa.null())


def _decoders(fields: Iterable[pa.Field]) -> dict[str, Decoder]:
    """Return the decoder of each field; raises ArrowInvalid if two fields have one name."""
    decoders: dict[str, Decoder] = {}
    for field in fields:
        if field.name in decoders:
            raise pa.ArrowInvalid(f"two of its fields have the name {field.name!r}")
        decoders[field.name] = _decoder(field.type)
    return decoders


def _struct(fields: Iterable[pa.Field]) -> Decoder:
    decoders = _decoders(fields)
    return lambda value: {name: decoders[name](item) for name, item in value.items() if item is not None}


def _decoder(kind: pa.DataType) -> Decoder:
    """Return a function that turns a value from Arrow's `as_py` into a plain value."""
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
