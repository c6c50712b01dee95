"""Sources that are streamed: every row once an epoch, exact from every state, and no more read again than is said."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import tiny

from sftstream import DataConfig, PackLoader, Shard, SourceConfig, describe, merge
from sftstream.formats import decode_row
from sftstream.records import BrokenRow, RawRow, Ref
from sftstream.sources import Corpus, CorpusReader, FileSet, StreamedReader, StreamedSource
from sftstream.sources.rows import Place, ReadRow, RowsFrom
from sftstream.streaming.sampler import RowSampler, open_cursors

ROWS = tiny.rows(30)
SIZES = (8, 1, 11, 4, 6)
"""Rows of the five shards."""


def shards() -> list[list[Any]]:
    rest = iter(ROWS)
    return [[next(rest) for _ in range(size)] for size in SIZES]


def write_jsonl(directory: Path) -> str:
    for number, rows in enumerate(shards()):
        (directory / f"{number}.jsonl").write_bytes(tiny.json_lines(rows))
    return str(directory)


def write_gzip(directory: Path) -> str:
    for number, rows in enumerate(shards()):
        (directory / f"{number}.jsonl.gz").write_bytes(gzip.compress(tiny.json_lines(rows)))
    return str(directory / "*.gz")


def write_parquet(directory: Path) -> str:
    for number, rows in enumerate(shards()):
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), directory / f"{number}.parquet", row_group_size=3)
    return str(directory)


def write_arrow(directory: Path) -> str:
    for number, rows in enumerate(shards()):
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(str(directory / f"{number}.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    return str(directory)


def write_memory(_directory: Path) -> str:
    for number, rows in enumerate(shards()):
        fsspec.filesystem("memory").pipe(f"/streamed/{number}.jsonl", tiny.json_lines(rows))
    return "memory://streamed/*.jsonl"


def write_repository(directory: Path) -> str:
    for number, rows in enumerate(shards()):
        (directory / f"train-{number}.jsonl").write_bytes(tiny.json_lines(rows))
    (directory / "README.md").write_text("---\nconfigs:\n- config_name: chat\n  data_files: train-*.jsonl\n---\n")
    return str(directory)


def write_saved(directory: Path) -> str:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(directory / "saved"), num_shards=5)
    return str(directory / "saved")


KINDS: dict[str, Callable[[Path], str]] = {
    "JSON lines": write_jsonl,
    "gzip": write_gzip,
    "Parquet": write_parquet,
    "Arrow": write_arrow,
    "memory": write_memory,
    "repository": write_repository,
    "saved": write_saved,
}


@pytest.fixture(autouse=True)
def _empty_memory() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "rows").mkdir()
    return write_jsonl(tmp_path / "rows")


def configured(tokenizer: str, path: str, source: dict[str, Any] | None = None, **changes: Any) -> DataConfig:
    one = {"path": path, "streaming": True} | (source or {})
    return tiny.data_config(tokenizer, sources=[one], **{"shuffle": "shards", "streams": 2} | changes)


def drawn(config: DataConfig) -> list[tuple[int, int]]:
    """`(row, epoch)` of what a run gives."""
    return [(segment.row, segment.epoch) for pack in PackLoader(config) for segment in pack.segments]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streams", [1, 3, 5, 13])
def test_every_row_comes_once_an_epoch_with_more_streams_than_shards_and_with_fewer(
    tmp_path: Path, tokenizer: str, kind: str, streams: int
) -> None:
    config = configured(tokenizer, KINDS[kind](tmp_path), streams=streams)
    given = drawn(config)
    assert len(given) == len(set(given)) == 60
    assert {epoch: len({row for row, e in given if e == epoch}) for epoch in (0, 1)} == {0: 30, 1: 30}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_conversations_as_read_by_row(tmp_path: Path, tokenizer: str, kind: str) -> None:
    by_row = tiny.data_config(tokenizer, tiny.write_jsonl(tmp_path / "all.jsonl", ROWS), streams=1, shuffle=False)
    (tmp_path / "rows").mkdir()
    streamed = configured(tokenizer, KINDS[kind](tmp_path / "rows"), streams=1, shuffle=False)
    assert tiny.digests(PackLoader(streamed)) == tiny.digests(PackLoader(by_row))
    assert tiny.digests(PackLoader(streamed, workers=1)) == tiny.digests(PackLoader(by_row))


def order(config: DataConfig) -> list[tuple[int, int, int]]:
    """`(epoch, shard, row in it)` of what the first stream reads."""
    rows = RowSampler(config, open_cursors(config, CorpusReader(Corpus(config.sources)), 0))
    return [(ref.epoch, ref.row % 5, ref.row // 5) for drawn in rows for ref in drawn.refs]


def test_shards_are_shuffled_each_epoch_and_their_rows_are_not(path: str, tokenizer: str) -> None:
    seen = order(configured(tokenizer, path, streams=1, epochs=3))
    shards = [shard for (_, shard), _ in groupby(seen, key=lambda at: at[:2])]
    assert seen == [(i // 5, shard, row) for i, shard in enumerate(shards) for row in range(SIZES[shard])]
    assert [sorted(shards[epoch * 5 : epoch * 5 + 5]) for epoch in range(3)] == [[0, 1, 2, 3, 4]] * 3
    assert shards[:5] != shards[5:10] != shards[10:]
    assert seen != order(configured(tokenizer, path, streams=1, epochs=3, seed=1))
    stored = [(epoch, shard, row) for epoch in range(3) for shard in range(5) for row in range(SIZES[shard])]
    assert order(configured(tokenizer, path, streams=1, epochs=3, shuffle=False)) == stored


@pytest.mark.parametrize(
    ("source", "streams"),
    [
        *[({}, streams) for streams in (1, 3, 8)],
        ({"columns": {"messages": "messages"}}, 3),
        *[pytest.param({"columns": {"messages": "messages"}}, streams, marks=pytest.mark.slow) for streams in (1, 8)],
    ],
)
def test_a_run_goes_on_exactly_from_every_state(
    path: str, tokenizer: str, source: dict[str, Any], streams: int
) -> None:
    config = configured(tokenizer, path, source, streams=streams, capacity=128, overflow="split")
    whole = tiny.digests(PackLoader(config))
    loader = PackLoader(config)
    for taken in range(len(whole)):
        assert tiny.digests([next(PackLoader(config, state=loader.state_dict()))]) == whole[taken : taken + 1]
        loader = PackLoader(config, state=json.loads(json.dumps(loader.state_dict()))) if taken % 2 else loader
        assert next(loader).digest() == whole[taken]


def test_other_shards_and_workers_go_on_with_the_same_packs(path: str, tokenizer: str) -> None:
    config = configured(tokenizer, path, streams=4)
    whole = tiny.digests(PackLoader(config))
    pair = [PackLoader(config, shard=Shard(r, 2), workers=2) for r in range(2)]
    begun = [loader.next_step() for loader in pair]
    assert [begun[r][i].digest() for i in range(2) for r in range(2)] == whole[:4]
    state = merge([loader.state_dict() for loader in pair])
    for loader in pair:
        loader.close()
    assert tiny.digests(PackLoader(config, state=state)) == whole[4:]


def test_workers_read_from_a_web_server_what_this_process_reads(tmp_path: Path, tokenizer: str, web: str) -> None:
    write_jsonl(tmp_path)
    config = configured(tokenizer, f"{web}/[0-9].jsonl", streams=3)
    whole = tiny.digests(PackLoader(config))
    loader = PackLoader(config, workers=2)
    begun = tiny.digests(tiny.take(loader, 5))
    state = loader.state_dict()
    loader.close()
    assert begun + tiny.digests(PackLoader(config, state=state, workers=1)) == whole
    assert len(drawn(config)) == 60


class Watched(StreamedSource):
    """Counts what is read of each shard."""

    def __init__(self, path: str) -> None:
        super().__init__(SourceConfig(path=path, streaming=True))
        self.read: list[tuple[int, int]] = []

    def open(self, shard: int, at: int, place: Place | None = None) -> RowsFrom:
        read = super().open(shard, at, place)
        return read._replace(rows=self._recorded(shard, read.first, read.rows))

    def _recorded(self, shard: int, first: int, rows: Iterator[ReadRow]) -> Iterator[ReadRow]:
        for number, row in enumerate(rows, first):
            self.read.append((shard, number))
            yield row

    def number_of(self, tape: StreamedReader, shard: int, index: int) -> int:
        """The number that the conversation at this place begins with."""
        content = decode_row(tape.read(Ref(0, self.number(shard, index), 0)))["messages"][0]["content"]
        return int(content.split(":")[0])


def test_after_a_resume_a_shard_is_read_once_and_only_as_far_as_somebody_waits(path: str) -> None:
    source = Watched(path)
    tape = StreamedReader(source)
    waiting = [(0, 5), (2, 3), (0, 1), (2, 9), (0, 1)]
    for shard, index in waiting:
        tape.expect(Ref(0, source.number(shard, index), 0))
    assert [source.number_of(tape, *at) for at in waiting] == [5, 12, 1, 18, 1]
    assert source.read == [*((0, row) for row in range(6)), *((2, row) for row in range(10))]
    assert source.number_of(tape, 2, 10) == 19
    assert source.read[16:] == [(2, 10)]
    assert not tape.reaches(Ref(0, source.number(2, 11), 0))


def test_a_row_that_waits_from_one_epoch_is_found_in_the_next_one_too(path: str) -> None:
    source = Watched(path)
    tape = StreamedReader(source)
    tape.expect(Ref(0, source.number(3, 1), 0))
    assert tape.reaches(Ref(0, source.number(3, 1), 1))
    assert [decode_row(tape.read(Ref(0, source.number(3, 1), epoch))) for epoch in (0, 1)] == [ROWS[21]] * 2
    assert source.read == [(3, 0), (3, 1)]


def test_of_parquet_a_resume_reads_no_row_group_that_nobody_waits_for(tmp_path: Path) -> None:
    """Groups of three rows."""
    source = Watched(write_parquet(tmp_path))
    tape = StreamedReader(source)
    for index in (10, 7):
        tape.expect(Ref(0, source.number(2, index), 0))
    assert [source.number_of(tape, 2, index) for index in (10, 7)] == [19, 16]
    assert source.read == [(2, row) for row in range(6, 11)]
    assert not tape.reaches(Ref(0, source.number(2, 11), 0))
    assert not tape.reaches(Ref(0, source.number(2, 30), 0))


def test_a_streamed_source_is_mixed_by_weight_with_one_that_is_not(path: str, tokenizer: str, corpus_path: str) -> None:
    sources = [{"path": path, "streaming": True, "weight": 1}, {"path": corpus_path, "weight": 2, "shuffle": True}]
    config = tiny.data_config(tokenizer, sources=sources, shuffle="shards", epochs=None)
    loader = PackLoader(config)
    tiny.take(loader, 300)
    accepted = [sum(stream.accepted[i].conversations for stream in loader.state.streams.values()) for i in (0, 1)]
    assert accepted[0] / sum(accepted) == pytest.approx(1 / 3, abs=0.01)
    assert f"source 0 (0.jsonl, 1.jsonl, 2.jsonl, ...): {accepted[0]} rows drawn;" in describe(loader.state_dict())


def test_repeat_counts_in_shards(path: str, tokenizer: str) -> None:
    given = Counter(row for row, _ in drawn(configured(tokenizer, path, {"repeat": 1.6}, streams=1, epochs=1)))
    assert sum(given.values()) > 30
    per_shard = {shard: {given[row] for row in given if row % 5 == shard} for shard in range(5)}
    assert sorted(per_shard.values(), key=max) == [{1}, {1}, {2}, {2}, {2}]


def test_a_repeat_that_takes_no_shard_is_refused(path: str, tokenizer: str) -> None:
    with pytest.raises(ValueError, match=r"repeat = 0.19 of .* none of its 5 files: .*; raise repeat to 0.2 or more"):
        PackLoader(configured(tokenizer, path, {"repeat": 0.19}, epochs=1))
    assert drawn(configured(tokenizer, path, {"repeat": 0.2}, epochs=1))
    with pytest.raises(ValueError, match=r"repeat = 0.01 of .* files: .*; raise repeat to 0.067 or more"):
        PackLoader(configured(tokenizer, path, {"repeat": 0.01}, epochs=3))
    assert drawn(configured(tokenizer, path, {"repeat": 0.067}, epochs=3))


def test_shards_without_a_row_are_passed_over(tmp_path: Path, tokenizer: str) -> None:
    for number in range(6):
        (tmp_path / f"{number}.jsonl").write_bytes(b"" if number % 2 else tiny.json_lines(ROWS[:3]))
    for streams in (2, 8):
        assert len(drawn(configured(tokenizer, str(tmp_path), streams=streams))) == 18


def test_a_stream_without_any_row_is_an_error_where_it_would_look_for_ever(tmp_path: Path, tokenizer: str) -> None:
    tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(
        ValueError, match="stream 1 finds no row in its share of source 0, which has 2 files; remove files without"
    ):
        list(PackLoader(configured(tokenizer, str(tmp_path), shuffle=False, epochs=None)))
    assert len(drawn(configured(tokenizer, str(tmp_path), shuffle=False))) == 60


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n\n{"pro\n{"prompt": "c", "completion": "d"}', "broken row"),
        (
            "a.json",
            b'[{"prompt": "a", "completion": "b"}, {"a": 1}, {"prompt": "c", "completion": "d"}]',
            "unknown layout",
        ),
        ("a.csv", b"prompt,completion\na,b\n\nc\nd,e\n", "broken row"),
        ("a.tsv", b'\xef\xbb\xbfprompt\tcompletion\na\tb\n"c"c\t\nd\te\n', "broken row"),
    ],
)
def test_a_bad_row_in_the_middle_is_refused_by_place(
    tmp_path: Path, tokenizer: str, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    loader = PackLoader(configured(tokenizer, str(tmp_path), epochs=1, streams=1))
    packs = list(loader)
    (refused,) = (refusal for pack in packs for refusal in pack.refused)
    assert (refused.reason, loader.locate_row(refused)) == (reason, f"{tmp_path}/{name}[1]")
    assert [segment.row for pack in packs for segment in pack.segments] == [0, 2]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b'q,a\n1,2\n\xff,3\n"c"x,d\n"\n\xff",e\n4,5\n'),
        ("a.csv", b'\xef\xbb\xbf\n\r\nq,a\r\n\n"two\r\nlines",2\r\n\n3,4'),
        ("a.jsonl", b"[1]\n[2]\n"),
        ("a.jsonl", b'\xef\xbb\xbf\r\n{"q": 1}\r\n \n{"q"\n{"q": "\xff"}\n2'),
        ("a.json", b'\xef\xbb\xbf \n[{"q": 1},\n{"q": "\xff"}, 2]\n'),
    ],
)
def test_rows_are_those_that_are_read_by_number_also_where_some_are_broken(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    by_number = FileSet(SourceConfig(path=str(tmp_path)))
    tape = StreamedReader(StreamedSource(SourceConfig(path=str(tmp_path), streaming=True)))
    rows = [or_broken(partial(by_number.read, row)) for row in range(len(by_number))]
    assert [or_broken(partial(tape.read, Ref(0, row, 0))) for row in range(len(rows))] == rows
    assert not tape.reaches(Ref(0, len(rows), 0))


def or_broken(read: Callable[[], RawRow]) -> Any:
    try:
        return decode_row(read())
    except BrokenRow:
        return BrokenRow


def test_rows_need_not_have_the_same_columns(tmp_path: Path, tokenizer: str) -> None:
    """As `datasets` streams them, the first shard decides what the others may hold."""
    (tmp_path / "0.jsonl").write_bytes(tiny.json_lines([{"prompt": "a", "completion": "b"}]))
    (tmp_path / "1.jsonl").write_bytes(tiny.json_lines([ROWS[0], {"prompt": "c", "completion": "d", "more": [1, "x"]}]))
    tiny.write_parquet(tmp_path / "2.parquet", ROWS[1:3])
    assert len(drawn(configured(tokenizer, str(tmp_path), epochs=1))) == 5


@pytest.mark.parametrize("write", [write_gzip, write_parquet, write_arrow])
def test_a_damaged_shard_stops_the_run_by_name(tmp_path: Path, tokenizer: str, write: Callable[[Path], str]) -> None:
    config = configured(tokenizer, write(tmp_path))
    damaged = sorted(tmp_path.iterdir())[2]
    damaged.write_bytes(damaged.read_bytes()[:-30])
    with pytest.raises(ValueError, match=rf"{damaged} cannot be read( to its end)?: "):
        drawn(config)


def test_a_shard_that_changes_in_the_middle_of_a_run_stops_it_by_name(path: str, tokenizer: str) -> None:
    loader = PackLoader(configured(tokenizer, path, streams=1, shuffle=False, window=2))
    next(loader)
    (Path(path) / "4.jsonl").write_bytes(tiny.json_lines(ROWS[:6]))
    with pytest.raises(ValueError, match=r"4\.jsonl changed while it was read; restore the file, or start again"):
        list(loader)


def test_a_shard_that_is_cut_at_a_rows_border_while_it_is_read_stops_the_run_by_name(
    tmp_path: Path, tokenizer: str
) -> None:
    shard = tmp_path / "0.jsonl"
    shard.write_bytes(tiny.json_lines(tiny.rows(400)))
    loader = PackLoader(configured(tokenizer, str(tmp_path), streams=1, epochs=1))
    next(loader)
    os.truncate(shard, len(tiny.json_lines(tiny.rows(400)[:200])))
    with pytest.raises(ValueError, match=r"0\.jsonl changed while it was read; restore the file, or start again"):
        list(loader)


def test_what_cannot_be_streamed_says_why(path: str, tokenizer: str) -> None:
    def said(path: str, source: dict[str, Any] | None = None, **changes: Any) -> str:
        with pytest.raises(ValueError, match=r".") as error:
            PackLoader(configured(tokenizer, path, source, **changes))
        return str(error.value)

    assert 'set shuffle = "shards" to shuffle its shards, or false' in said(path, shuffle=True)
    assert 'set shuffle = "shards" to shuffle its shards' in said(path, {"shuffle": True})
    assert "matches no file" in said(f"{path}/none-*.jsonl")
    (Path(path) / "notes.txt").write_text("hello")
    assert "notes.txt has the unknown suffix '.txt', and its content shows neither JSON nor a table; " in said(
        f"{path}/*"
    )
    (Path(path) / "a-00000-of-00002.jsonl").write_bytes(tiny.json_lines(ROWS[:1]))
    assert "lacks 1 of 2 files, first a-00001-of-00002.jsonl" in said(path)
    two = [{"path": path, "streaming": True}, {"path": path}]
    with pytest.raises(ValueError, match="is streamed, so its size is unknown; give weights to all sources"):
        tiny.data_config(tokenizer, sources=two, shuffle=False)


def test_a_remote_file_that_nothing_tells_from_another_version_is_not_streamed(tmp_path: Path, tokenizer: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jsonl", tiny.json_lines(ROWS))
    with pytest.raises(
        ValueError,
        match=r"zip://a.jsonl has no size or version on its server, .*; leave out streaming, or copy the file",
    ):
        drawn(configured(tokenizer, f"zip://a.jsonl::{tmp_path}/a.zip"))


def test_of_several_splits_one_must_be_named(tmp_path: Path, tokenizer: str) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes(tiny.json_lines(ROWS[:4] if split == "train" else ROWS[4:5]))
    assert len(drawn(configured(tokenizer, str(tmp_path), {"split": "train"}))) == 8
    with pytest.raises(ValueError, match="no split 'dev'; set split to one of 'train', 'test'"):
        drawn(configured(tokenizer, str(tmp_path), {"split": "dev"}))


def refusal(config: DataConfig, state: Any) -> str:
    with pytest.raises(ValueError, match="would not be exact") as error:
        PackLoader(config, state=state)
    return str(error.value).split("would not be exact: ")[1]


def test_a_shard_that_changed_between_runs_is_refused_by_name(path: str, tokenizer: str) -> None:
    config = configured(tokenizer, path)
    loader = PackLoader(config)
    next(loader)
    state = loader.state_dict()
    (Path(path) / "3.jsonl").write_bytes(tiny.json_lines(ROWS[:3]))
    said = refusal(config, state)
    assert "data.sources[0].files[3].size: " in said
    assert "data.sources[0].files[3].sha256: " in said
    (Path(path) / "3.jsonl").unlink()
    assert "data.sources[0].shards: 5 -> 4" in refusal(config, state)


def test_a_remote_shard_that_changed_between_runs_is_refused_by_name(tmp_path: Path, tokenizer: str) -> None:
    config = configured(tokenizer, write_memory(tmp_path))
    loader = PackLoader(config)
    next(loader)
    fsspec.filesystem("memory").pipe("/streamed/3.jsonl", tiny.json_lines(ROWS[:4]))
    assert "data.sources[0].files[3].sha256: " in refusal(config, loader.state_dict())


def test_the_order_of_a_streamed_source_stays_whatever_is_accepted(path: str, tokenizer: str) -> None:
    config = configured(tokenizer, path, epochs=4)
    loader = PackLoader(config)
    tiny.take(loader, 4)
    state = loader.state_dict()
    for changes in ({"streams": 4}, {"shuffle": False}, {"source": {"shuffle": False}}):
        changed = configured(tokenizer, path, epochs=4, accept_changed=["data"], **changes)
        with pytest.raises(ValueError, match="cannot be accepted"):
            PackLoader(changed, state=state)
    wider = configured(tokenizer, path, epochs=4, accept_changed=["data.capacity"], capacity=300)
    before = Counter((s.row, s.epoch) for pack in tiny.take(PackLoader(config), 4) for s in pack.segments)
    after = Counter((s.row, s.epoch) for pack in PackLoader(wider, state=state) for s in pack.segments)
    assert before + after == Counter(drawn(config))
