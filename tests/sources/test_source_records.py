"""Records of CSV and TSV files: no quote and no carriage return joins rows to one row unnoticed."""

from __future__ import annotations

import bz2
import csv
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from sftstream import PackLoader, SourceConfig
from sftstream.records import BrokenRow, RawRow, Ref
from sftstream.sources import FileSet, StreamedReader, StreamedSource, streamed_reader
from sftstream.sources.file_formats import delimited

Read = Callable[[Path], list[Any]]


def by_number(path: Path) -> list[Any]:
    source = FileSet(SourceConfig(path=str(path)))
    return [or_broken(lambda row=row: source.read(row)) for row in range(len(source))]


def forward(path: Path) -> list[Any]:
    return [or_broken(row) for row in StreamedSource(SourceConfig(path=str(path), streaming=True)).open(0, 0).rows]


def or_broken(read: Callable[[], RawRow]) -> Any:
    try:
        return read()
    except BrokenRow as broken:
        return str(broken)


READERS = [by_number, forward]
QUOTE = '"'
PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".csv": bytes,
    ".csv.gz": gzip.compress,
    ".csv.bz2": bz2.compress,
    ".csv.xz": lzma.compress,
    ".tsv": lambda content: content.replace(b",", b"\t"),
}


def refusal(path: Path, read: Read) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        read(path)
    return str(error.value)


def written(directory: Path, content: bytes, suffix: str = ".csv") -> Path:
    path = directory / f"a{suffix}"
    path.write_bytes(PACKED[suffix](content))
    return path


def five_thousand(*quoted: int) -> bytes:
    """Rows of questions and answers, some with a quote before the question."""
    lines = (f"{QUOTE * (i in quoted)}question {i},answer {i}\n" for i in range(5000))
    return ("prompt,completion\n" + "".join(lines)).encode()


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("suffix", PACKED)
def test_a_quote_that_no_line_closes_is_an_error_with_the_line_where_it_opens(
    tmp_path: Path, suffix: str, read: Read
) -> None:
    path = written(tmp_path, five_thousand(7), suffix)
    for _ in range(2):  # nothing of the first attempt is kept
        assert refusal(path, read) == (
            f"{path}:9 opens a quote that no later line closes; remove or close the quote, or restore the rest of the file"
        )
    assert len(read(written(tmp_path, five_thousand(), suffix))) == 5000


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'q,a\n1,2\n"3",4\n5,"6', 4),
        (b'q,a\n1,2\n\n"3\n4","5\n6\n', 5),
        (b'q,a\r\n1,"2\r\n', 2),
        (b'q,a\n1,"', 2),
        (b'q,a\n1,2\n3,"4\r5\r6\n', 3),
        (b'\n"q,a\n1,2\n', 2),
    ],
)
def test_the_line_of_an_open_quote_is_named_wherever_it_opens(
    tmp_path: Path, content: bytes, line: int, read: Read
) -> None:
    path = written(tmp_path, content)
    assert refusal(path, read).startswith(f"{path}:{line} opens a quote that no later line closes; ")


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("suffix", PACKED)
def test_rows_between_two_open_quotes_are_an_error_and_not_one_row(tmp_path: Path, suffix: str, read: Read) -> None:
    path = written(tmp_path, five_thousand(7, 4000), suffix)
    delimiter = "\\t" if suffix == ".tsv" else ","  # escaped, as all of a message is printable
    assert refusal(path, read) == (
        f"{path}:9 begins a record of several lines that is not CSV: '{delimiter}' expected after '\"'; remove or close the "
        "quote that joins the lines, or correct the record"
    )


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("content", "line", "mistake"),
    [
        (b'q,a\n1,2\n"3,4\n5,6"\n7,8\n', 3, "has 1 cells for the 2 columns of the header"),
        (b'q,a\n1,"2\n3,4",5,6\n7,8\n', 2, "has 4 cells for the 2 columns of the header"),
        (b'q,a\n"1"x,"2\n3",4\n5,6\n', 2, "is not CSV: ',' expected after '\"'"),
        (b'"q,a\n1,2\n"3,4\n', 1, "is not CSV: ',' expected after '\"'"),
    ],
    ids=["fewer cells", "more cells", "quote left open by a broken line", "header"],
)
def test_a_broken_record_of_several_lines_is_an_error_of_the_file(
    tmp_path: Path, content: bytes, line: int, mistake: str, read: Read
) -> None:
    path = written(tmp_path, content)
    assert refusal(path, read).startswith(f"{path}:{line} begins a record of several lines that {mistake}; ")


@pytest.mark.parametrize("read", READERS)
def test_a_quote_that_is_closed_far_behind_is_an_error_at_the_limit_of_a_cell(tmp_path: Path, read: Read) -> None:
    csv.field_size_limit(1000)
    try:
        path = written(tmp_path, five_thousand(7, 4000))
        assert refusal(path, read).startswith(
            f"{path}:9 begins a record of several lines that is not CSV: field larger than field limit (1000); "
        )
    finally:
        csv.field_size_limit(delimited._CELL)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("suffix", PACKED)
def test_quoted_cells_of_several_lines_are_read(tmp_path: Path, suffix: str, read: Read) -> None:
    content = b'q,a\r\n"1\n2","""3""\r\n\r\n4\r5"\r\n"6","7\n"\n8,9\n'
    assert read(written(tmp_path, content, suffix)) == [
        {"q": "1\n2", "a": '"3"\r\n\r\n4\r5'},
        {"q": "6", "a": "7\n"},
        {"q": "8", "a": "9"},
    ]


@pytest.mark.parametrize("read", READERS)
def test_a_broken_record_of_one_line_is_refused_alone(tmp_path: Path, read: Read) -> None:
    content = b'q,a\n"1"x,2\n3\n"4\n\xff",5\n6\r7,8\n9,10\n'
    ragged, not_utf8, lone_return = "has 1 cells for the 2 columns", "is not CSV: 'utf-8'", "is not CSV: new-line"
    *broken, last = read(written(tmp_path, content))
    assert last == {"q": "9", "a": "10"}
    assert len(broken) == 4
    for said, begin in zip(broken, ("is not CSV: ','", ragged, not_utf8, lone_return), strict=True):
        assert said.startswith(begin)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("content", [b"q,a\r1,2\r3,4\r", b'"q","a"\r"1","2"\r3,4', b"q,a\r1,2\r3,4\r\n"])
def test_lines_that_end_in_a_carriage_return_alone_are_named_as_the_cause(
    tmp_path: Path, content: bytes, suffix: str, read: Read
) -> None:
    path = written(tmp_path, content, suffix)
    assert refusal(path, read).removeprefix(f"{path}").removeprefix(":1") == (
        " has lines that end in a carriage return without a line feed; convert them, for example by tr '\\r' '\\n'"
    )
    assert read(written(tmp_path, content.replace(b"\r", b"\n"), suffix)) == [
        {"q": "1", "a": "2"},
        {"q": "3", "a": "4"},
    ]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("rows", [b"1,2\r3,4\r5,6", b'"1","2"\r"3","4"'])
def test_rows_that_carriage_returns_divide_are_an_error_and_not_one_row(
    tmp_path: Path, rows: bytes, read: Read
) -> None:
    path = written(tmp_path, b"q,a\n" + rows + b"\n7,8\n")
    assert refusal(path, read).startswith(f"{path}:2 has lines that end in a carriage return without a line feed; ")


@pytest.fixture
def _close_bookmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_reader, "ROWS_BETWEEN_BOOKMARKS", 5)


@pytest.mark.usefixtures("_close_bookmarks")
@pytest.mark.parametrize("suffix", PACKED)
def test_a_resume_names_the_line_of_an_open_quote_in_the_file(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, five_thousand(30), suffix)
    source = StreamedSource(SourceConfig(path=str(path), streaming=True))
    reader = StreamedReader(source)
    for row in range(28):
        reader.read(Ref(0, row, 0))
    bookmarks = reader.bookmarks([Ref(0, 27, 0)])
    assert [bookmark.row for bookmark in bookmarks] == [25]
    resumed = StreamedReader(source)
    resumed.remember(bookmarks)
    for row in range(27, 30):
        resumed.read(Ref(0, row, 0))
    with pytest.raises(ValueError, match=rf"^{path}:32 opens a quote that no later line closes; "):
        resumed.read(Ref(0, 30, 0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_over_an_open_quote_ends_with_the_error(
    tmp_path: Path, tokenizer: str, workers: int, *, streaming: bool
) -> None:
    path = written(tmp_path, five_thousand(7))
    source = {"path": str(path), "streaming": streaming}
    config = tiny.data_config(tokenizer, sources=[source], shuffle=False, streams=2, epochs=1)
    with pytest.raises(ValueError, match=rf"{path}:9 opens a quote that no later line closes; "):
        list(PackLoader(config, workers=workers))
