"""Compressed files of several packed streams: everything is read, and damage after a stream is an error."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from two_readers import READERS, by_number, forward

from sftstream.formats import decode_row

CODECS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}
ROWS = [b'{"a": 1}\n', b'{"a": 2}\n' * 100_000]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTSTREAM_CACHE", str(tmp_path / "cache"))


def refused(path: Path, content: bytes, read: Callable[[Path], list[Any]]) -> str:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path} cannot be (unpacked|read)") as error:
        read(path)
    return str(error.value)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("codec", CODECS)
def test_all_streams_of_a_file_are_read_also_beside_empty_ones(
    tmp_path: Path, codec: str, read: Callable[[Path], list[Any]]
) -> None:
    pack = CODECS[codec]
    path = tmp_path / f"a.jsonl{codec}"
    path.write_bytes(pack(b"") + pack(ROWS[0]) + pack(b"") * 2 + pack(ROWS[1]) + pack(b""))
    assert b"".join(read(path)) == ROWS[0] + ROWS[1]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("row", ROWS, ids=["short", "long"])
def test_damage_after_a_stream_is_an_error(
    tmp_path: Path, codec: str, row: bytes, read: Callable[[Path], list[Any]]
) -> None:
    first, second = CODECS[codec](row), CODECS[codec](ROWS[0])
    damaged = bytes([*second[:1], second[1] ^ 1, *second[2:]])
    after = [damaged, second[:-3], second[:6], second[:1], b"x", b"garbage after the end", b"\n", row[:3000]]
    for number, content in enumerate(after):
        refused(tmp_path / f"{number}.jsonl{codec}", first + content, read)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("zeros", [4, 8, 512, 1 << 18])
def test_padding_of_xz_is_passed_over(tmp_path: Path, zeros: int, read: Callable[[Path], list[Any]]) -> None:
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes((lzma.compress(ROWS[0]) + bytes(zeros)) * 2)
    assert read(path) == [ROWS[0]] * 2


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("zeros", [1, 2, 3, 5, 131_073])
def test_padding_of_xz_that_is_no_multiple_of_four_is_an_error(
    tmp_path: Path, zeros: int, read: Callable[[Path], list[Any]]
) -> None:
    packed = lzma.compress(ROWS[0])
    for number, content in enumerate([packed + bytes(zeros), packed + bytes(zeros) + packed]):
        assert f"{zeros:,} zero bytes follow a packed stream, and are no multiple of four" in refused(
            tmp_path / f"{number}.jsonl.xz", content, read
        )
    assert "cannot be" in refused(tmp_path / "2.jsonl.xz", bytes(zeros) + packed, read)


@pytest.mark.skipif(shutil.which("xz") is None, reason="the command xz is not installed")
@pytest.mark.parametrize("read", READERS)
def test_the_rows_of_an_xz_file_are_those_that_the_command_xz_prints(
    tmp_path: Path, read: Callable[[Path], list[Any]]
) -> None:
    packed = lzma.compress(ROWS[0])
    path = tmp_path / "a.jsonl.xz"
    for after in (b"", packed, bytes(4) + packed, bytes(8), bytes(6), b"\xfe" + packed[1:], packed[:20], b"7z"):
        path.write_bytes(packed + after)
        printed = subprocess.run(["xz", "-dc", path], capture_output=True, check=False)
        if printed.returncode == 0:
            assert b"".join(read(path)) == printed.stdout
        else:
            refused(path, packed + after, read)


@pytest.mark.parametrize("read", READERS)
def test_an_older_lzma_file_is_read_and_its_damage_an_error(tmp_path: Path, read: Callable[[Path], list[Any]]) -> None:
    packed = lzma.compress(ROWS[0], lzma.FORMAT_ALONE)
    (tmp_path / "a.jsonl.xz").write_bytes(packed)
    assert [decode_row(row) for row in read(tmp_path / "a.jsonl.xz")] == [{"a": 1}]
    refused(tmp_path / "b.jsonl.xz", packed[:-3], read)
    refused(tmp_path / "c.jsonl.xz", packed + b"garbage", read)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("content", [None, b""], ids=["no byte", "no content"])
def test_a_compressed_file_without_content_holds_no_row(tmp_path: Path, codec: str, content: bytes | None) -> None:
    path = tmp_path / f"a.jsonl{codec}"
    path.write_bytes(b"" if content is None else CODECS[codec](content))
    assert forward(path) == []
    with pytest.raises(ValueError, match=rf"^source '{path}' holds no row; "):
        by_number(path)
