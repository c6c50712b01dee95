"""Cached files are private, are what their names say, and are made by one process while others are told."""

from __future__ import annotations

import gzip
import logging
import multiprocessing
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sftstream import SourceConfig, cache
from sftstream.cache import Unwritable, cached, found
from sftstream.sources.corpus import FileSet

KEY = "ab" * 32


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFTSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ab" / KEY


def made(content: bytes = b"words") -> Path:
    return cached(KEY, ".x", lambda: [content])


def test_a_cached_file_and_its_folders_are_the_users_alone(folder: Path) -> None:
    os.umask(os.umask(0))
    path = made()
    assert path.read_bytes() == b"words"
    modes = {entry: stat.S_IMODE(entry.stat().st_mode) for entry in (folder.parent, folder, path, folder / "lock")}
    assert list(modes.values()) == [0o700, 0o700, 0o600, 0o600]
    folder.chmod(0o777)  # as left by an earlier version
    assert made() == path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("planted", [b"sword", b"words and more", b""])
def test_a_planted_file_is_made_again(planted: bytes) -> None:
    path = made()
    path.write_bytes(planted)
    assert found(KEY, ".x") is None
    assert made().read_bytes() == b"words"


def test_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    path = made()
    other = tmp_path / "other"
    other.write_bytes(b"words")
    path.unlink()
    path.symlink_to(other)
    assert found(KEY, ".x") is None
    path.unlink()
    (folder / "lock").unlink()
    (folder / "lock").symlink_to(other)
    with pytest.raises(Unwritable, match=r"^the cache .* cannot be written: Too many levels of symbolic links; "):
        made()


def test_a_cache_in_the_home_of_a_user_without_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTSTREAM_CACHE", "~nobody of this name/cache")
    with pytest.raises(Unwritable) as error:
        made()
    assert str(error.value) == (
        "the cache ~nobody of this name/cache has no place, since the user has no home directory; set SFTSTREAM_CACHE to "
        "a directory"
    )


def test_a_folder_that_is_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache").mkdir()
    folder.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unwritable) as error:
        made()
    assert str(error.value) == (
        f"the cache holds {folder.parent}, which is a link or belongs to another user; remove {folder.parent}, or set "
        "SFTSTREAM_CACHE to a directory of your own"
    )
    assert found(KEY, ".x") is None
    folder.parent.unlink()
    assert made().read_bytes() == b"words"


def test_a_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert found(KEY, ".x") is None
    with pytest.raises(Unwritable, match=rf"^the cache holds {folder.parent}, which is a link or belongs to another"):
        made()


def test_a_large_file_is_read_again_only_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "READ_UP_TO", 3)
    digest, read = cache._digest, []
    monkeypatch.setattr(cache, "_digest", lambda file: read.append(file) or digest(file))

    def opened_by_a_new_process() -> Path | None:
        cache._checked.clear()
        return found(KEY, ".x")

    path = made()
    assert opened_by_a_new_process() == path
    assert read == []
    os.utime(path, (1, 1))
    assert opened_by_a_new_process() == path
    assert opened_by_a_new_process() == path
    assert read == [path]
    path.write_bytes(b"sword")
    os.utime(path, (1, 1))
    assert opened_by_a_new_process() is None


def test_a_small_file_is_read_once_by_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    digest, read = cache._digest, []
    monkeypatch.setattr(cache, "_digest", lambda file: read.append(file) or digest(file))
    path = made()
    cache._checked.clear()
    for _ in range(3):
        assert found(KEY, ".x") == path
    assert read == [path]


def test_a_wait_for_another_process_is_said_after_a_second(caplog: pytest.LogCaptureFixture, folder: Path) -> None:
    def slow() -> Iterator[bytes]:
        time.sleep(1.8)
        yield b"words"

    other = multiprocessing.get_context("fork").Process(target=cached, args=(KEY, ".x", slow))
    other.start()
    while not list(folder.glob("*.partial")):
        time.sleep(0.01)
    with caplog.at_level(logging.WARNING):
        assert cached(KEY, ".x", lambda: [b"other"]).read_bytes() == b"words"
    other.join()
    assert [record.message for record in caplog.records] == [
        f"waiting for process {other.pid}, which makes a file in {folder}"
    ]


def test_a_short_wait_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made()
    assert caplog.records == []


def test_a_decoded_copy_with_other_words_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"1\n2\n"))
    source = SourceConfig(path=str(path))
    FileSet(source)
    (copy,) = (tmp_path / "cache").rglob("*.unpacked")
    copy.write_bytes(b"3\n4\n")
    assert [FileSet(source).read(row).strip() for row in range(2)] == [b"1", b"2"]
