"""All sources of a config as numbered rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from sftstream.config import SourceConfig
from sftstream.sources.resolve import open_source
from sftstream.sources.rows import BrokenRow, FileIdentity, RowFile


class FileSet:
    """The files of one source, one after the other."""

    def __init__(self, source: SourceConfig) -> None:
        self.files = open_source(source)
        self._columns = source.columns
        self._ends = list(accumulate(len(file) for file in self.files))
        if not len(self):
            raise ValueError(f"source {source.path!r} holds no row; remove it or name a file with conversations")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, row: int) -> Any:
        file, local = self._locate(row)
        content = file.read(local)
        if self._columns is None or not isinstance(content, Mapping):
            return content
        renamed = {name: content[column] for name, column in self._columns.items() if column in content}
        if not renamed:
            wanted, found = sorted(self._columns.values()), sorted(map(str, content))
            raise BrokenRow(f"{file.place(local)} has none of the columns {wanted}; it has {found}")
        return renamed

    def place(self, row: int) -> str:
        file, local = self._locate(row)
        return file.place(local)

    def _locate(self, row: int) -> tuple[RowFile, int]:
        index = bisect_right(self._ends, row)
        return self.files[index], row - (self._ends[index - 1] if index else 0)


class Corpus:
    """`read(source, row)` for every row of every source."""

    def __init__(self, sources: tuple[SourceConfig, ...]) -> None:
        self.sources = [FileSet(source) for source in sources]
        self.sizes = tuple(len(source) for source in self.sources)

    def read(self, source: int, row: int) -> Any:
        """The decoded row; raises `BrokenRow`."""
        return self.sources[source].read(row)

    def place(self, source: int, row: int) -> str:
        """Where an editor finds the row."""
        return self.sources[source].place(row)

    def identities(self) -> tuple[tuple[FileIdentity, ...], ...]:
        """Per source, what its files held when they were opened."""
        return tuple(tuple(file.identity for file in source.files) for source in self.sources)
