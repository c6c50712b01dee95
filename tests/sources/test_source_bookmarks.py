"""A resume of a streamed source begins to read at a bookmark near the saved position, in every kind of text file."""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import logging
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import pyarrow as pa
import pyarrow.ipc
import pytest
import tiny

from sftstream import DataConfig, PackLoader, SourceConfig
from sftstream.records import Ref
from sftstream.sources import Bookmark, StreamedReader, StreamedSource, skipping, streamed_reader
from sftstream.sources.rows import Place, ReadRow, RowsFrom

ROWS = tiny.rows(120)
COUNT = 60
"""Rows of each of the two files."""


def lines(rows: list[Any]) -> bytes:
    """JSON lines after a byte order mark, with blank lines and a broken row."""
    content = [json.dumps(row).encode() for row in rows]
    content[31] = content[31][:-7]
    return b"\xef\xbb\xbf" + b"\n \r\n".join(content) + b"\n"


def table(rows: list[Any]) -> bytes:
    """CSV with cells over several lines."""
    records = (f'"{i}\n?",{"south " * (i % 7 + 1)}\r\n' for i in range(len(rows)))
    return ("prompt,completion\r\n" + "".join(records)).encode()


def frames(content: bytes, size: int) -> bytes:
    """Zstandard frames of `size` bytes each, one of them empty, after a frame to be skipped."""
    parts = [content[start : start + size] for start in range(0, len(content), size)]
    packed = [pa.compress(part, "zstd", asbytes=True) for part in [parts[0], b"", *parts[1:]]]
    return b"\x53\x2a\x4d\x18\x03\0\0\0abc" + b"".join(packed)


def zstd_with_checksums(content: bytes) -> bytes:
    """Raw blocks and a run, written by hand: a header without a content size, and a checksum left out of the flags."""
    blocks = [content[start : start + 1000] for start in range(0, len(content), 1000)]
    encoded = [(len(block) << 3).to_bytes(3, "little") + block for block in blocks]
    run = (3 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\n"
    return b"\x28\xb5\x2f\xfd\x00\x50" + b"".join(encoded) + run


KINDS: dict[str, tuple[str, Callable[[list[Any]], bytes]]] = {
    "JSON lines": (".jsonl", lines),
    "CSV": (".csv", table),
    "gzip": (".jsonl.gz", lambda rows: gzip.compress(lines(rows))),
    "bz2": (".jsonl.bz2", lambda rows: bz2.compress(lines(rows))),
    "xz": (".csv.xz", lambda rows: lzma.compress(table(rows))),
    "one zstd frame": (".jsonl.zst", lambda rows: pa.compress(lines(rows), "zstd", asbytes=True)),
    "zstd frames": (".jsonl.zst", lambda rows: frames(lines(rows), 700)),
    "zstd frames with table": (".csv.zst", lambda rows: frames(table(rows), 97)),
    "zstd of raw blocks": (".jsonl.zst", lambda rows: zstd_with_checksums(lines(rows))),
    "JSON array": (".json", lambda rows: json.dumps(rows).encode()),
    "Arrow": (".arrow", lambda rows: arrow(rows)),
}


def arrow(rows: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    content = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=7)
    return bytes(sink.getvalue())


@pytest.fixture(autouse=True)
def _near_bookmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bookmark every five rows, since real distances need large files."""
    monkeypatch.setattr(streamed_reader, "ROWS_BETWEEN_BOOKMARKS", 5)


def write(directory: Path, kind: str) -> str:
    suffix, encode = KINDS[kind]
    for number in range(2):
        (directory / f"{number}{suffix}").write_bytes(encode(ROWS[number * COUNT : (number + 1) * COUNT]))
    return str(directory)


def configured(tokenizer: str, path: str, **changes: Any) -> DataConfig:
    one = {"path": path, "streaming": True}
    table = {"streams": 3, "global_batch": 3, "window": 4, "capacity": 128, "overflow": "split", "shuffle": "shards"}
    return tiny.data_config(tokenizer, sources=[one], **table | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_exactly_from_every_state(tmp_path: Path, tokenizer: str, kind: str) -> None:
    """Packs and states are those of a run without a stop, also over epochs of the same files."""
    config = configured(tokenizer, write(tmp_path, kind), epochs=2 if kind == "JSON lines" else 1)
    loader = PackLoader(config)
    states, digests = [loader.state_dict()], []
    for pack in loader:
        digests.append(pack.digest())
        states.append(loader.state_dict())
    assert loader.state.streams[0].refused == (({"broken row": 1 + (kind == "JSON lines")} if kind in BROKEN else {}),)
    for taken in range(4, len(digests) - 4, len(digests) // 4):
        resumed = PackLoader(config, state=states[taken])
        for number in range(taken, taken + 4):
            assert next(resumed).digest() == digests[number]
            assert resumed.state_dict() == states[number + 1]


BROKEN = {"JSON lines", "gzip", "bz2", "one zstd frame", "zstd frames", "zstd of raw blocks"}


def _begun(config: DataConfig) -> PackLoader:
    """A loader of one stream in the middle of a file."""
    loader = PackLoader(config)
    while not any(bookmark.row > 20 for bookmark in loader.state.streams[0].known_bookmarks.get(0, ())):
        next(loader)
    return loader


class Watched(StreamedSource):
    """Counts the rows that are read."""

    def __init__(self, path: str) -> None:
        super().__init__(SourceConfig(path=path, streaming=True))
        self.read: list[int] = []
        self.places: list[Place | None] = []

    def open(self, shard: int, at: int, place: Place | None = None) -> RowsFrom:
        self.places.append(place)
        read = super().open(shard, at, place)
        return read._replace(rows=self._recorded(read.first, read.rows))

    def _recorded(self, first: int, rows: Iterator[ReadRow]) -> Iterator[ReadRow]:
        for number, row in enumerate(rows, first):
            self.read.append(number)
            yield row


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("JSON array", "Arrow")])
def test_after_a_resume_a_file_is_read_from_the_bookmark_before_the_first_waiting_row(
    tmp_path: Path, kind: str
) -> None:
    source = Watched(write(tmp_path, kind))

    def ref(index: int) -> Ref:
        return Ref(0, source.number(1, index), 0)

    reader = StreamedReader(source)
    stored = [reader.read(ref(index)) for index in range(53) if index != 31]
    (bookmark,) = reader.bookmarks([ref(47), ref(52)])
    assert (bookmark.file, bookmark.row) == (1, 45)

    resumed = StreamedReader(source)
    resumed.remember([msgspec.msgpack.decode(msgspec.msgpack.encode(bookmark), type=Bookmark)])
    resumed.expect(ref(47))
    source.read.clear()
    assert resumed.read(ref(47)) == stored[46]
    assert resumed.read(ref(52)) == stored[51]
    assert source.read == list(range(45, 53))
    assert resumed.bookmarks([ref(52)])[0].row == 50
    assert resumed.read(ref(3)) == stored[3]  # a step backwards, before every bookmark
    assert resumed.bookmarks([ref(52)])[0].row == 50


def test_a_frame_is_unpacked_without_the_frames_before(tmp_path: Path) -> None:
    source = Watched(write(tmp_path, "zstd frames"))
    reader = StreamedReader(source)
    for index in range(53):
        reader.reaches(Ref(0, source.number(1, index), 0))
    (bookmark,) = reader.bookmarks([Ref(0, source.number(1, 52), 0)])
    assert bookmark.offset > 0.6 * (tmp_path / "1.jsonl.zst").stat().st_size
    assert bookmark.skipped <= 700


def test_rows_of_two_epochs_have_a_bookmark_each(tmp_path: Path) -> None:
    """So the rows between them are not read."""
    source = Watched(write(tmp_path, "JSON lines"))
    reader = StreamedReader(source)
    for index in [*range(59), *range(9)]:
        reader.reaches(Ref(0, source.number(0, index), 0))
    last, begun = Ref(0, source.number(0, 58), 0), Ref(0, source.number(0, 8), 1)
    bookmarks = reader.bookmarks([last, begun])
    assert [bookmark.row for bookmark in bookmarks] == [5, 55]
    resumed = StreamedReader(source)
    resumed.remember(bookmarks)
    resumed.expect(last)
    source.read.clear()
    assert resumed.reaches(begun)
    assert source.read == [*range(5, 9), *range(55, 59)]


@pytest.mark.parametrize("kind", ["JSON lines", "CSV", "gzip", "zstd frames"])
def test_an_edited_bookmark_is_refused_or_gives_the_same_packs(tmp_path: Path, tokenizer: str, kind: str) -> None:
    config = configured(tokenizer, write(tmp_path, kind), streams=1, global_batch=1, epochs=1)
    loader = _begun(config)
    state = tiny.plain(loader.state_dict())
    expected = tiny.digests(PackLoader(config, state=state))
    (bookmark,) = state["streams"]["0"]["bookmarks"]["0"]
    for field in range(5):
        for value in {-1, 0, 1, bookmark[field] - 1, bookmark[field] + 1, bookmark[field] + 5, 10**12} - {
            bookmark[field]
        }:
            edited = copy.deepcopy(state)
            edited["streams"]["0"]["bookmarks"]["0"][0][field] = value
            try:
                digests = tiny.digests(PackLoader(config, state=tiny.resealed(edited)))
            except ValueError as error:
                assert any(reason in str(error) for reason in REASONS), error  # noqa: PT017
            else:
                assert digests == expected


REASONS = (
    "has no row at the place of the state's bookmark: the source changed, or the state is damaged",
    "the state is damaged: stream 0: a bookmark ",
    "is not the row of the state's bookmark: the source changed, or the state is damaged",
    "cannot be read",
)


def test_a_state_without_bookmarks_goes_on(tmp_path: Path, tokenizer: str) -> None:
    config = configured(tokenizer, write(tmp_path, "gzip"), streams=1, global_batch=1)
    loader = _begun(config)
    state = tiny.plain(loader.state_dict())
    del state["streams"]["0"]["bookmarks"]
    assert tiny.digests(PackLoader(config, state=tiny.resealed(state))) == tiny.digests(loader)


def test_a_source_without_bookmarks_leaves_the_state_as_it_was(
    tmp_path: Path, tokenizer: str, corpus_path: str
) -> None:
    loader = PackLoader(tiny.data_config(tokenizer, corpus_path))
    tiny.take(loader, 8)
    assert all("bookmarks" not in stream for stream in tiny.plain(loader.state_dict())["streams"].values())


def test_a_remote_file_is_read_from_the_bookmark(tmp_path: Path, tokenizer: str) -> None:
    files = fsspec.filesystem("memory")
    for path in Path(write(tmp_path, "zstd frames")).iterdir():
        files.pipe(f"/bookmarks/{path.name}", path.read_bytes())
    try:
        config = configured(tokenizer, "memory://bookmarks/*", streams=1, global_batch=1)
        loader = _begun(config)
        resumed = PackLoader(config, state=loader.state_dict())
        assert tiny.digests(resumed) == tiny.digests(loader)
    finally:
        files.rm("/bookmarks", recursive=True)


@pytest.mark.parametrize(("kind", "unit"), [("gzip", "bytes"), ("JSON lines", "rows")])
def test_the_progress_of_a_long_skip_is_told(
    tmp_path: Path, kind: str, unit: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a compressed file from a bookmark, of other files without a bookmark."""
    for name, value in (("SECONDS_BETWEEN_MESSAGES", -1), ("_BYTES_AT_ONCE", 1000)):
        monkeypatch.setattr(skipping, name, value)
    source = StreamedSource(SourceConfig(path=write(tmp_path, kind), streaming=True))
    reader = StreamedReader(source)
    for index in range(53):
        reader.reaches(Ref(0, source.number(1, index), 0))
    resumed = StreamedReader(source)
    if unit == "bytes":
        resumed.remember(reader.bookmarks([Ref(0, source.number(1, 52), 0)]))
    with caplog.at_level(logging.WARNING):
        assert resumed.reaches(Ref(0, source.number(1, 52), 0))
    path = tmp_path / f"1{KINDS[kind][0]}"
    if unit == "rows":
        assert f"{path}[52]: skipped 49 of 51 rows before the saved position" in caplog.text
    else:
        assert f"{path}: skipped 1,000 of " in caplog.text
        assert "bytes before the saved position" in caplog.text


def test_a_resumed_loader_begins_at_the_bookmark(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It skips no rows, as it does from a state without bookmarks."""
    monkeypatch.setattr(skipping, "SECONDS_BETWEEN_MESSAGES", -1)
    config = configured(tokenizer, write(tmp_path, "JSON lines"), streams=1, global_batch=1, epochs=1)
    state = tiny.plain(_begun(config).state_dict())
    next(PackLoader(config, state=state))
    assert "before the saved position" not in caplog.text
    del state["streams"]["0"]["bookmarks"]
    next(PackLoader(config, state=tiny.resealed(state)))
    assert "before the saved position" in caplog.text
