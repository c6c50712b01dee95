"""All sources of a config as numbered rows."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any

from sftstream.config import SourceConfig
from sftstream.records import Ref
from sftstream.sources.resolve import open_source
from sftstream.sources.rows import PLAIN, Decode, FileIdentity, RowFile, renamed
from sftstream.sources.shard_reader import ShardReader
from sftstream.sources.streamed import StreamedSource


class FileSet:
    """The files of one source, one after the other: any row at any time."""

    def __init__(self, source: SourceConfig) -> None:
        self.files = open_source(source)
        self.shards = tuple(len(file) for file in self.files)
        self._path = source.path
        self._columns = source.columns
        self._ends = list(accumulate(self.shards))
        if not len(self):
            raise ValueError(f"source {source.path!r} holds no row; remove it or name a file with conversations")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def identities(self) -> tuple[FileIdentity, ...]:
        """What the files held when they were opened."""
        return tuple(file.identity for file in self.files)

    def read(self, row: int, decode: Decode = PLAIN) -> Any:
        """The row, by `decode` where it is JSON and no column has another name; raises `BrokenRow`."""
        file, local = self._file_and_row(row)
        if self._columns is None:
            return file.read(local, decode)
        return renamed(file.read(local), self._columns, file, local)

    def locate_row(self, row: int) -> str:
        file, local = self._file_and_row(row)
        return file.locate_row(local)

    def _file_and_row(self, row: int) -> tuple[RowFile, int]:
        index = bisect_right(self._ends, row)
        if index == len(self.files):
            raise RuntimeError(f"row {row} of {self._path!r} is no longer there: it has {len(self)} rows; restore it")
        return self.files[index], row - (self._ends[index - 1] if index else 0)


class Corpus:
    """Every source of a config, opened once for all streams of a process."""

    def __init__(self, sources: tuple[SourceConfig, ...]) -> None:
        self.sources = [StreamedSource(source) if source.streaming else FileSet(source) for source in sources]

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """Rows of each source, None of one that is streamed."""
        return tuple(len(source) if isinstance(source, FileSet) else None for source in self.sources)

    def locate_row(self, source: int, row: int) -> str:
        """Where an editor finds the row."""
        return self.sources[source].locate_row(row)


class CorpusReader:
    """A corpus as one stream reads it: where sources are streamed, with a place in each. `decode` makes rows of JSON."""

    def __init__(self, corpus: Corpus, decode: Decode = PLAIN) -> None:
        self.sources: list[FileSet | ShardReader] = [
            ShardReader(source, decode) if isinstance(source, StreamedSource) else source for source in corpus.sources
        ]
        self._decode = decode

    def expect(self, ref: Ref) -> None:
        """This row was read before the state was taken, and will be read again."""
        source = self.sources[ref.source]
        if isinstance(source, ShardReader):
            source.expect(ref)

    def read(self, ref: Ref) -> Any:
        """The decoded row, of a streamed source once; raises `BrokenRow`."""
        source = self.sources[ref.source]
        return source.read(ref) if isinstance(source, ShardReader) else source.read(ref.row, self._decode)
