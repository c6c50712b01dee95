"""The index of a file's rows: built once, shared, and never trusted when the file or the index is another."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftstream import SourceConfig, cache, read_conversations
from sftstream.formats import decode_row
from sftstream.records import Ref
from sftstream.sources import Corpus, CorpusReader, rows
from sftstream.sources import row_index as spans
from sftstream.sources.corpus import FileSet
from sftstream.sources.file_formats import jsonl
from sftstream.streaming.example_reader import ExampleReader


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTSTREAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{number}\n" for number in range(1000)))
    return path


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were searched for rows from here on."""
    names = []
    divide = jsonl.divide

    def noted(file: FileIO, size: int) -> Iterator[Any]:
        names.append(Path(str(file.name)).name)
        return divide(file, size)

    monkeypatch.setattr(jsonl, "divide", noted)
    return names


def opened(path: Path) -> FileSet:
    return FileSet(SourceConfig(path=str(path)))


def read_all(source: FileSet) -> list[Any]:
    return [decode_row(source.read(row)) for row in range(len(source))]


def index_of(tmp_path: Path) -> Path:
    (index,) = (tmp_path / "cache").rglob("*.spans")
    return index


def test_an_index_is_built_once(path: Path, built: list[str]) -> None:
    for _ in range(3):
        assert read_all(opened(path)) == list(range(1000))
    assert built == ["a.jsonl"]


def test_a_file_that_moved_keeps_its_index(path: Path, built: list[str]) -> None:
    opened(path)
    moved = path.rename(path.with_name("b.jsonl"))
    os.utime(moved, (1, 1))
    assert opened(moved).read(999) == b"999\n"
    assert built == ["a.jsonl"]


def test_a_file_that_changed_in_place_is_indexed_anew(path: Path, built: list[str]) -> None:
    opened(path)
    before = path.stat()
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(content.replace(b"500\n501\n", b"50\n0501\n").replace(b"0501", b"1501"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )
    source = opened(path)
    assert (source.read(500), source.read(501)) == (b"50\n", b"1501\n")
    assert built == ["a.jsonl"] * 2


def test_a_huge_file_that_changed_where_no_sample_looks_is_indexed_anew(
    path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "SAMPLED_ABOVE", 1000)
    monkeypatch.setattr(rows, "_BLOCK", 1)
    opened(path)
    opened(path)
    content = bytearray(path.read_bytes())
    location = content.index(b"500\n")
    with path.open("r+b") as file:
        file.seek(location)
        file.write(b"5\n7")
    source = opened(path)
    assert [decode_row(source.read(row)) for row in (500, 501, 502)] == [5, 7, 501]
    assert built == ["a.jsonl"] * 2


DAMAGES = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[:-1],
    "cut in half": lambda content: content[: len(content) // 2],
    "grown": lambda content: content + b"\0",
    "another magic": lambda content: content[:-88] + b"rowspan0" + content[-80:],
    "another key": lambda content: content[:-80] + b"0" * 64 + content[-16:],
    "more rows": lambda content: content[:-16] + (10**6).to_bytes(8, "little") + content[-8:],
    "fewer rows": lambda content: content[:-16] + (10).to_bytes(8, "little") + content[-8:],
    "negative rows": lambda content: content[:-16] + b"\xff" * 16,
    "zeros": lambda content: bytes(len(content)),
    "noise": lambda content: random.Random(0).randbytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("named", ["as it was", "by its content"])
def test_a_damaged_index_is_built_anew(path: Path, tmp_path: Path, built: list[str], damage: str, named: str) -> None:
    opened(path)
    index = index_of(tmp_path)
    content = DAMAGES[damage](index.read_bytes())
    index.unlink()
    honest = f"{len(content)}-{hashlib.sha256(content).hexdigest()}.spans"
    (index if named == "as it was" else index.with_name(honest)).write_bytes(content)
    assert read_all(opened(path)) == list(range(1000))
    assert len(built) == 2


def test_an_index_with_a_wrong_border_is_an_error_and_no_refused_row(path: Path, tmp_path: Path) -> None:
    source = opened(path)
    index = index_of(tmp_path)
    content = bytearray(index.read_bytes())
    content[8 * 500] += 1
    index.write_bytes(content)
    assert decode_row(source.read(498)) == 498
    source.require_intact(498)
    for row in (499, 500):
        with pytest.raises(RuntimeError) as error:
            source.require_intact(row)
        assert str(error.value) == (
            f"{path}:{row + 1} does not begin where its index says; "
            f"the file changed while it was read, or {index} is damaged: delete the index and start again"
        )


def test_a_row_that_is_broken_by_a_wrong_border_stops_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 10)
    rows = read_conversations(str(path))
    reader = ExampleReader(CorpusReader(Corpus((SourceConfig(path=str(path)),))), encoder=None)  # type: ignore[arg-type]
    assert len([next(rows) for _ in range(4)]) == 4
    index = index_of(tmp_path)
    content = bytearray(index.read_bytes())
    content[8 * 5] += 1
    index.write_bytes(content)
    with pytest.raises(RuntimeError, match=rf"^{path}:5 does not begin where its index says; "):
        next(rows)
    with pytest.raises(RuntimeError, match=rf"^{path}:6 does not begin where its index says; "):
        list(reader.load([Ref(0, 5, 0)]))


def test_what_a_killed_process_left_is_swept_and_harms_nothing(path: Path, tmp_path: Path) -> None:
    opened(path)
    index = index_of(tmp_path)
    left = index.with_name("0123.partial")
    index.rename(left)
    assert read_all(opened(path)) == list(range(1000))
    assert not left.exists()


def _open_and_sum(path: Path) -> int:
    return sum(read_all(opened(path)))


def test_processes_that_build_at_once_build_it_once(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    divide = jsonl.divide

    def slow(file: FileIO, size: int) -> Iterator[Any]:
        with (tmp_path / "builders").open("a") as builders:
            builders.write("one\n")
        time.sleep(0.3)
        return divide(file, size)

    monkeypatch.setattr(jsonl, "divide", slow)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_open_and_sum, [path] * 8, chunksize=1) == [sum(range(1000))] * 8
    assert (tmp_path / "builders").read_text() == "one\n"
    assert sorted(file.suffix for file in index_of(tmp_path).parent.iterdir()) == ["", ".spans"]


def test_processes_killed_while_they_build_leave_no_false_index(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b'{"a": 1}\n' * 2_000_000)
    for delay in (0.0, 0.005, 0.01, 0.02, 0.04):
        child = multiprocessing.get_context("fork").Process(target=opened, args=(path,))
        child.start()
        while not (tmp_path / "cache").exists():
            time.sleep(0.001)
        time.sleep(delay)
        child.kill()
        child.join()
    source = opened(path)
    assert len(source) == 2_000_000
    assert source.read(1_999_999) == b'{"a": 1}\n'


def test_a_filesystem_without_locks_builds_all_the_same(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(cache.fcntl, "flock", no_locks)
    assert opened(path).read(3) == b"3\n"


def test_a_cache_that_cannot_be_written_is_an_error_with_the_remedy(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFTSTREAM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r".") as error:
        opened(path)
    assert str(error.value) == (
        f"the cache {tmp_path}/file cannot be written: Not a directory; set SFTSTREAM_CACHE to another directory"
    )


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SFTSTREAM_CACHE": "/c", "XDG_CACHE_HOME": "/x"}, "/c"),
        ({"SFTSTREAM_CACHE": "~/c"}, "/h/c"),
        ({"SFTSTREAM_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/sftstream"),
        ({"XDG_CACHE_HOME": ""}, "/h/.cache/sftstream"),
        ({}, "/h/.cache/sftstream"),
    ],
)
def test_the_cache_is_where_the_user_wants_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("SFTSTREAM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"HOME": "/h"}).items():
        monkeypatch.setenv(name, value)
    assert cache.directory() == Path(expected)


def test_the_index_of_a_plain_file_is_eight_bytes_a_row(path: Path, tmp_path: Path) -> None:
    opened(path)
    assert index_of(tmp_path).stat().st_size == 8 * 1001 + 88


def test_a_source_of_more_files_than_descriptors_is_read(tmp_path: Path) -> None:
    for number in range(150):
        (tmp_path / f"{number:03}.jsonl").write_text(f"{number}\n{number + 1000}\n")
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from sftstream import SourceConfig
from sftstream.formats import decode_row
from sftstream.sources import FileSet
rows = FileSet(SourceConfig(path={str(tmp_path)!r}))
assert [int(rows.read(2 * i)) for i in range(150)] == list(range(150))
assert [int(rows.read(2 * i + 1)) for i in range(149, -1, -1)] == list(range(1149, 999, -1))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_file_that_is_opened_again_must_be_the_same(path: Path) -> None:
    source = opened(path)
    spans._opened.cache_clear()
    assert source.read(1) == b"1\n"
    spans._opened.cache_clear()
    path.write_text(path.read_text())  # another inode change, equal content
    assert source.read(1) == b"1\n"
    spans._opened.cache_clear()
    path.write_text(path.read_text().replace("999", "998"))
    with pytest.raises(RuntimeError) as error:
        source.read(1)
    assert str(error.value) == f"{path} changed while it was read; restore the file, or start again"


def slow_divide(content: bytes) -> list[tuple[int, int]]:
    """Start and line of each row, in the plainest way."""
    start = 3 if content.startswith(b"\xef\xbb\xbf") else 0
    found = []
    for number, line in enumerate(content[start:].split(b"\n")):
        if line.strip():
            found.append((start, number))
        start += len(line) + 1
    return found


@pytest.mark.parametrize("seed", range(40))
def test_rows_and_lines_of_random_files_are_those_of_a_plain_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(jsonl, "_CHUNK", draw.choice([1, 2, 3, 8, 64, 4096]))
    pieces = [b"\n", b"\r\n", b" ", b"\t", b"1", b" 22", b"[3,\t4]", b'"' + b"x" * 70 + b'"', b"\xef\xbb\xbf"]
    content = draw.choice([b"", b"\xef\xbb\xbf"]) + b"".join(draw.choices(pieces, k=draw.randint(0, 60)))
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    parts = list(jsonl.divide(FileIO(path), len(content)))
    starts = np.concatenate([starts for starts, _ in parts]).tolist()
    numbers = np.concatenate([numbers for _, numbers in parts]).tolist()
    expected = slow_divide(content)
    assert list(zip(starts, numbers, strict=True))[:-1] == expected
    assert starts[-1] == len(content)
    if expected:
        source = opened(path)
        assert [source.locate_row(row) for row in range(len(source))] == [f"{path}:{line + 1}" for _, line in expected]


@pytest.mark.slow
def test_ten_million_tiny_rows_are_indexed_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        for first in range(0, 10_000_000, 100_000):
            file.write(b"".join(b"%d\n" % number for number in range(first, first + 100_000)))
    program = f"""
import json, resource
from sftstream import SourceConfig
from sftstream.formats import decode_row
from sftstream.sources import FileSet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = FileSet(SourceConfig(path={str(path)!r}))
assert len(rows) == 10_000_000
assert [int(rows.read(row)) for row in (0, 4_999_999, 9_999_999)] == [0, 4_999_999, 9_999_999]
assert rows.locate_row(9_999_999).endswith(":10000000")
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) < 64 << 10  # kilobytes
    assert index_of(tmp_path).stat().st_size == 8 * 10_000_001 + 88
