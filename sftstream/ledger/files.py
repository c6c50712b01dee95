"""Store a ledger in files that stay readable after a kill at any instruction.

    ledger/
      steps-00000001-00000100.parquet   closed file: the segments of the steps 1 to 100
      journal                           the steps after the last closed file, a frame for each step
      state-00000100.msgpack            data state after step 100
      sessions.jsonl                    the sessions: a line for each start of the run
      unapplied.jsonl                   the steps whose update was not applied, if there are any

To *close* steps is to move them from the journal into a closed file, which is never modified. After
a kill during the move, steps may be in both files; readers then use the closed file. A frame is a
header (step, number of segments, CRC-32 of the segments) followed by the segments as bytes.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from sftstream.door import Door
from sftstream.ledger.records import StepSegments
from sftstream.ledger.segments import NO_SEGMENTS, SEGMENT, Segments

JOURNAL, SESSIONS, UNAPPLIED = "journal", "sessions.jsonl", "unapplied.jsonl"
_CLOSED = re.compile(r"steps-(\d{8,})-(\d{8,})\.parquet")
_STATE = re.compile(r"state-(\d{8,})\.msgpack")
_CRC = b"crc32"
_HEADER = struct.Struct("<qqI")
_NAMES = [name for name in SEGMENT.names or () if name != "pack"]
_SCHEMA = pyarrow.schema(
    [("step", pyarrow.int64()), ("pack", pyarrow.int32())]
    + [(name, pyarrow.from_numpy_dtype(SEGMENT[name])) for name in _NAMES]
)
_ENCODED = {"row": "DELTA_BINARY_PACKED", "tokens": "DELTA_BINARY_PACKED", "trained_tokens": "DELTA_BINARY_PACKED"}
"""Parquet encoding of columns with many different values; all other columns use a dictionary."""


class ClosedFile(NamedTuple):
    """A closed file with the segments of the steps `first` to `last`."""

    path: Path
    first: int
    last: int


def closed_files(directory: Path) -> list[ClosedFile]:
    """Return the closed files of a ledger, in the order of their steps."""
    found = ((path, _CLOSED.fullmatch(path.name)) for path in directory.glob("steps-*.parquet"))
    return sorted((ClosedFile(path, int(m[1]), int(m[2])) for path, m in found if m), key=lambda file: file[1:])


def state_files(directory: Path) -> dict[int, Path]:
    """Return the path of each stored data state, by step, in the order of steps."""
    found = ((path, _STATE.fullmatch(path.name)) for path in directory.glob("state-*.msgpack"))
    return dict(sorted((int(match[1]), path) for path, match in found if match))


def state_file(directory: Path, step: int) -> Path:
    """Return the path of the data state after `step`."""
    return directory / f"state-{step:08d}.msgpack"


def write_closed(directory: Path, first: int, steps: Sequence[StepSegments]) -> ClosedFile:
    """Write a closed file of the steps from `first` to the last of `steps`, and sync it to disk.

    Equal steps result in equal bytes. Raises OSError if the disk does not accept the file.
    """
    last = steps[-1].step
    path = directory / f"steps-{first:08d}-{last:08d}.parquet"
    segments = np.concatenate([step.segments for step in steps])
    numbers = np.repeat([step.step for step in steps], [len(step.segments) for step in steps])
    columns = [numbers.astype(np.int64), segments["pack"], *(segments[name] for name in _NAMES)]
    arrays = [_as_arrow(np.ascontiguousarray(column)) for column in columns]
    schema = _SCHEMA.with_metadata({_CRC: f"{_crc(numbers, segments):08x}"})
    table = pyarrow.Table.from_arrays(arrays, schema=schema)
    partial = directory / f".{path.name}"
    pyarrow.parquet.write_table(
        table,
        partial,
        compression="zstd",
        use_dictionary=[name for name in _SCHEMA.names if name not in _ENCODED],
        column_encoding=_ENCODED,
    )
    publish(partial, path)
    return ClosedFile(path, first, last)


def _as_arrow(column: NDArray[np.integer]) -> pyarrow.Array:
    # pyarrow.array would import pandas, which takes half a second at the first checkpoint.
    return pyarrow.Array.from_buffers(
        pyarrow.from_numpy_dtype(column.dtype), len(column), [None, pyarrow.py_buffer(column)]
    )


def read_closed(file: ClosedFile) -> list[StepSegments]:
    """Return all steps of a closed file, including steps without segments.

    Raises ValueError if the file is damaged.
    """
    with Door(f"{file.path} is damaged"):
        table = pyarrow.parquet.read_table(file.path, use_threads=False)
    if not table.schema.equals(_SCHEMA) or any(column.null_count for column in table.columns):
        raise ValueError(f"{file.path} is damaged: its columns are not {', '.join(_SCHEMA.names)}; restore the file")
    with Door(f"{file.path} is damaged"):
        numbers = table["step"].to_numpy()
        segments = np.empty(len(numbers), SEGMENT)
        for name in ("pack", *_NAMES):
            segments[name] = table[name].to_numpy()
    if (table.schema.metadata or {}).get(_CRC) != f"{_crc(numbers, segments):08x}".encode():
        raise ValueError(f"{file.path} is damaged: its checksum is not that of its segments; restore the file")
    steps = np.arange(file.first, file.last + 1)
    starts, ends = numbers.searchsorted(steps), numbers.searchsorted(steps, "right")
    if (np.diff(numbers) < 0).any() or (ends - starts).sum() != len(numbers):
        raise ValueError(
            f"{file.path} is damaged: its steps are not {file.first} to {file.last} in order; restore the file"
        )
    return [
        StepSegments(step, segments[start:end])
        for step, start, end in zip(steps.tolist(), starts.tolist(), ends.tolist(), strict=True)
    ]


def _crc(numbers: NDArray[np.int64], segments: Segments) -> int:
    return zlib.crc32(segments.tobytes(), zlib.crc32(numbers.astype("<i8").tobytes()))


def frame(step: StepSegments) -> bytes:
    """Return a step as a frame of the journal."""
    content = step.segments.tobytes()
    return _HEADER.pack(step.step, len(step.segments), zlib.crc32(content)) + content


def read_journal(directory: Path) -> Iterator[StepSegments]:
    """Yield the steps of the journal up to the first incomplete frame, which a kill may leave."""
    path = directory / JOURNAL
    content = path.read_bytes() if path.exists() else b""
    at = 0
    while at + _HEADER.size <= len(content):
        step, count, crc = _HEADER.unpack_from(content, at)
        at += _HEADER.size
        part = content[at : at + max(count, 0) * SEGMENT.itemsize]
        if count < 0 or len(part) < count * SEGMENT.itemsize or zlib.crc32(part) != crc:
            return
        yield StepSegments(step, np.frombuffer(part, SEGMENT) if count else NO_SEGMENTS)
        at += len(part)


def publish(partial: Path, path: Path) -> None:
    """Sync the file `partial` to disk and rename it to `path`: after a power cut, `path` is a whole
    file or absent, never a part of a file."""
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Sync the bytes of a file, or the file names of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def in_order(segments: Segments) -> Segments:
    """Return segments ordered by pack; the segments of each pack keep their order."""
    packs = segments["pack"]
    return segments if (packs[1:] >= packs[:-1]).all() else segments[np.argsort(packs, kind="stable")]
