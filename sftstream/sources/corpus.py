"""All sources of a config as numbered rows."""

from __future__ import annotations

import glob
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

from sftstream.config import SourceConfig
from sftstream.sources.json_array import JsonArray
from sftstream.sources.jsonl import JsonLines
from sftstream.sources.parquet import Parquet
from sftstream.sources.rows import BOM, FileIdentity, RowFile, identify

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")


class FileSet:
    """The files of one source, one after the other."""

    def __init__(self, path: str) -> None:
        self.files = [_open(file) for file in _expand(path)]
        self._ends = list(accumulate(len(file) for file in self.files))
        if not len(self):
            raise ValueError(f"source {path!r} holds no row; remove it or name a file with conversations")

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, row: int) -> Any:
        file, local = self._locate(row)
        return file.read(local)

    def place(self, row: int) -> str:
        file, local = self._locate(row)
        return file.place(local)

    def _locate(self, row: int) -> tuple[RowFile, int]:
        index = bisect_right(self._ends, row)
        return self.files[index], row - (self._ends[index - 1] if index else 0)


class Corpus:
    """`read(source, row)` for every row of every source."""

    def __init__(self, sources: tuple[SourceConfig, ...]) -> None:
        self.sources = [FileSet(source.path) for source in sources]
        self.sizes = tuple(len(source) for source in self.sources)

    def read(self, source: int, row: int) -> Any:
        """The decoded row; raises `BrokenRow`."""
        return self.sources[source].read(row)

    def place(self, source: int, row: int) -> str:
        """Where an editor finds the row."""
        return self.sources[source].place(row)

    def identities(self) -> tuple[tuple[FileIdentity, ...], ...]:
        """Per source, what its files hold. Reads them once."""
        return tuple(tuple(identify(file.path) for file in source.files) for source in self.sources)


def _expand(path: str) -> list[Path]:
    literal = Path(path).expanduser()
    if literal.is_file():
        return [literal]
    if literal.is_dir():
        raise ValueError(f"source {path!r} is a directory; name its files by a glob, like {path.rstrip('/')}/*.jsonl")
    matches = sorted(Path(match) for match in glob.glob(str(literal), recursive=True) if Path(match).is_file())
    if not matches:
        raise ValueError(f"source {path!r} matches no file (looked from {Path.cwd()}); correct the path")
    return matches


def _open(path: Path) -> RowFile:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is of no known kind {path.suffix!r}; known are {', '.join(SUFFIXES)}")
    try:
        return _reader(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def _reader(path: Path) -> RowFile:
    if path.suffix == ".parquet":
        return Parquet(path)
    if path.suffix == ".json" and _starts_with_array(path):
        return JsonArray(path)
    return JsonLines(path)


def _starts_with_array(path: Path) -> bool:
    # Many published .json files are JSON lines in truth.
    with path.open("rb") as file:
        return file.read(4096).removeprefix(BOM).lstrip().startswith(b"[")
