"""A file that is edited in place ends the run by name, also between the samples; a touched file goes on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny

from sftstream import DataConfig, PackLoader, cache, describe, merge
from sftstream.sources import rows as rows_module
from sftstream.sources import stored as stored_module
from sftstream.streaming.assignment import Shard

ROWS = tiny.rows(200)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTSTREAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files above 1,000 bytes be sampled, by four slices of 100 bytes."""
    monkeypatch.setattr(rows_module, "SAMPLED_ABOVE", 1000)
    monkeypatch.setattr(rows_module, "_BLOCK", 100)
    monkeypatch.setattr(rows_module, "_BLOCKS", 4)


def write_arrow(path: Path, rows: list[Any]) -> str:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return str(path)


def config(tokenizer: str, path: str, **source: Any) -> DataConfig:
    return tiny.data_config(tokenizer, sources=[{"path": path, **source}], epochs=4)


def edit(path: Path) -> None:
    """Replace a letter in the middle, where no sample is, and restore the time of modification."""
    before, content = path.stat(), path.read_bytes()
    at = next(at for at in range(len(content) // 2, len(content)) if content[at : at + 1].isalpha())
    letter = b"x" if content[at : at + 1] != b"x" else b"y"
    with path.open("r+b") as file:
        file.seek(at)
        file.write(letter)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.read_bytes() != content
    assert path.stat().st_size == len(content)


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def known(loader: PackLoader) -> Any:
    return loader.state_dict().get("full_digests")


def state_in_full(config: DataConfig) -> dict[str, Any]:
    """A state after four packs, with the digests of all bytes."""
    loader = PackLoader(config)
    tiny.take(loader, 4)
    until(lambda: known(loader))
    return loader.state_dict()


def read_on(loader: PackLoader) -> str:
    with pytest.raises((ValueError, RuntimeError)) as error:
        for _ in loader:
            pass
    return str(error.value)


WAYS: dict[str, tuple[str, Callable[[Path, Any], str], dict[str, Any]]] = {
    "by number": ("a.jsonl", tiny.write_jsonl, {}),
    "mapped": ("a.arrow", write_arrow, {}),
    "streamed": ("a.jsonl", tiny.write_jsonl, {"streaming": True, "shuffle": False}),
}


@pytest.fixture(params=WAYS)
def written(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: str) -> DataConfig:
    name, write, fields = WAYS[request.param]
    return config(tokenizer, write(tmp_path / name, ROWS), **fields)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_edit_while_the_file_is_read_ends_the_run_by_name(written: DataConfig, workers: int) -> None:
    loader = PackLoader(written, workers=workers)
    tiny.take(loader, 4)
    path = Path(written.sources[0].path)
    edit(path)
    assert f"{path} changed while it was read; restore the file, or start again" in read_on(loader)


@pytest.mark.parametrize("touch", ["times", "mode", "rewritten", "replaced"])
def test_a_touched_file_goes_on(written: DataConfig, touch: str) -> None:
    path = Path(written.sources[0].path)
    expected = tiny.digests(PackLoader(written))
    loader = PackLoader(written)
    packs = tiny.take(loader, 4)
    if touch == "times":
        path.touch()
    elif touch == "mode":
        path.chmod(0o600)
    elif touch == "rewritten":
        path.write_bytes(path.read_bytes())
    else:
        other = path.with_name("other")
        other.write_bytes(path.read_bytes())
        other.replace(path)
    assert tiny.digests([*packs, *loader]) == expected


@pytest.mark.usefixtures("sampled")
def test_the_first_run_reads_large_files_in_full_beside_the_packs(written: DataConfig) -> None:
    loader = PackLoader(written)
    assert "1 of 1 files sampled, not yet read in full" in describe(loader.state_dict())
    assert "full_digests" not in loader.state_dict()
    tiny.take(loader, 4)
    until(lambda: known(loader))
    path = Path(written.sources[0].path)
    assert known(loader) == {"0": {"0": rows_module.identify(path, full=True).sha256}}
    assert "sampled" not in describe(loader.state_dict())
    assert loader.state.identity.sources[0].files[0].sampled


@pytest.mark.usefixtures("sampled")
def test_an_edit_between_the_samples_is_refused_by_a_resume(written: DataConfig) -> None:
    path = Path(written.sources[0].path)
    state = state_in_full(written)
    sample = rows_module.identify(path)
    before = rows_module.identify(path, full=True).sha256
    edit(path)
    assert rows_module.identify(path) == sample
    after = rows_module.identify(path, full=True).sha256
    with pytest.raises(ValueError, match=r"^the state was taken from other data or settings") as error:
        PackLoader(written, state=state)
    assert f"data.sources[0].files[0].sha256: {before!r} -> {after!r}" in str(error.value)


@pytest.mark.usefixtures("sampled")
def test_an_accepted_edit_between_the_samples_is_on_record(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "a.jsonl"
    run = config(tokenizer, tiny.write_jsonl(path, ROWS))
    state = state_in_full(run)
    edit(path)
    accepting = tiny.data_config(tokenizer, sources=[{"path": str(path)}], epochs=4, accept_changed=["data.sources[0]"])
    loader = PackLoader(accepting, state=state)
    (change,) = loader.state.history
    assert change.differences[0].startswith("data.sources[0].files[0].sha256: ")
    assert known(loader) == {"0": {"0": rows_module.identify(path, full=True).sha256}}


@pytest.mark.usefixtures("sampled")
def test_a_resume_reads_an_untouched_file_once_a_machine(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    run = config(tokenizer, tiny.write_jsonl(path, ROWS))
    state = state_in_full(run)
    read, digest = [], stored_module._digest
    monkeypatch.setattr(stored_module, "_digest", lambda *given: read.append(1) or digest(*given))
    for _ in range(2):
        PackLoader(run, state=state)
    assert read == []
    path.touch()
    for _ in range(2):
        PackLoader(run, state=state)
    assert read == [1]


@pytest.mark.usefixtures("sampled")
def test_an_edit_between_the_samples_ends_a_run_that_knows_all_bytes(written: DataConfig) -> None:
    loader = PackLoader(written)
    tiny.take(loader, 4)
    until(lambda: known(loader))
    path = Path(written.sources[0].path)
    edit(path)
    assert f"{path} changed while it was read; restore the file, or start again" in read_on(loader)


@pytest.mark.usefixtures("sampled")
def test_a_file_touched_after_all_bytes_are_known_goes_on(written: DataConfig) -> None:
    expected = tiny.digests(PackLoader(written))
    loader = PackLoader(written)
    packs = tiny.take(loader, 4)
    until(lambda: known(loader))
    Path(written.sources[0].path).touch()
    assert tiny.digests([*packs, *loader]) == expected


@pytest.mark.usefixtures("sampled")
def test_a_file_touched_before_all_bytes_are_known_ends_the_run(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftstream.sources.full_digests.FullDigests.start", lambda _: None)
    path = tmp_path / "a.jsonl"
    loader = PackLoader(config(tokenizer, tiny.write_jsonl(path, ROWS)))
    tiny.take(loader, 4)
    path.touch()
    assert read_on(loader) == (
        f"{path} was touched or changed before the digest of all its bytes was known, so nobody can tell if its content "
        "is the same; restore the file, or start again"
    )


@pytest.mark.usefixtures("sampled")
def test_a_parquet_file_is_read_in_full_although_a_copy_gives_the_rows(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "a.parquet"
    run = config(tokenizer, tiny.write_parquet(path, ROWS))
    state = state_in_full(run)
    assert state["full_digests"] == {"0": {"0": rows_module.identify(path, full=True).sha256}}


@pytest.mark.usefixtures("sampled")
def test_shards_agree_on_all_bytes_of_a_file(tmp_path: Path, tokenizer: str) -> None:
    run = config(tokenizer, tiny.write_jsonl(tmp_path / "a.jsonl", ROWS))
    loaders = [PackLoader(run, shard=Shard(index, 2)) for index in range(2)]
    for loader in loaders:
        tiny.take(loader, 4)
    until(lambda: known(loaders[0]) and known(loaders[1]))
    states = [loader.state_dict() for loader in loaders]
    without = tiny.resealed({key: value for key, value in states[0].items() if key != "full_digests"})
    assert merge([without, states[1]])["full_digests"] == states[1]["full_digests"]
    other = tiny.resealed(states[1] | {"full_digests": {"0": {"0": "0" * 64}}})
    with pytest.raises(
        ValueError, match=r"^a\.jsonl has other bytes on the machine of state 1 than on that of an earlier"
    ):
        merge([states[0], other])


@pytest.mark.usefixtures("sampled")
def test_a_closed_loader_stops_the_digests(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_module, "_BLOCK", 1)
    slow = threading.Event()
    monkeypatch.setattr(os, "setpriority", lambda *_: slow.wait(20))
    loader = PackLoader(config(tokenizer, tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)))
    tiny.take(loader, 4)
    loader.close()
    slow.set()
    until(lambda: not any(thread.name == "full digests" for thread in threading.enumerate()))
    assert known(loader) is None
    assert not list(cache.directory().rglob("*.sha256"))
