"""All sources of a config as numbered rows."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from sftstream.config import SourceConfig
from sftstream.records import RawRow, Ref
from sftstream.sources.resolve import open_source
from sftstream.sources.rows import FileIdentity, RowFile
from sftstream.sources.shard_reader import ShardReader
from sftstream.sources.streamed import StreamedSource


class FileSet:
    """The files of one source, one after the other: any row at any time."""

    def __init__(self, source: SourceConfig) -> None:
        self.files = open_source(source)
        self.shards = tuple(len(file) for file in self.files)
        self._path = source.path
        self.columns = source.columns
        self._ends = list(accumulate(self.shards))
        if not len(self):
            raise ValueError(f"source {source.path!r} holds no row; remove it or name a file with conversations")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def identities(self) -> tuple[FileIdentity, ...]:
        """What the files held when they were opened."""
        return tuple(file.identity for file in self.files)

    def read(self, row: int) -> RawRow:
        """Return a row as stored; raises BrokenRow if it cannot be read."""
        file, local = self._file_and_row(row)
        return file.read(local)

    def locate_row(self, row: int) -> str:
        file, local = self._file_and_row(row)
        return file.locate_row(local)

    def require_intact(self, row: int) -> None:
        """Raise RuntimeError if a broken row is the fault of a damaged row index or a changed file."""
        file, local = self._file_and_row(row)
        file.require_intact(local)

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
    """A corpus as one logical stream reads it, with a position of its own in each streamed source."""

    def __init__(self, corpus: Corpus) -> None:
        self.sources: list[FileSet | ShardReader] = [
            ShardReader(source) if isinstance(source, StreamedSource) else source for source in corpus.sources
        ]
        self.columns = [source.columns for source in corpus.sources]
        self._corpus = corpus

    def expect(self, ref: Ref) -> None:
        """Announce a row that was read before the state was taken, and will be read again."""
        source = self.sources[ref.source]
        if isinstance(source, ShardReader):
            source.expect(ref)

    def read(self, ref: Ref) -> RawRow:
        """Return a row as stored, of a streamed source once; raises BrokenRow if it cannot be read."""
        source = self.sources[ref.source]
        return source.read(ref) if isinstance(source, ShardReader) else source.read(ref.row)

    def locate_broken(self, ref: Ref) -> str:
        """Return the location of a row that is broken.

        Raises RuntimeError if a damaged row index or a changed file is at fault, and not the row.
        """
        source = self.sources[ref.source]
        if isinstance(source, FileSet):
            source.require_intact(ref.row)
        return self._corpus.locate_row(ref.source, ref.row)
