"""Files are read by content, and a mistake of the whole file is one error that names the file."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.ipc
import pytest
from pyarrow.parquet import write_table

from sftstream.config import SourceConfig
from sftstream.formats import decode_row
from sftstream.records import Unreadable
from sftstream.sources import FileSet, StreamedSource

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(5)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
PRETTY = json.dumps(ROWS, indent=2).encode()


def by_number(path: Path) -> list[Any]:
    source = FileSet(SourceConfig(path=str(path)))
    return [decode_row(source.read(row)) for row in range(len(source))]


def forward(path: Path) -> list[Any]:
    return [decode_row(row()) for row in StreamedSource(SourceConfig(path=str(path))).open(0, 0).rows]


READERS = [by_number, forward]


def parquet() -> bytes:
    sink = io.BytesIO()
    write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


def arrow(new: Callable[..., Any]) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(ROWS)
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


CONTENTS = {
    "lines": LINES,
    "array": json.dumps(ROWS).encode(),
    "pretty array": PRETTY,
    "BOM and pretty array": b"\xef\xbb\xbf\n" + PRETTY,
    "Parquet": parquet(),
    "Arrow file": arrow(pa.ipc.new_file),
    "Arrow stream": arrow(pa.ipc.new_stream),
}
CODECS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_is_read_by_its_content_under_every_suffix(
    tmp_path: Path, content: str, codec: str, read: Callable[[Path], list[Any]]
) -> None:
    packed = CODECS[codec](CONTENTS[content])
    for suffix in (".jsonl", ".json", ".parquet", ".arrow", f".jsonl{codec}", ".ndjson.gz"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(packed)
        assert read(path) == ROWS, suffix


@pytest.mark.parametrize("codec", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("read", READERS)
def test_a_truncated_archive_is_one_error(tmp_path: Path, codec: str, read: Callable[[Path], list[Any]]) -> None:
    packed = CODECS[codec](LINES * 50)
    for length in (len(packed) - 1, len(packed) // 2, 12):
        path = tmp_path / f"{length}.jsonl{codec}"
        path.write_bytes(packed[:length])
        with pytest.raises(ValueError, match=rf"^{path} cannot be (unpacked|read)"):
            read(path)


def zipped(*names: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name in names:
            archive.writestr(name, LINES)
    return sink.getvalue()


class Pipe(io.BytesIO):
    """A file that cannot be sought, so that the size of a zip's member is written after it."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: Any) -> int:
        raise io.UnsupportedOperation


def piped(*names: str) -> bytes:
    sink = Pipe()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, LINES)
    return sink.getvalue()


def tarred() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"))
    return sink.getvalue()


def zipped_workbook() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("rows.xlsx", zipped("[Content_Types].xml", "xl/workbook.xml"))
    return sink.getvalue()


OFFICE = (
    "is an Excel workbook or another office document (such as .xlsx, .xls, .ods or .docx); save it as CSV or JSON lines"
)
MISTAKES = {
    "UTF-16": (LINES.decode().encode("utf-16"), "is UTF-16 or UTF-32 text; convert the file to UTF-8"),
    "UTF-16 without mark": (LINES.decode().encode("utf-16-le"), "is UTF-16 or UTF-32 text"),
    "UTF-32": (LINES.decode().encode("utf-32-be"), "is UTF-16 or UTF-32 text"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a pointer of Git LFS"),
    "web page": (b"\n<!DOCTYPE html>\n<html></html>\n", "is a web page; download the file itself"),
    "web page in XML": (
        b'<?xml version="1.0"?>\n<!-- saved -->\n<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Strict//EN">\n<html></html>\n',
        "is a web page; download the file itself",
    ),
    "XML": (
        b'\xef\xbb\xbf<?xml version="1.0"?>\n<worksheet><header/></worksheet>\n',
        "is XML, which is not read; write the rows as JSON lines or Parquet, or download the file again",
    ),
    "Excel": (zipped("[Content_Types].xml", "xl/workbook.xml"), OFFICE),
    "Excel by openpyxl": (zipped("docProps/app.xml", "xl/workbook.xml", "[Content_Types].xml"), OFFICE),
    "Excel by XlsxWriter": (zipped("xl/worksheets/sheet1.xml", "xl/workbook.xml"), OFFICE),
    "Excel through a pipe": (piped("data.bin", "[Content_Types].xml"), OFFICE),
    "OpenDocument": (zipped("mimetype", "content.xml"), OFFICE),
    "Word": (zipped("_rels/.rels", "word/document.xml"), OFFICE),
    "old Excel": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504), OFFICE),
    "zip with a workbook inside": (zipped_workbook(), "is an archive of files; unpack the archive"),
    "zip with a folder for words": (zipped("word/a.jsonl"), "is an archive of files; unpack the archive"),
    "NumPy archive": (zipped("arr_0.npy"), "is a NumPy archive, which is not read; write the rows as JSON lines"),
    "torch.save": (zipped("rows/data.pkl"), "is a file of torch.save, which is not read; write the rows as JSON lines"),
    "zip": (zipped("a.jsonl"), "is an archive of files; unpack the archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(40), "is an archive of files; unpack the archive"),
    "SQLite": (
        b"SQLite format 3\0" + bytes(80),
        "is a SQLite database, which is not read; write the rows as JSON lines",
    ),
    "pickle": (pickle.dumps(ROWS), "is a pickle, which is not read; write the rows as JSON lines or Parquet"),
    "zeros": (bytes(5000), "zero bytes, as after a crash; restore the file"),
    "tar": (tarred(), "is an archive of files; unpack the archive"),
    "pretty objects": (
        b"\n".join(json.dumps(row, indent=1).encode() for row in ROWS),
        "holds JSON objects written over",
    ),
    "pretty object": (json.dumps({"train": ROWS}, indent=1).encode(), "holds JSON objects written over several lines"),
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_whole_file_is_one_error(
    tmp_path: Path, mistake: str, suffix: str, read: Callable[[Path], list[Any]]
) -> None:
    content, said = MISTAKES[mistake]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        read(path)
    assert str(path) in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["rows.xlsx", "rows.ods", "Rows.DOCX"])
def test_a_zip_with_the_name_of_an_office_document_is_one(
    tmp_path: Path, name: str, read: Callable[[Path], list[Any]]
) -> None:
    (tmp_path / name).write_bytes(zipped("customXml/item1.xml"))
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{tmp_path}/{name} {OFFICE}')}$"):
        read(tmp_path / name)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("key", ["train", "data", "rows"])
def test_an_object_that_holds_all_rows_is_one_error(
    tmp_path: Path, key: str, read: Callable[[Path], list[Any]]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps({key: ROWS, "version": 1}))
    with pytest.raises(
        ValueError, match=rf"a.json is one JSON object with rows under '{key}'; .* jq -c '.{key}\[\]' < "
    ):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["rows.json", "my chats.json", "it's.json", 'a "b" $HOME.json', "-n.json"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("content", ["pretty", "held"])
def test_the_command_that_is_advised_writes_the_rows_as_lines(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    codec: str,
    name: str,
    read: Callable[[Path], list[Any]],
) -> None:
    monkeypatch.chdir(tmp_path)
    pretty = "\n".join(json.dumps(row, indent=1) for row in ROWS)
    written = (pretty if content == "pretty" else json.dumps({"train": ROWS})).encode()
    for path in (Path(name), Path(f"{name}{codec}")):  # the suffix need not show the codec
        path.write_bytes(CODECS[codec](written))
        with pytest.raises(ValueError, match=r", for example by ") as error:
            read(path)
        command = str(error.value).partition(", for example by ")[2]
        lines = subprocess.run(["sh", "-c", command], check=True, capture_output=True, timeout=60).stdout
        Path("lines.jsonl").write_bytes(lines)
        assert read(Path("lines.jsonl")) == ROWS


@pytest.mark.parametrize("read", READERS)
def test_the_command_for_a_remote_file_names_the_downloaded_file(
    read: Callable[[str], list[Any]],
) -> None:
    pretty = "\n".join(json.dumps(row, indent=1) for row in ROWS)
    fsspec.filesystem("memory").pipe("/content/my rows.jsonl.gz", gzip.compress(pretty.encode()))
    advice = "for example, after a download, by gzip -dc < 'my rows.jsonl.gz' | jq -c ."
    with pytest.raises(ValueError, match=rf"{re.escape(advice)}$"):
        read("memory://content/my rows.jsonl.gz")


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"])
def test_a_file_that_describes_a_dataset_is_not_taken_for_rows_over_several_lines(
    tmp_path: Path, name: str, read: Callable[[Path], list[Any]]
) -> None:
    (tmp_path / name).write_text(json.dumps({"_data_files": [{"filename": "a.jsonl"}]}, indent=2))
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        read(tmp_path / name)
    assert str(error.value) == (
        f"{tmp_path}/{name} describes a dataset and holds no row; name the files with rows alone, for example by a glob"
    )
    assert read(tmp_path / "*.jsonl") == ROWS


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["rows", "rows.txt", "rows.data.gz", "5f2a"])
@pytest.mark.parametrize("content", CONTENTS)
def test_a_named_file_of_any_suffix_is_read_by_its_content(
    tmp_path: Path, content: str, name: str, read: Callable[[Path], list[Any]]
) -> None:
    packed = gzip.compress(CONTENTS[content]) if name.endswith(".gz") else CONTENTS[content]
    (tmp_path / name).write_bytes(packed)
    assert read(tmp_path / name) == ROWS


NO_LINES = {
    "comma-separated values": "prompt,completion\n" + "a,b\n" * 12,
    "Python's notation": "{'prompt': 'a', 'completion': 'b'}\n" * 12,
    "commas after the objects": '{"prompt": "a", "completion": "b"},\n' * 12,
    "YAML": "- prompt: a\n  completion: b\n" * 12,
    "Latin-1": '{"prompt": "caf\u00e9"}\n' * 12,
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", NO_LINES)
def test_a_file_of_lines_that_are_no_json_is_one_error(
    tmp_path: Path, kind: str, read: Callable[[Path], list[Any]]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(NO_LINES[kind].encode("latin-1"))
    with pytest.raises(ValueError, match=rf"^{path} is not JSON lines: none of its first 10 lines is JSON, such as "):
        read(path)
    path.write_bytes(b"\n".join([NO_LINES[kind].encode("latin-1").splitlines()[0]] * 9) + b"\n" + LINES)
    assert len(FileSet(SourceConfig(path=str(path)))) == 9 + len(ROWS)


def test_an_element_of_an_array_that_is_no_json_is_no_mistake_of_the_file(tmp_path: Path) -> None:
    content = '[ {"a": NaN, "b": "é]}"},\n{"b": [1, Infinity, -1e999]} , {"b": "x"}, ' + "9" * 5000 + " ]\n"
    path = tmp_path / "a.json"
    for encoded in (content.encode(), b"\xef\xbb\xbf" + content.encode()):
        path.write_bytes(encoded)
        source = FileSet(SourceConfig(path=str(path)))
        rows = [source.read(row) for row in range(len(source))]
        assert [row() for row in StreamedSource(SourceConfig(path=str(path))).open(0, 0).rows] == rows
        assert [type(decode_row(row)["b"]) for row in rows[:3]] == [str, Unreadable, str]
        assert rows[1:] == [b'{"b": [1, Infinity, -1e999]}', b'{"b": "x"}', b"9" * 5000]
    for damaged in ('[{"a": NaN}', '[{"a": NaN} {"a": 1}]', '[{"a": NaN}] x', '[{"a": oops}, NaN]', "[NaN,]"):
        for read in READERS:
            (tmp_path / "a.json").write_text(damaged)
            with pytest.raises(ValueError, match=r"a.json is not a JSON array of conversations: "):
                read(tmp_path / "a.json")


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "a", "completion": "b"}\n',
        b'{"data": ["a", "b"]}',
        b'{"conversation": [{"input": "a", "output": "b"}]}',
        b'{"prompt": \n{"prompt": "a", "completion": "b"}\n',
        b'["a"]\n{"prompt": "a", "completion": "b"}\n',
        b'"x\n5\n',
    ],
)
def test_a_mistake_of_a_row_is_no_mistake_of_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert len(FileSet(SourceConfig(path=str(tmp_path / "a.jsonl")))) == content.rstrip().count(b"\n") + 1


def test_the_index_that_pandas_writes_without_a_name_is_no_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",prompt,completion\n0,hi,hello\n")
    assert by_number(tmp_path / "a.csv") == [{"prompt": "hi", "completion": "hello"}]
