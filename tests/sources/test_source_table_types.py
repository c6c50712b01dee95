"""Types of tables that `datasets` and pyarrow write, and values that Python cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

from sftstream import Message
from sftstream.config import RowSettings, SourceConfig
from sftstream.formats import parse_row
from sftstream.records import BrokenRow
from sftstream.sources import FileSet

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SAID = (Message("user", "hi"), Message("assistant", "hello"))
NULLS: dict[str, Any] = {"name": None, "tool_calls": [], "extra": [None], "deep": {"a": None, "b": [{"c": None}]}}


def write_parquet(directory: Path, data: datasets.Dataset) -> FileSet:
    data.to_parquet(str(directory / "a.parquet"))
    return FileSet(SourceConfig(path=str(directory / "a.parquet")))


def save(directory: Path, data: datasets.Dataset) -> FileSet:
    data.save_to_disk(str(directory / "saved"))
    return FileSet(SourceConfig(path=str(directory / "saved")))


def write_repository(directory: Path, data: datasets.Dataset) -> FileSet:
    (directory / "hub").mkdir()
    data.to_parquet(str(directory / "hub" / "train.parquet"))
    return FileSet(SourceConfig(path=str(directory / "hub"), split="train"))


@pytest.mark.parametrize("write", [write_parquet, save, write_repository])
def test_optional_fields_that_are_null_in_all_rows_are_absent(tmp_path: Path, write: Any) -> None:
    rows = [{"messages": [{**message, **NULLS} for message in MESSAGES], "tools": None}] * 3
    source = write(tmp_path, datasets.Dataset.from_list(rows))
    assert [parse_row(source.read(row)).messages for row in range(3)] == [SAID] * 3


UNHOLDABLE = {
    "timestamp": pa.array([2**50], pa.int64()).view(pa.timestamp("s")),
    "zone": pa.array([0]).view(pa.timestamp("s", "No/Where")),
    "part of a day": pa.array([2**62]).view(pa.date64()),
    "time": pa.array([2**62]).view(pa.time64("ns")),
    "date": pa.array([2**30], pa.int32()).view(pa.date32()),
    "duration": pa.array([2**62], pa.int64()).view(pa.duration("s")),
    "map of structs": pa.array([[({"a": 1}, 2)]], pa.map_(pa.struct([("a", pa.int64())]), pa.int64())),
    "bytes as text": pa.array([b"\xff"]).view(pa.string()),
    "nested": pa.array([[{"at": 2**50}]], pa.list_(pa.struct([("at", pa.int64())]))).cast(
        pa.list_(pa.struct([("at", pa.timestamp("s"))]))
    ),
    "map to null": pa.array([[("k", None)]], pa.map_(pa.string(), pa.null())),
}


@pytest.mark.parametrize("kind", UNHOLDABLE)
def test_a_value_that_python_cannot_hold_matters_only_in_a_column_that_is_read(tmp_path: Path, kind: str) -> None:
    table = pa.table({"messages": pa.array([MESSAGES]), "when": UNHOLDABLE[kind]})
    write_table(table, tmp_path / "a.parquet")
    row = FileSet(SourceConfig(path=str(tmp_path / "a.parquet"))).read(0)
    assert parse_row(row).messages == SAID
    if kind in ("map to null", "time"):
        return
    with pytest.raises(BrokenRow, match=r"^cannot be decoded: column 'prompt': ."):
        parse_row(row, RowSettings(columns={"prompt": "when", "completion": "messages"}))


@pytest.mark.parametrize(
    "row",
    [
        b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}], "score": NaN}',
        b'{"score": [1e999, -Infinity], "prompt": "hi", "completion": "hello"}',
        b'{"n": ' + b"9" * 5000 + b', "prompt": "hi", "completion": "hello"}',
        b'{"prompt": "hi", "note": "\\ud800", "completion": "hello"}',
    ],
    ids=["NaN", "infinity", "long integer", "lone surrogate"],
)
def test_a_number_outside_of_json_matters_only_in_a_column_that_is_read(row: bytes) -> None:
    assert parse_row(row).messages == SAID
    columns = {"prompt": next(name for name in ("score", "n", "note") if f'"{name}"' in row.decode())}
    reason = "(a number that is NaN, |half of a surrogate)"
    with pytest.raises(BrokenRow, match=f"^cannot be decoded: column 'prompt': it has {reason}"):
        parse_row(row, RowSettings(columns=columns))
