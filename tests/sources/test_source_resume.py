"""Packs of every kind of source are the same, whoever reads them, and a resume on another content is refused by name."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.ipc
import pytest
import tiny

from sftstream import DataConfig, PackLoader

ROWS = tiny.rows(24)
MAP = {"messages": "dialogue"}


def write_arrow(path: Path, rows: list[Any]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def write_csv(path: Path, rows: list[Any]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "dialogue"])
        writer.writerows([number, json.dumps(row["messages"])] for number, row in enumerate(rows))


def write_gz(path: Path, rows: list[Any]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_saved(path: Path, rows: list[Any]) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(str(path), num_shards=3)


def write_repository(path: Path, rows: list[Any]) -> None:
    path.mkdir(exist_ok=True)
    tiny.write_jsonl(path / "train.jsonl", rows)


def write_memory(_path: Path, rows: list[Any]) -> None:
    fsspec.filesystem("memory").pipe("/a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


KINDS: dict[str, tuple[str, Callable[[Path, list[Any]], Any], dict[str, Any]]] = {
    "JSON lines": ("a.jsonl", tiny.write_jsonl, {}),
    "JSON array": ("a.json", tiny.write_json, {}),
    "Parquet": ("a.parquet", tiny.write_parquet, {}),
    "Arrow": ("a.arrow", write_arrow, {}),
    "CSV": ("a.csv", write_csv, {"columns": MAP}),
    "gzip": ("a.jsonl.gz", write_gz, {}),
    "saved": ("saved", write_saved, {}),
    "repository": ("repository", write_repository, {"split": "train"}),
    "memory": ("memory://a.jsonl", write_memory, {}),
}


@pytest.fixture(autouse=True)
def _empty_memory() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


class Source:
    """One source of a kind, and the loaders of it."""

    def __init__(self, kind: str, directory: Path, tokenizer: str) -> None:
        name, self._write, self.fields = KINDS[kind]
        self.local = directory / name
        self.path = name if "://" in name else str(self.local)
        self._tokenizer = tokenizer

    def write(self, rows: list[Any]) -> None:
        self._write(self.local, rows)

    def config(self, **fields: Any) -> DataConfig:
        return tiny.data_config(self._tokenizer, sources=[{"path": self.path, **self.fields, **fields}])

    def load(self, state: Any = None, workers: int = 0, **fields: Any) -> PackLoader:
        return PackLoader(self.config(**fields), state=state, workers=workers)

    def state(self) -> dict[str, Any]:
        loader = self.load()
        tiny.take(loader, 4)
        return loader.state_dict()

    def refusal(self, state: Any, **fields: Any) -> str:
        with pytest.raises(ValueError, match=r".") as error:
            self.load(state, **fields)
        return str(error.value).split("would not be exact: ")[-1].removesuffix(". Restore them, or start a new run")


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: str) -> Source:
    made = Source(request.param, tmp_path, tokenizer)
    made.write(ROWS)
    return made


every_kind = pytest.mark.parametrize("source", KINDS, indirect=True)
json_lines = pytest.mark.parametrize("source", ["JSON lines"], indirect=True)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> list[str]:
    plain = Source("JSON lines", tmp_path_factory.mktemp("plain"), tokenizer)
    plain.write(ROWS)
    return tiny.digests(plain.load())


@every_kind
def test_every_kind_gives_the_same_packs_in_this_process_and_in_workers(source: Source, expected: list[str]) -> None:
    assert tiny.digests(source.load()) == expected
    assert tiny.digests(source.load(workers=2)) == expected


@every_kind
def test_every_kind_resumes_exactly(source: Source, expected: list[str]) -> None:
    loader = source.load(workers=1)
    before = tiny.digests(tiny.take(loader, 8))
    state = loader.state_dict()
    loader.close()
    assert before + tiny.digests(source.load(json.loads(json.dumps(state)))) == expected


@every_kind
def test_a_source_that_shrank_between_runs_is_refused_by_name(source: Source) -> None:
    state = source.state()
    source.write(ROWS[:-1])
    said = source.refusal(state)
    assert "data.sources[0].rows: 24 -> 23" in said
    assert re.search(r"data\.sources\[0\]\.files\[\d\]\.size: \d+ -> \d+", said)


@every_kind
def test_a_source_that_grew_between_runs_is_refused_by_name(source: Source) -> None:
    state = source.state()
    source.write([*ROWS, tiny.chat("one", "more")])
    said = source.refusal(state)
    assert "data.sources[0].rows: 24 -> 25" in said
    assert re.search(r"data\.sources\[0\]\.files\[\d\]\.size: \d+ -> \d+", said)


@every_kind
def test_a_row_that_changed_between_runs_is_refused_by_name(source: Source) -> None:
    state = source.state()
    source.write([*ROWS[:12], tiny.chat("other", "words"), *ROWS[13:]])
    said = source.refusal(state)
    assert re.search(r"data\.sources\[0\]\.files\[\d\]\.sha256: '[0-9a-f]{64}' -> '[0-9a-f]{64}'", said)
    assert "rows" not in said


@json_lines
def test_a_file_that_shrank_by_its_last_byte_is_refused_by_name(source: Source) -> None:
    state = source.state()
    size = source.local.stat().st_size
    os.truncate(source.local, size - 1)  # the line break: the same rows
    assert re.fullmatch(
        rf"data\.sources\[0\]\.files\[0\]\.size: {size} -> {size - 1}; data\.sources\[0\]\.files\[0\]\.sha256: .*",
        source.refusal(state),
    )


@json_lines
@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_shrinks_while_it_is_read_ends_the_run_by_name(source: Source, workers: int) -> None:
    loader = source.load(workers=workers)
    os.truncate(source.local, 10)
    with pytest.raises(
        (RuntimeError, ValueError), match=r"a\.jsonl:\d+ is no longer there: the file shrank while it was read"
    ):
        tiny.take(loader, 4)


def test_a_missing_shard_of_a_glob_is_refused_by_name(tmp_path: Path, tokenizer: str) -> None:
    for number in range(3):
        tiny.write_jsonl(tmp_path / f"{number}.jsonl", ROWS[number * 8 : number * 8 + 8])
    config = tiny.data_config(tokenizer, f"{tmp_path}/*.jsonl")
    loader = PackLoader(config)
    tiny.take(loader, 4)
    (tmp_path / "2.jsonl").unlink()
    with pytest.raises(ValueError, match=r"data\.sources\[0\]\.files\[2\]: \{'name': '2\.jsonl', .* -> None") as error:
        PackLoader(config, state=loader.state_dict())
    assert "data.sources[0].rows: 24 -> 16" in str(error.value)


@pytest.mark.parametrize("source", ["saved"], indirect=True)
def test_a_missing_file_of_a_saved_dataset_is_refused_at_a_resume_too(source: Source) -> None:
    state = source.state()
    (source.local / "data-00002-of-00003.arrow").unlink()
    assert source.refusal(state) == (
        f"source '{source.local}' lacks data-00002-of-00003.arrow, one of 3 files in the list of state.json; restore the file"
    )


@pytest.mark.parametrize("source", ["CSV"], indirect=True)
def test_other_columns_are_refused_by_name(source: Source) -> None:
    state = source.state()
    said = source.refusal(state, columns={"conversations": "dialogue"})
    assert said.startswith("data.sources[0].columns.messages: 'dialogue' -> None")
    assert source.refusal(state, columns=None).startswith("data.sources[0].columns: {'messages': 'dialogue'} -> None")


@pytest.mark.parametrize("source", ["CSV"], indirect=True)
def test_a_ragged_row_is_refused_alone_and_listed_by_its_place(source: Source) -> None:
    with source.local.open("a") as file:
        file.write("24\n")
    loader = source.load()
    refused = [refusal for pack in loader for refusal in pack.refused]
    assert [(refusal.row, refusal.reason) for refusal in refused] == [(24, "broken row")] * 2
    assert refused[0].detail == f"{source.local}:26 has 1 cells for the 2 columns of the header"
    assert loader.locate_row(refused[0]) == f"{source.local}:26"


@json_lines
def test_a_compressed_file_is_another_than_the_plain_one(source: Source) -> None:
    state = source.state()
    write_gz(source.local.with_name("a.jsonl.gz"), ROWS)
    source.path += ".gz"
    assert source.refusal(state).startswith("data.sources[0].files[0].name: 'a.jsonl' -> 'a.jsonl.gz'")
