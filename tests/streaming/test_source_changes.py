"""What an accepted change of a source's files means, kind by kind; a change after which rows would be lost or repeated is
refused by name."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny

from sftstream import DataConfig, PackLoader, Shard, merge

ACCEPT = {"accept_changed": ("data.sources[0]",)}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for name, count in (("b", 30), ("d", 17), ("f", 9)):
        _write(tmp_path / "data" / f"{name}.jsonl", _rows(name, count))
    return tmp_path / "data"


def _rows(name: str, count: int) -> list[dict[str, Any]]:
    return [{"id": f"{name}{i}"} | row for i, row in enumerate(tiny.rows(count, seed=ord(name[0])))]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    tiny.write_jsonl(path, rows)


def _config(tokenizer: str, directory: Path, **changes: Any) -> DataConfig:
    source = {"path": f"{directory}/*.jsonl*"}
    return tiny.data_config(tokenizer, sources=[source], **({"epochs": 3} | changes))


def _given(loader: PackLoader, packs: int | None = None) -> Counter[tuple[str, int]]:
    taken = list(loader) if packs is None else tiny.take(loader, packs)
    files: Any = loader.corpus.sources[0]
    return Counter((json.loads(files.read(s.row))["id"], s.epoch) for pack in taken for s in pack.segments)


def _expected(names: list[str], epochs: range) -> Counter[tuple[str, int]]:
    return Counter((name, epoch) for name in names for epoch in epochs)


OLD = [f"{name}{i}" for name, count in (("b", 30), ("d", 17), ("f", 9)) for i in range(count)]


def _append(directory: Path) -> list[str]:
    _write(directory / "d.jsonl", _rows("d", 25))
    return [f"d{i}" for i in range(17, 25)]


def _add_first(directory: Path) -> list[str]:
    _write(directory / "a.jsonl", _rows("a", 5))
    return [f"a{i}" for i in range(5)]


def _rename(directory: Path) -> list[str]:
    (directory / "b.jsonl").rename(directory / "z.jsonl")
    return []


def _edit(directory: Path) -> list[str]:
    rows = _rows("b", 30)
    rows[::3] = [{"id": f"b{i}"} | row for i, row in zip(range(0, 30, 3), tiny.rows(10, seed=99), strict=True)]
    _write(directory / "b.jsonl", rows)
    return []


def _all_at_once(directory: Path) -> list[str]:
    return [*_append(directory), *_add_first(directory), *_rename(directory)]


@pytest.mark.parametrize("change", [_append, _add_first, _rename, _edit, _all_at_once])
@pytest.mark.parametrize("shuffle", [True, False, "shards"])
@pytest.mark.parametrize("packs", [4, 20])
def test_old_rows_come_once_in_each_epoch_and_new_rows_from_the_next_epoch_on(
    tokenizer: str, directory: Path, change: Any, shuffle: Any, packs: int
) -> None:
    first = PackLoader(_config(tokenizer, directory, shuffle=shuffle))
    before = _given(first, packs)
    state = first.state_dict()
    begun = max(epoch for _, epoch in before)
    new = change(directory)
    loader = PackLoader(_config(tokenizer, directory, shuffle=shuffle, **ACCEPT), state=state)
    total = loader.total_rows
    given = before + _given(loader)
    assert set(given.values()) == {1}
    assert _expected(OLD, range(3)) <= given
    added = {(name, epoch) for name, epoch in given if name in new}
    # The next epoch is the first that no stream has begun; streams read a window ahead of their packs.
    starts = {epoch for _, epoch in added}
    assert added == {(name, epoch) for name in new for epoch in range(min(starts, default=3), 3)}
    assert not added or begun < min(starts) <= begun + 2
    assert total == len(given)


def test_a_run_after_two_changes_resumes_exactly_on_any_topology(tokenizer: str, directory: Path) -> None:
    loader = PackLoader(_config(tokenizer, directory))
    given = _given(loader, 8)
    _append(directory)
    loader = PackLoader(_config(tokenizer, directory, **ACCEPT), state=loader.state_dict())
    given += _given(loader, 4)
    _add_first(directory)
    loader = PackLoader(_config(tokenizer, directory, **ACCEPT), state=loader.state_dict())
    given += _given(loader, 4)
    state = json.loads(json.dumps(loader.state_dict()))
    whole = [pack.digest() for pack in loader]
    config = _config(tokenizer, directory)
    assert tiny.digests(PackLoader(config, state=state, workers=2)) == whole
    halves = [PackLoader(config, state=state, shard=Shard(index, 2)).state_dict() for index in range(2)]
    assert merge(halves) == state
    del halves[1]["past_orders"]
    with pytest.raises(ValueError, match="state 1 has other past orders of rows than state 0; merge states of one run"):
        merge([halves[0], tiny.resealed(halves[1])])
    given += _given(PackLoader(config, state=state))
    assert set(given.values()) == {1}
    assert _expected(OLD, range(3)) <= given


def test_files_that_change_before_the_first_row_is_drawn_are_read_as_in_a_new_run(
    tokenizer: str, directory: Path
) -> None:
    state = PackLoader(_config(tokenizer, directory)).state_dict()
    new = _all_at_once(directory)
    given = _given(PackLoader(_config(tokenizer, directory, **ACCEPT), state=state))
    assert given == _expected([*OLD, *new], range(3))


def test_a_line_without_an_end_may_be_ended_by_the_appended_bytes_only(tokenizer: str, directory: Path) -> None:
    path = directory / "d.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    loader = PackLoader(_config(tokenizer, directory))
    before, state = _given(loader, 8), loader.state_dict()
    more = tiny.json_lines(_rows("d", 20)[17:])
    path.write_bytes(path.read_bytes() + b"\n" + more)
    given = before + _given(PackLoader(_config(tokenizer, directory, **ACCEPT), state=state))
    assert set(given.values()) == {1}
    assert _expected(OLD, range(3)) <= given


def _remove_rows(directory: Path) -> None:
    _write(directory / "d.jsonl", _rows("d", 16))


def _insert_rows(directory: Path) -> None:
    _write(directory / "d.jsonl", [*_rows("x", 2), *_rows("d", 17)])


def _remove_a_file(directory: Path) -> None:
    (directory / "d.jsonl").unlink()


def _replace_a_file(directory: Path) -> None:
    _remove_a_file(directory)
    _add_first(directory)


def _edit_two_files(directory: Path) -> None:
    _edit(directory)
    _insert_rows(directory)


def _go_on_in_the_last_line(directory: Path) -> None:
    path = directory / "d.jsonl"
    path.write_bytes(path.read_bytes()[:-1] + b" " + tiny.json_lines(_rows("x", 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove_rows, r"'d.jsonl' lost rows \(17 rows before, 16 now\)"),
        (_insert_rows, r"'d.jsonl' grew, but not at its end alone \(17 rows before, 19 now\)"),
        (_go_on_in_the_last_line, r"'d.jsonl' grew, but not at its end alone \(17 rows before, 18 now\)"),
        (_remove_a_file, r"'d.jsonl' is gone, with rows that were drawn or are still to come; restore the file"),
        (_replace_a_file, r"'d.jsonl' is gone"),
        (_edit_two_files, r"'b.jsonl', 'd.jsonl' changed inside, and the state has only the sum of their rows"),
    ],
)
def test_a_change_that_would_lose_or_repeat_rows_is_refused_by_name(
    tokenizer: str, directory: Path, change: Any, message: str
) -> None:
    loader = PackLoader(_config(tokenizer, directory))
    tiny.take(loader, 8)
    change(directory)
    with pytest.raises(ValueError, match=rf"data.sources\[0\]: {message}"):
        PackLoader(_config(tokenizer, directory, **ACCEPT), state=loader.state_dict())


def test_rows_appended_to_a_compressed_file_are_refused(tokenizer: str, directory: Path) -> None:
    path = directory / "g.jsonl.gz"
    path.write_bytes(gzip.compress(tiny.json_lines(_rows("g", 4))))
    loader = PackLoader(_config(tokenizer, directory))
    tiny.take(loader, 8)
    path.write_bytes(path.read_bytes() + gzip.compress(tiny.json_lines(_rows("g", 7)[4:])))
    with pytest.raises(ValueError, match=r"'g.jsonl.gz' grew, but not at its end alone \(4 rows before, 7 now\)"):
        PackLoader(_config(tokenizer, directory, **ACCEPT), state=loader.state_dict())


def test_shards_of_a_streamed_source_may_be_renamed_and_nothing_else(tokenizer: str, directory: Path) -> None:
    source = {"path": str(directory), "streaming": True, "shuffle": "shards"}
    config = tiny.data_config(tokenizer, sources=[source])
    loader = PackLoader(config)
    tiny.take(loader, 8)
    state, rest = loader.state_dict(), tiny.digests(loader)
    accept = tiny.data_config(tokenizer, sources=[source], accept_changed=("data.sources[0]",))
    (directory / "d.jsonl").rename(directory / "e.jsonl")
    given = [s.ref for pack in PackLoader(accept, state=state) for s in pack.segments]
    assert len(given) == len(set(given))
    assert rest
    _add_first(directory)
    with pytest.raises(
        ValueError, match=r"a change of data.sources\[0\].shards cannot be accepted, since it decides the order of rows"
    ):
        PackLoader(accept, state=state)
