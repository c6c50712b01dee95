"""Convert a state to accepted changes of a source's files: new row numbers, and past orders.

An epoch that a stream has begun is finished in its old order, without added rows. Added rows are
drawn from the next epoch on. So each row is drawn once in an epoch. Example: a file of 2 rows gets
a third row during epoch 0. Epoch 0 draws the rows 0 and 1; epoch 1 draws the rows 0, 1 and 2.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TypeVar

import msgspec

from sftstream.config import DataConfig
from sftstream.identity import Identity, SourceIdentity
from sftstream.records import Refusal, Segment
from sftstream.sources import Corpus, FileIdentity, FileSet
from sftstream.sources.file_formats.jsonl import JsonLines
from sftstream.state import DataState, Leftover, PastOrder, RowParts, StreamState
from sftstream.streaming.sampler import row_order

R = TypeVar("R", Segment, Refusal, RowParts)
Files = tuple[tuple[int, int], ...]
"""For each file before a change: its number of rows, and the present number of its first row."""


def follow_sources(saved: DataState, identity: Identity, config: DataConfig, corpus: Corpus) -> DataState:
    """Return the state with the row numbers of the changed files, and with past orders of rows.

    `saved` has the states of all streams. Raises ValueError naming the first file whose change
    would lose or repeat rows.
    """
    for source, (before, now) in enumerate(zip(saved.identity.sources, identity.sources, strict=False)):
        if before.files == now.files and before.rows == now.rows and before.shards == now.shards:
            continue
        files = corpus.sources[source]
        if not isinstance(files, FileSet) or before.rows is None:
            _require_streamed_alike(source, before, now)
            continue
        saved = _follow(saved, source, _match(source, before, files), files, config)
    return saved


def _require_streamed_alike(source: int, before: SourceIdentity, now: SourceIdentity) -> None:
    """Raise ValueError if a file of a streamed source has other content than before.

    New names are accepted. `identity.FIXED` refuses another number of files.
    """
    for old, new in zip(before.files, now.files, strict=True):
        if _content(old) != _content(new):
            raise ValueError(
                f"data.sources[{source}]: {new.name!r} has other content than {old.name!r} had, and rows of a streamed "
                "source are not counted, so the rows still to come are unknown; restore the file, or start a new run"
            )


def _match(source: int, before: SourceIdentity, files: FileSet) -> Files:
    """Return each old file's number of rows and the present number of its first row."""
    starts = [0, *accumulate(files.file_sizes)]
    indices = _indices(source, before.files, files.identities)
    counts = [_rows_known(old, files, index) for old, index in zip(before.files, indices, strict=True)]
    unknown = [number for number, count in enumerate(counts) if count is None]
    rest = (before.rows or 0) - sum(count or 0 for count in counts)
    if len(unknown) > 1:
        names = ", ".join(repr(before.files[number].name) for number in unknown[:3])
        raise ValueError(
            f"data.sources[{source}]: {names} changed inside, and the state has only the sum of their rows; "
            "change one file at a time and resume after each, or start a new run"
        )
    for number in unknown:
        name, now = before.files[number].name, files.file_sizes[indices[number]]
        if now != rest:
            change = "lost rows" if now < rest else "grew, but not at its end alone"
            raise ValueError(
                f"data.sources[{source}]: {name!r} {change} ({rest} rows before, {now} now), so the "
                "rows still to come are unknown; restore the file, append rows to JSON lines, or put new rows into a new file"
            )
        counts[number], rest = rest, 0
    if rest:
        raise ValueError(
            f"data.sources[{source}] had {before.rows} rows, but its files have {(before.rows or 0) - rest} of these rows now; "
            "restore the files, or start a new run"
        )
    return tuple((count or 0, starts[index]) for count, index in zip(counts, indices, strict=True))


def _indices(source: int, before: Sequence[FileIdentity], now: Sequence[FileIdentity]) -> list[int]:
    """Return the present index of each old file.

    Files are matched by content and name first, then by content, then by name.

    Raises ValueError if a file is gone.
    """
    left = dict(enumerate(now))
    found: dict[int, int] = {}
    same: list[Callable[[FileIdentity, FileIdentity], bool]] = [
        lambda old, new: old == new,
        lambda old, new: _content(old) == _content(new),
        lambda old, new: old.name == new.name,
    ]
    for is_same in same:
        for number, old in enumerate(before):
            if number not in found:
                index = next((index for index, new in left.items() if is_same(old, new)), None)
                if index is not None:
                    found[number] = index
                    del left[index]
    for number, old in enumerate(before):
        if number not in found:
            raise ValueError(
                f"data.sources[{source}]: {old.name!r} is gone, with rows that were drawn or are still to come; "
                "restore the file, or start a new run"
            )
    return [found[number] for number in range(len(before))]


def _content(file: FileIdentity) -> tuple[str, int, bool]:
    return file.sha256, file.size, file.sampled


def _rows_known(old: FileIdentity, files: FileSet, index: int) -> int | None:
    """Return the number of rows of an old file; None if rows were edited, removed or inserted."""
    file = files.files[index]
    if _content(old) == _content(file.identity):
        return files.file_sizes[index]
    return file.rows_of(old) if isinstance(file, JsonLines) else None


def _follow(saved: DataState, source: int, moved: Files, files: FileSet, config: DataConfig) -> DataState:
    past = saved.orders.get(source, ())
    unmoved = tuple(zip(files.file_sizes, [0, *accumulate(files.file_sizes)], strict=False))
    if moved == unmoved:
        return saved  # rows were edited in place
    order = row_order([rows for rows, _ in moved], config, source, past)
    streams = len(saved.streams)
    ends = [number + (s.drawn[source] - 1) * streams + 1 for number, s in saved.streams.items() if s.drawn[source]]
    epochs = order.first_epoch_after(max(ends, default=0))
    orders = [PastOrder(old.epochs, tuple((rows, _moved(first, moved)) for rows, first in old.files)) for old in past]
    if epochs > (past[-1].epochs if past else 0):
        orders.append(PastOrder(epochs, moved))
    return msgspec.structs.replace(
        saved,
        streams={number: _renumbered(stream, source, moved) for number, stream in saved.streams.items()},
        past_orders={**saved.orders, source: tuple(orders)},
    )


def _moved(row: int, moved: Files) -> int:
    """Return the present number of a row."""
    ends = list(accumulate(rows for rows, _ in moved))
    file = min(bisect_right(ends, row), len(ends) - 1)
    rows, first = moved[file]
    return first + row - (ends[file] - rows)


def _renumbered(stream: StreamState, source: int, moved: Files) -> StreamState:
    def segments(old: Sequence[Segment]) -> Iterator[Segment]:
        return (_with_row(segment, source, moved) for segment in old)

    parts = stream.row_parts
    return msgspec.structs.replace(
        stream,
        planned=tuple(tuple(segments(pack)) for pack in stream.planned),
        leftovers=tuple(Leftover(_with_row(left.segment, source, moved), left.waited) for left in stream.leftovers),
        unlisted=tuple(_with_row(refusal, source, moved) for refusal in stream.unlisted),
        row_parts=tuple(_with_row(row, source, moved) for row in parts) if isinstance(parts, tuple) else parts,
    )


def _with_row(record: R, source: int, moved: Files) -> R:
    if record.source != source:
        return record
    return msgspec.structs.replace(record, row=_moved(record.row, moved))
