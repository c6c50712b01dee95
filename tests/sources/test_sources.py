"""Rows of files of every kind: what a row is, where it stands, which files are refused, what a file's identity is."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import datasets
import msgspec
import pytest
import tiny

from sftstream import PackLoader, SourceConfig, read_conversations
from sftstream.formats import decode_row, parse_row
from sftstream.records import BrokenRow, Ref
from sftstream.sources import Corpus, FileIdentity
from sftstream.sources import rows as rows_module
from sftstream.sources.corpus import CorpusReader, FileSet
from sftstream.sources.rows import identify

A, B = {"messages": [{"role": "user", "content": "ä\u2028b"}]}, {"n": 1}


def written(path: Path, content: bytes) -> FileSet:
    path.write_bytes(content)
    return opened(path)


def opened(path: Path | str, **fields: Any) -> FileSet:
    return FileSet(SourceConfig(path=str(path), **fields))


def refusal(path: Path | str, **fields: Any) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        opened(path, **fields)
    return str(error.value)


def read_all(source: FileSet) -> list[Any]:
    return [decode_row(source.read(row)) for row in range(len(source))]


def lines(*values: Any, end: str = "\n") -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + end for value in values).encode()


@pytest.mark.parametrize(
    "content",
    [
        lines(A, B),
        lines(A, B).rstrip(b"\n"),
        lines(A, B, end="\r\n"),
        b"\n \n" + lines(A) + b"\r\n\t\n\n" + lines(B) + b"\n\n",
        b"\xef\xbb\xbf" + lines(A, B),
        b"\xef\xbb\xbf\n" + lines(A, B),
    ],
    ids=["plain", "no last line break", "CRLF", "blank lines", "BOM", "BOM and blank line"],
)
def test_json_lines_in_every_spelling_give_the_same_rows(tmp_path: Path, content: bytes) -> None:
    assert read_all(written(tmp_path / "a.jsonl", content)) == [A, B]


def test_a_file_of_one_row_without_a_line_break_is_read(tmp_path: Path) -> None:
    assert read_all(written(tmp_path / "a.ndjson", b'{"a": 1}')) == [{"a": 1}]


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\n", b"\xef\xbb\xbf"])
def test_a_file_without_a_row_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"source '.*a.jsonl' holds no row; remove the source or name a file"):
        written(tmp_path / "a.jsonl", content)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_rows_behind_chunk_borders_are_found(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftstream.sources.file_formats.jsonl._CHUNK", 7)
    assert read_all(written(tmp_path / name, lines(*range(1000, 1050)))) == list(range(1000, 1050))


@pytest.mark.parametrize(
    "broken",
    [
        b'{"a": ',
        b'{"a": "\xff"}',
        b'{"a": "\x00"}',
        b"[" * 100_000,
        b"x",
        b"{'a': 1}",
    ],
    ids=["cut off", "no UTF-8", "NUL", "deep", "no JSON", "Python"],
)
def test_a_broken_line_is_refused_by_its_place_and_its_neighbours_are_read(tmp_path: Path, broken: bytes) -> None:
    source = written(tmp_path / "a.jsonl", lines(A) + b"\n" + broken + b"\n" + lines(B))
    assert [decode_row(source.read(row)) for row in (0, 2)] == [A, B]
    with pytest.raises(BrokenRow, match=r"^is not JSON: .") as error:
        decode_row(source.read(1))
    assert "\n" not in str(error.value)
    source.require_intact(1)
    assert [source.locate_row(row).rpartition(":")[2] for row in range(3)] == ["1", "3", "4"]


@pytest.mark.parametrize("layout", [{}, {"indent": 2}], ids=["one line", "pretty"])
def test_a_json_array_is_read_by_element(tmp_path: Path, layout: dict[str, Any]) -> None:
    source = written(tmp_path / "a.json", b"\xef\xbb\xbf \n" + json.dumps([A, B], **layout).encode())
    assert read_all(source) == [A, B]
    assert source.locate_row(1) == f"{tmp_path}/a.json[1]"


def test_a_json_file_may_hold_json_lines(tmp_path: Path) -> None:
    assert read_all(written(tmp_path / "a.json", lines(A, B))) == [A, B]


def test_a_broken_element_of_an_array_is_refused_by_its_place(tmp_path: Path) -> None:
    source = written(tmp_path / "a.json", b'[{"a": 1}, {"a": "\xff"}, 2]')
    assert [decode_row(source.read(row)) for row in (0, 2)] == [{"a": 1}, 2]
    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)) as error:  # by the version of msgspec
        msgspec.json.decode(b'{"a": "\xff"}')
    with pytest.raises(BrokenRow, match=f"^is not JSON: {re.escape(str(error.value))}$"):
        decode_row(source.read(1))
    assert source.locate_row(1) == f"{tmp_path}/a.json[1]"
    source.require_intact(1)


@pytest.mark.parametrize(
    "content",
    [b"[1, 2", b"[1 2]", b"[[" + b"[" * 100_000 + b"]" * 100_000 + b"]]"],
    ids=["cut off", "no comma", "deep"],
)
def test_an_array_that_cannot_be_divided_is_refused_as_a_file(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"a.json is not a JSON array of conversations: ."):
        written(tmp_path / "a.json", content)


def test_parquet_gives_rows_whoever_wrote_it(tmp_path: Path) -> None:
    rows = tiny.rows(5)
    tiny.write_parquet(tmp_path / "a.parquet", rows)
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "b.parquet"))
    for name in ("a.parquet", "b.parquet"):
        source = opened(tmp_path / name)
        assert read_all(source) == rows
        assert source.locate_row(3) == f"{tmp_path}/{name}[3]"


def test_a_parquet_file_rewritten_within_the_same_instant_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for content in ("old", "new"):
        tiny.write_parquet(path, [{"a": content}])
        os.utime(path, (1, 1))
        assert read_all(opened(path)) == [{"a": content}]


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.parquet is not a readable Parquet file: .") as error:
        written(tmp_path / "a.parquet", b"PAR1 but not really PAR1")
    assert "\n" not in str(error.value)


def test_a_glob_reads_its_files_in_sorted_order_as_one_source(tmp_path: Path) -> None:
    for name, content in (("b.jsonl", lines(2, 3)), ("a.json", b"[0, 1]"), ("c.jsonl", b""), ("d.jsonl", lines(4))):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "e.jsonl").mkdir()
    source = opened(f"{tmp_path}/*.json*")
    assert read_all(source) == [0, 1, 2, 3, 4]
    assert [source.locate_row(row) for row in (1, 2, 4)] == [
        f"{tmp_path}/a.json[1]",
        f"{tmp_path}/b.jsonl:1",
        f"{tmp_path}/d.jsonl:1",
    ]


def test_a_path_with_glob_characters_that_exists_is_that_file(tmp_path: Path) -> None:
    assert read_all(written(tmp_path / "a[1].jsonl", lines(1))) == [1]


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(lines(1))
    assert read_all(opened("~/a.jsonl")) == [1]


def test_a_path_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"source '.*/none.jsonl' matches no file \(looked from /.*\); correct the path"
    ):
        opened(tmp_path / "none.jsonl")


def test_a_directory_is_its_own_files_of_known_kinds_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(b"[2, 3]")
    tiny.write_parquet(tmp_path / "b.parquet", [{"n": 1}])
    (tmp_path / "a.jsonl").write_bytes(lines(0))
    (tmp_path / "d.csv").write_bytes(b"n\n4\n")
    for ignored in ("README.md", ".hidden.jsonl", "e.txt"):
        (tmp_path / ignored).write_bytes(lines("ignored"))
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "a.jsonl").write_bytes(lines("ignored"))
    assert read_all(opened(f"{tmp_path}/")) == [0, {"n": 1}, 2, 3, {"n": "4"}]


def test_a_directory_without_files_of_known_kinds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(lines(1))
    assert refusal(tmp_path) == (
        f"source '{tmp_path}' is a directory without a file of a known suffix "
        "(.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, and these with .gz, .zst, .bz2 or .xz); "
        "name files in subdirectories by a glob, or set split if the directory has the layout of a hub dataset"
    )


def test_a_missing_shard_of_a_directory_is_refused_by_name(tmp_path: Path) -> None:
    for number in (0, 2, 3):
        (tmp_path / f"train-{number:05}-of-00005.jsonl").write_bytes(lines(number))
    (tmp_path / "test-00000-of-00001.jsonl").write_bytes(lines(9))
    assert refusal(tmp_path) == (
        f"{tmp_path} lacks 2 of 5 files, first train-00001-of-00005.jsonl; "
        "restore the files, or name the present files by a glob"
    )
    assert read_all(opened(f"{tmp_path}/train-*")) == [0, 2, 3]


@pytest.mark.parametrize("field", ["split", "subset", "revision"])
def test_a_split_subset_or_revision_of_a_file_is_refused(tmp_path: Path, field: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(1))
    assert refusal(path, **{field: "x"}) == (
        f"source '{path}' is a file or a glob, for which {field} = 'x' has no meaning; leave {field} out"
    )


def test_a_broken_row_is_located_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"q": "a"}) + b"\n{\n" + lines({"s": 1, "messages": 2}))
    source = SourceConfig(path=str(path), columns={"instruction": "q", "output": "r"})
    reading = CorpusReader(Corpus((source,)))
    assert reading.settings == [source]
    with pytest.raises(BrokenRow) as error:
        parse_row(reading.read(Ref(0, 2, 0)), reading.settings[0])
    assert f"{reading.locate_broken(Ref(0, 2, 0))} {error.value}" == (
        f"{path}:4 has none of the columns ['q', 'r']; it has ['messages', 's']"
    )
    path.write_bytes(lines({"prompt": "a", "completion": "b"}) + b"\n{\n")
    rows = read_conversations(str(path))
    assert next(rows).messages[1].content == "b"
    with pytest.raises(ValueError, match=rf"^{path}:3 is not JSON: Input data was truncated$"):
        next(rows)


@pytest.mark.parametrize(("name", "kind"), [("a.txt", ".txt"), ("a.jsonl.lz4", ".lz4"), ("a.tar", ".tar"), ("a", "")])
def test_an_unknown_kind_of_file_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(b"a,b\n1,2\n")
    assert refusal(tmp_path / name) == (
        f"{tmp_path / name} has the unknown suffix '{kind}', and its content shows neither JSON nor a table; name "
        f"the file by its kind: .jsonl, "
        ".ndjson, .json, .csv, .tsv, .parquet, .arrow, and these with .gz, .zst, .bz2 or .xz"
    )


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_refusal(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", lines(A, B))
    os.truncate(tmp_path / "a.jsonl", 10)
    for row in range(2):
        with pytest.raises(
            RuntimeError, match=rf"a.jsonl:{row + 1} is no longer there: the file shrank .* restore the file"
        ):
            source.read(row)


def test_a_corpus_counts_reads_and_places_by_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(0, 1))
    (tmp_path / "b.json").write_bytes(b"[2]")
    corpus = Corpus((SourceConfig(path=str(tmp_path / "a.jsonl")), SourceConfig(path=str(tmp_path / "b.json"))))
    assert corpus.sizes == (2, 1)
    assert corpus.locate_row(1, 0) == f"{tmp_path}/b.json[0]"
    for one in (corpus, pickle.loads(pickle.dumps(corpus))):
        reading = CorpusReader(one)
        assert [decode_row(reading.read(Ref(*at, 0))) for at in ((0, 0), (0, 1), (1, 0))] == [0, 1, 2]


def test_a_files_identity_is_its_name_size_and_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"abc")
    before = identify(path)
    assert (before.name, before.size) == ("a.jsonl", 3)
    assert before.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    os.utime(path, (1, 1))
    assert identify(path) == before
    path.write_bytes(b"abd")
    assert identify(path) != before


def test_a_huge_files_identity_is_taken_from_its_ends_and_even_places_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "SAMPLED_ABOVE", 1000)
    monkeypatch.setattr(rows_module, "_BLOCK", 8)
    path = tmp_path / "a.jsonl"
    content = bytearray(b"a" * 10_000)

    def digest() -> str:
        path.write_bytes(content)
        return identify(path).sha256

    seen = {digest()}
    for location in (0, 7, 9_992 * 64 // 127, 9_999):
        content[location] = ord("b")
        seen.add(digest())
    assert len(seen) == 5
    content[20] = ord("b")  # where no sample is taken
    assert digest() in seen
    assert identify(path).sampled


def test_a_huge_files_identity_is_every_byte_of_it_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "SAMPLED_ABOVE", 1000)
    monkeypatch.setattr(rows_module, "_BLOCK", 8)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n" * 5000)
    sampled, full = (opened(path, digest=digest).files[0].identity for digest in ("sampled", "full"))
    assert full == FileIdentity(name="a.jsonl", size=10_000, sha256=hashlib.sha256(b"1\n" * 5000).hexdigest())
    path.write_bytes(b"1\n" * 10 + b"2\n" + b"1\n" * 4989)
    assert opened(path, digest="sampled").files[0].identity == sampled
    assert opened(path, digest="full").files[0].identity != full
    (tmp_path / "d").mkdir()
    path.rename(tmp_path / "d" / "a.jsonl")
    for of_many in (tmp_path / "d", tmp_path / "d" / "*.jsonl"):
        assert not opened(of_many, digest="full").files[0].identity.sampled


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \n"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("a.json", b"[]"),
        ("a.csv", b"prompt,completion\n"),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"epochs": None}, {"shuffle": False}], ids=str)
def test_a_streamed_source_without_any_row_is_an_error_when_it_is_opened(
    tmp_path: Path, tokenizer: str, name: str, content: bytes, changes: dict[str, Any]
) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"b{name}").write_bytes(content)
    source = {"path": str(tmp_path), "streaming": True}
    with pytest.raises(ValueError, match=r".") as error:
        PackLoader(tiny.data_config(tokenizer, sources=[source], **{"shuffle": "shards"} | changes))
    assert str(error.value) == (
        f"source '{tmp_path}' holds no row; remove the source or name a file with conversations"
    )
