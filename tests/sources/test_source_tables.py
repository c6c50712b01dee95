"""Rows of tables: Parquet, Arrow in both of its formats, CSV and TSV."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import tiny

from sftstream import SourceConfig
from sftstream.formats import parse_row
from sftstream.records import BrokenRow, Unreadable
from sftstream.sources.corpus import FileSet
from sftstream.sources.file_formats import arrow as arrow_module

Write = Callable[[Path, pa.Table], None]


def opened(path: Path) -> FileSet:
    return FileSet(SourceConfig(path=str(path)))


def written(path: Path, content: bytes) -> FileSet:
    path.write_bytes(content)
    return opened(path)


def read_all(source: FileSet) -> list[Any]:
    return [source.read(row) for row in range(len(source))]


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        opened(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def broken(source: FileSet, row: int) -> str:
    with pytest.raises(BrokenRow) as error:
        source.read(row)
    return f"{source.locate_row(row)} {error.value}"


def ipc_file(path: Path, table: pa.Table, **options: Any) -> None:
    with pa.ipc.new_file(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=7)


def ipc_stream(path: Path, table: pa.Table, **options: Any) -> None:
    with pa.ipc.new_stream(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=7)


def parquet(path: Path, table: pa.Table, **options: Any) -> None:
    pa.parquet.write_table(table, path, row_group_size=7, **options)


WRITERS: dict[str, tuple[str, Write]] = {
    "Parquet": ("a.parquet", parquet),
    "Arrow file": ("a.arrow", ipc_file),
    "Arrow stream": ("a.arrow", ipc_stream),
    "compressed Arrow file": ("a.arrow", lambda path, table: ipc_file(path, table, compression="lz4")),
    "compressed Arrow stream": ("a.arrow", lambda path, table: ipc_stream(path, table, compression="zstd")),
}

CALLS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {
        "messages": [
            {"role": "user", "content": "the weather?"},
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
            },
            {"role": "tool", "content": "rain", "tool_call_id": "1"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "int"}}}}],
    },
]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_table_gives_the_rows_that_were_written(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    rows = tiny.rows(30)
    write(tmp_path / name, pa.Table.from_pylist(rows))
    source = opened(tmp_path / name)
    assert read_all(source) == rows
    assert source.locate_row(29) == f"{tmp_path / name}[29]"
    assert read_all(pickle.loads(pickle.dumps(source))) == rows
    assert [file.identity.name for file in source.files] == [name]


@pytest.mark.parametrize("kind", WRITERS)
def test_fields_that_a_row_lacks_are_stored_as_null_and_lacking_again_when_read(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    table = pa.table({column: [row.get(column) for row in CALLS] for column in ("messages", "tools")})
    assert table.to_pylist()[0]["messages"][0]["tool_calls"] is None
    assert table.to_pylist()[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]["a"] is None
    write(tmp_path / name, table)
    source = opened(tmp_path / name)
    assert read_all(source) == CALLS
    assert [parse_row(source.read(row)) for row in range(2)] == [parse_row(row) for row in CALLS]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_table_of_one_row_is_read_and_one_of_none_refused(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    table = pa.table({"a": ["x"]})
    write(tmp_path / name, table)
    assert read_all(opened(tmp_path / name)) == [{"a": "x"}]
    write(tmp_path / name, table.slice(0, 0))
    assert refusal(tmp_path / name) == (
        f"source '{tmp_path / name}' holds no row; remove the source or name a file with conversations"
    )


@pytest.mark.parametrize("kind", WRITERS)
def test_a_table_that_was_cut_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    write(tmp_path / name, pa.Table.from_pylist(tiny.rows(30)))
    content = (tmp_path / name).read_bytes()
    draw = random.Random(0)
    for length in [0, 1, 7, 8, len(content) - 1, len(content) - 8, *draw.sample(range(len(content)), 20)]:
        (tmp_path / name).write_bytes(content[:length])
        said = refusal(tmp_path / name)
        assert said.startswith(f"{tmp_path / name} ")
        assert any(words in said for words in ("is not a readable", "is empty", "lacks the end mark")), said


def test_a_stream_that_was_cut_between_two_batches_is_no_shorter_table(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    ipc_stream(path, pa.table({"a": ["x"] * 14}))
    content = path.read_bytes()
    batch = content.rindex(b"\xff\xff\xff\xff", 0, len(content) - 8)
    path.write_bytes(content[:batch])
    assert (
        refusal(path)
        == f"{path} lacks the end mark of an Arrow stream: the file was truncated, or is still being written; "
        "write the file again, or wait for its end"
    )


@pytest.mark.parametrize("kind", WRITERS)
def test_damage_is_refused_or_told_apart_by_row_and_never_a_crash(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    path = tmp_path / name
    write(path, pa.Table.from_pylist(tiny.rows(30)))
    content = path.read_bytes()
    draw = random.Random(1)
    for _ in range(60):
        damaged = bytearray(content)
        location = draw.randrange(len(content) - 8)
        damaged[location : location + 8] = draw.randbytes(8)
        path.write_bytes(damaged)
        try:
            source = opened(path)
        except ValueError:
            continue
        for row in range(len(source)):
            with contextlib.suppress(BrokenRow):
                source.read(row)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_text_that_is_none_breaks_its_row_alone(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    texts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    write(tmp_path / name, pa.table({"a": texts, "b": pa.ListArray.from_arrays([0, 1, 2, 3], texts)}))
    source = opened(tmp_path / name)
    unread = Unreadable("'utf-8' codec can't decode byte 0xff in position 0: invalid start byte")
    assert source.read(1) == {"a": unread, "b": unread}
    assert [source.read(0), source.read(2)] == [{"a": "a", "b": ["a"]}, {"a": "c", "b": ["c"]}]


def test_a_damaged_batch_of_an_arrow_file_is_refused_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    ipc_file(path, pa.table({"a": ["a"] * 7 + ["bc"] * 7 + ["d"] * 7}))
    content = bytearray(path.read_bytes())
    offsets = content.index(b"".join(number.to_bytes(4, "little") for number in (0, 2, 4, 6)))
    content[offsets + 4] = 200
    path.write_bytes(content)
    source = opened(path)
    for row in (7, 10, 13):
        said = broken(source, row)
        assert said.startswith(f"{path}[{row}] is in a damaged record batch: ")
        assert said.endswith("out of bounds: 200 > 21")
    assert [source.read(row) for row in (0, 6, 14)] == [{"a": "a"}, {"a": "a"}, {"a": "d"}]


@pytest.mark.parametrize("kind", ["Arrow file", "Arrow stream"])
def test_an_arrow_file_that_shrinks_while_it_is_read_is_an_error_and_no_crash(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    write(tmp_path / name, pa.Table.from_pylist(tiny.rows(30)))
    source = opened(tmp_path / name)
    os.truncate(tmp_path / name, 100)
    with pytest.raises(RuntimeError) as error:
        source.read(29)
    assert str(error.value) == (
        f"{tmp_path / name}[29] is no longer there: the file shrank while it was read; restore the file"
    )


@pytest.mark.parametrize("kind", ["Parquet", "compressed Arrow file"])
def test_a_table_that_was_copied_is_not_missed_when_it_shrinks(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    write(tmp_path / name, pa.Table.from_pylist(tiny.rows(30)))
    source = opened(tmp_path / name)
    os.truncate(tmp_path / name, 100)
    assert read_all(source) == tiny.rows(30)


def test_arrow_files_are_mapped_and_only_compressed_ones_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTSTREAM_CACHE", str(tmp_path / "cache"))
    ipc_file(tmp_path / "a.arrow", pa.table({"a": ["x"]}))
    opened(tmp_path / "a.arrow")
    assert not (tmp_path / "cache").exists()
    ipc_file(tmp_path / "b.arrow", pa.table({"a": ["x" * 1000]}), compression="lz4")
    assert read_all(opened(tmp_path / "b.arrow")) == [{"a": "x" * 1000}]
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1


def test_columns_of_every_type_become_plain_values(tmp_path: Path) -> None:
    kinds = {
        "dictionary": pa.array(["x", "y", "x"]).dictionary_encode(),
        "map": pa.array([[("k", 1), ("l", None)], [], None], pa.map_(pa.string(), pa.int64())),
        "large": pa.array([["a", None], [], None], pa.large_list(pa.large_string())),
        "fixed": pa.array([[1.5, 2], [None, 0], [3, 4]], pa.list_(pa.float64(), 2)),
        "flag": pa.array([True, None, False]),
        "null": pa.nulls(3),
        "deep": pa.array([[{"s": {"t": None}}, None], [{"s": {"t": 1}}], [{"s": None}]]),
    }
    expected = [
        {
            "dictionary": "x",
            "map": {"k": 1, "l": None},
            "large": ["a", None],
            "fixed": [1.5, 2.0],
            "flag": True,
            "deep": [{"s": {}}, None],
        },
        {"dictionary": "y", "map": {}, "large": [], "fixed": [None, 0.0], "deep": [{"s": {"t": 1}}]},
        {"dictionary": "x", "fixed": [3.0, 4.0], "flag": False, "deep": [{}]},
    ]
    for kind, (name, write) in WRITERS.items():
        write(tmp_path / name, pa.table(kinds))
        assert read_all(opened(tmp_path / name)) == expected, kind


@pytest.mark.parametrize("kind", ["Parquet", "Arrow file"])
def test_a_table_with_two_fields_of_one_name_is_refused(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    write(tmp_path / name, pa.table([["x"], ["y"]], names=["a", "a"]))
    said = "is not a readable Parquet file" if kind == "Parquet" else "is not a readable Arrow file"
    assert refusal(tmp_path / name) == f"{tmp_path / name} {said}: two of its fields have the name 'a'"


@pytest.mark.parametrize("kind", WRITERS)
def test_json_in_columns_is_decoded_and_text_that_looks_like_it_is_not(tmp_path: Path, kind: str) -> None:
    def texts(*values: str | None) -> pa.ExtensionArray:
        return pa.ExtensionArray.from_storage(pa.json_(), pa.array(values, pa.string()))

    name, write = WRITERS[kind]
    tools = pa.ListArray.from_arrays(pa.array([0, 2, 2, 3]), texts('{"a": {"b": null}}', '{"c": 1}', "{"))
    any_value = texts('"hello"', None, '{"x": [1]}')
    write(tmp_path / name, pa.table({"tools": tools, "any": any_value, "text": ['{"a": 1}', "p", "q"]}))
    source = opened(tmp_path / name)
    assert source.read(0) == {"tools": [{"a": {"b": None}}, {"c": 1}], "any": "hello", "text": '{"a": 1}'}
    assert source.read(1) == {"tools": [], "text": "p"}
    assert source.read(2) == {"tools": Unreadable("Input data was truncated"), "any": {"x": [1]}, "text": "q"}


def test_many_arrow_files_are_opened_again_as_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        ipc_file(tmp_path / f"{number}.arrow", pa.table({"a": [number]}))
    source = opened(tmp_path)
    arrow_module._opened.cache_clear()
    assert read_all(source) == [{"a": 0}, {"a": 1}, {"a": 2}]
    arrow_module._opened.cache_clear()
    ipc_file(tmp_path / "1.arrow", pa.table({"a": [7]}))
    with pytest.raises(RuntimeError) as error:
        source.read(1)
    assert str(error.value) == f"{tmp_path}/1.arrow changed while it was read; restore the file, or start again"


@pytest.mark.parametrize(
    "content",
    [
        b"q,a\n1,x\n2,y\n",
        b"q,a\n1,x\n2,y",
        b"q,a\r\n1,x\r\n2,y\r\n",
        b"\n\nq,a\n\n1,x\n\n\n2,y\n\n",
        b"\xef\xbb\xbfq,a\n1,x\n2,y\n",
        b'\xef\xbb\xbf"q","a"\n"1","x"\n"2","y"\n',
    ],
    ids=["plain", "no last line break", "CRLF", "blank lines", "BOM", "quoted"],
)
def test_csv_in_every_spelling_gives_the_same_rows(tmp_path: Path, content: bytes) -> None:
    assert read_all(written(tmp_path / "a.csv", content)) == [{"q": "1", "a": "x"}, {"q": "2", "a": "y"}]
    assert read_all(written(tmp_path / "a.tsv", content.replace(b",", b"\t"))) == [
        {"q": "1", "a": "x"},
        {"q": "2", "a": "y"},
    ]


def test_cells_are_text_and_empty_ones_lacking(tmp_path: Path) -> None:
    source = written(tmp_path / "a.csv", b'q,a,b\n007,,true\n"",NULL," "\n')
    assert read_all(source) == [{"q": "007", "b": "true"}, {"a": "NULL", "b": " "}]
    assert read_all(pickle.loads(pickle.dumps(source))) == read_all(source)


def test_a_quoted_cell_holds_line_breaks_commas_and_quotes(tmp_path: Path) -> None:
    source = written(tmp_path / "a.csv", 'q,a\n"two\nlines, ""quoted""\r\n\n",ä\n5" pipe,b\n'.encode())
    assert read_all(source) == [{"q": 'two\nlines, "quoted"\r\n\n', "a": "ä"}, {"q": '5" pipe', "a": "b"}]
    assert [source.locate_row(row) for row in range(2)] == [f"{tmp_path}/a.csv:2", f"{tmp_path}/a.csv:6"]


def test_a_cell_may_be_longer_than_pythons_reader_allows(tmp_path: Path) -> None:
    assert read_all(written(tmp_path / "a.csv", b"q\n" + b"x" * 200_000 + b"\n")) == [{"q": "x" * 200_000}]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (b"1", "has 1 cells for the 2 columns of the header"),
        (b"1,2,3", "has 3 cells for the 2 columns of the header"),
        (b'"1"x,2', "is not CSV: ',' expected after '\"'"),
        (b"\xff,2", "is not CSV: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b"1\r2,3", "is not CSV: new-line character seen in unquoted field"),
    ],
    ids=["short", "long", "quote", "no UTF-8", "lone CR"],
)
def test_a_ragged_or_broken_record_is_refused_by_its_place_and_its_neighbours_are_read(
    tmp_path: Path, record: bytes, said: str
) -> None:
    source = written(tmp_path / "a.csv", b'q,a\n"1\n",2\n' + record + b"\n3,4\n")
    assert broken(source, 1).startswith(f"{tmp_path}/a.csv:4 {said}")
    assert [source.read(0), source.read(2)] == [{"q": "1\n", "a": "2"}, {"q": "3", "a": "4"}]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"q,a\n", b"q,a", b"\xef\xbb\xbf", b"\xef\xbb\xbfq\n\n"])
def test_a_csv_file_without_a_record_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    assert refusal(tmp_path / "a.csv") == (
        f"source '{tmp_path}/a.csv' holds no row; remove the source or name a file with conversations"
    )


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"q,q", "has the header ['q', 'q']; give each column a name of its own"),
        (b"q,", "has the header ['q', '']; give each column a name of its own"),
        (b"\xff", "has no readable header: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ],
)
def test_a_header_that_names_no_columns_is_refused(tmp_path: Path, header: bytes, said: str) -> None:
    (tmp_path / "a.csv").write_bytes(header + b"\n1,2\n")
    assert refusal(tmp_path / "a.csv").startswith(f"{tmp_path}/a.csv {said}")


def test_a_csv_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    source = written(tmp_path / "a.csv", b"q,a\n1,2\n3,4\n")
    os.truncate(tmp_path / "a.csv", 9)
    with pytest.raises(RuntimeError) as error:
        source.read(1)
    assert (
        str(error.value)
        == f"{tmp_path}/a.csv:3 is no longer there: the file shrank while it was read; restore the file"
    )


@pytest.mark.parametrize("seed", range(20))
def test_what_python_writes_as_csv_is_read_as_it_was(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    letters = ["a", "ä", "\U0001f600", '"', ",", "\n", "\r\n", "\t", " ", "'", "\\", "\u2028"]
    rows = [{name: "".join(draw.choices(letters, k=draw.randint(1, 6))) for name in ("q", "a")} for _ in range(50)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["q", "a"], lineterminator=draw.choice(["\n", "\r\n"]))
    writer.writeheader()
    writer.writerows(rows)
    assert read_all(written(tmp_path / "a.csv", text.getvalue().encode())) == rows
