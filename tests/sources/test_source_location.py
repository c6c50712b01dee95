"""A path leads to files in finite time: no pipe, no device, no search of the whole machine."""

from __future__ import annotations

import glob
import os
import socket
from pathlib import Path

import pytest

from sftstream import SourceConfig
from sftstream.sources import location
from sftstream.sources.location import LocalLocation
from sftstream.sources.resolve import resolve


def found(pattern: Path) -> list[str]:
    return [file.display_name for file in LocalLocation(pattern).matches([])]


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "socket"])
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = tmp_path / "x.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # since the name of a socket has at most 107 bytes
        socket.socket(socket.AF_UNIX).bind(path.name)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r".") as error:
        resolve(SourceConfig(path=str(path)))
    assert str(error.value) == (
        f"{path} is neither a file nor a directory but a pipe, a socket or a device, and can be read once or without "
        "end; write its content to a file"
    )


def test_a_pipe_among_the_matches_of_a_glob_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("1\n")
    os.mkfifo(tmp_path / "b.jsonl")
    assert found(tmp_path / "*.jsonl") == [str(tmp_path / "a.jsonl")]


def test_a_deep_glob_finds_what_python_finds(tmp_path: Path) -> None:
    for name in ("a.jsonl", "x/a.jsonl", "x/y/a.jsonl", "x/y/b.json", ".h/a.jsonl", "x/.a.jsonl", "[z]/a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    (tmp_path / "linked").symlink_to(tmp_path / "x" / "y")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for pattern in ("**", "**/*", "**/*.jsonl", "x/**/a.jsonl", "**/y/*", "**/**/*.json", "*/**/*.jsonl", "**/x/**"):
        expected = {name for name in glob.glob(str(tmp_path / pattern), recursive=True) if Path(name).is_file()}
        assert found(tmp_path / pattern) == sorted(expected, key=Path), pattern


def test_a_link_to_a_directory_above_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jsonl").write_text("1\n")
    (tmp_path / "x" / "up").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    assert found(tmp_path / "**" / "*.jsonl") == [str(tmp_path / "x" / "a.jsonl")]


def test_a_glob_over_the_whole_machine_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "_MOST_ENTRIES", 1000)
    with pytest.raises(ValueError, match=r".") as error:
        resolve(SourceConfig(path="/**/*.jsonl"))
    assert str(error.value) == (
        "/**/*.jsonl leads to more than 1,000 files and directories; name a directory nearer to the files"
    )
