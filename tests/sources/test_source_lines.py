"""JSON lines: both readers give the same rows whatever white space and line ends are in the file."""

from __future__ import annotations

import gzip
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from two_readers import READERS, by_number, forward

from sftstream import SourceConfig
from sftstream.formats import decode_row
from sftstream.records import BrokenRow
from sftstream.sources import FileSet, StreamedSource
from sftstream.sources.file_formats import jsonl

PACKED: dict[str, Callable[[bytes], bytes]] = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.xz": lzma.compress}


WHITE = [b" ", b"\t", b"\r", b"\x0b", b"\x0c"]
"""The bytes besides the line feed that `bytes.strip` removes."""


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("white", WHITE)
def test_a_blank_line_of_any_white_space_leaves_the_row_before_it_whole(
    tmp_path: Path, white: bytes, read: Callable[[Path], list[Any]]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(white + b'\n{"a": 1}\n' + white + b'\n\n{"a": 2}\n' + white * 3 + b"\n" + white)
    assert [decode_row(row) for row in read(path)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("seed", range(30))
def test_rows_by_number_are_the_bytes_that_are_read_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(jsonl, "_CHUNK", draw.choice([1, 3, 64]))
    pieces = [*WHITE, b"\n", b"\n", b'{"a": 1}', b'{"b":\x0c2}', b"3", b"\x00", b"\x1c", b"\x85", b'"x']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 0}\n' + b"".join(draw.choices(pieces, k=60)))
    assert read_or_error(by_number, path) == read_or_error(forward, path)


def read_or_error(read: Callable[[Path], list[Any]], path: Path) -> Any:
    """The decoded rows, or the reason of an error without its line."""
    try:
        return [or_broken(row) for row in read(path)]
    except ValueError as error:
        return str(error).partition(" ")[2]


def or_broken(row: bytes) -> Any:
    try:
        return row, decode_row(row)
    except BrokenRow as broken:
        return row, str(broken)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}\r{"a": 2}\r{"a": 3}\r',
        b'{"a": 1}\r\r{"a": 2}\r{"a": 3}',
        b'{"a": 1} \r\t{"a": 2}\r{"a": 3}\r\n',
        b'{"a": 1}\n{"a": 2}\r{"a": 3}\r\n',
        b'{"a": 1}\r\n{"a": 2}\r{"a": 3}\n',
    ],
)
def test_rows_that_carriage_returns_divide_are_an_error_with_the_cause(
    tmp_path: Path, content: bytes, suffix: str, read: Callable[[Path], list[Any]]
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACKED[suffix](content))
    with pytest.raises(ValueError, match=rf"^{path}(:[12])? has lines that end in a carriage return without") as error:
        read(path)
    assert str(error.value).endswith("a line feed; convert them, for example by tr '\\r' '\\n'")
    path.write_bytes(PACKED[suffix](content.replace(b"\r", b"\n")))
    assert [decode_row(row) for row in read(path)] == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize("read", READERS)
def test_carriage_returns_inside_of_a_row_are_white_space(tmp_path: Path, read: Callable[[Path], list[Any]]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":\r[{"b": 1},\r{"c": 2}]\r}\r\r\n{"d": "}\\r{"}\r')
    assert [decode_row(row) for row in read(path)] == [{"a": [{"b": 1}, {"c": 2}]}, {"d": "}\r{"}]


@pytest.mark.parametrize("pattern", ["", "/*", "/*.jsonl*", "/?.jsonl*", "/**/*.jsonl*"])
@pytest.mark.parametrize("read", READERS)
def test_suffixes_in_capital_letters_are_found_in_directories_and_by_globs(
    tmp_path: Path, pattern: str, read: Callable[[Path], list[Any]]
) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("a.JSONL", "b.Jsonl.GZ", "c.jsonl"):
        content = f'{{"name": "{name}"}}\n'.encode()
        (tmp_path / "rows" / name).write_bytes(gzip.compress(content) if "GZ" in name else content)
    source = FileSet(SourceConfig(path=f"{tmp_path}/rows{pattern}"))
    names = [decode_row(source.read(row))["name"] for row in range(len(source))]
    assert names == ["a.JSONL", "b.Jsonl.GZ", "c.jsonl"]
    assert StreamedSource(SourceConfig(path=f"{tmp_path}/rows{pattern}", streaming=True)).file_count == 3


@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".TSV", ".Csv.Gz"])
@pytest.mark.parametrize("read", READERS)
def test_a_table_under_a_suffix_of_capital_letters_is_read(
    tmp_path: Path, suffix: str, read: Callable[[Path], list[Any]]
) -> None:
    content = b"q\ta\n1\t2\n" if suffix == ".TSV" else b"q,a\n1,2\n"
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(content) if suffix == ".Csv.Gz" else content)
    for path in (tmp_path / f"a{suffix}", tmp_path, tmp_path / "*"):
        assert read(path) == [{"q": "1", "a": "2"}]


def test_a_name_without_wildcards_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.JSONL").write_bytes(b'{"a": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl' matches no file"):
        FileSet(SourceConfig(path=str(tmp_path / "a.jsonl")))
