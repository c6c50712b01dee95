"""Open all sources of a config, and read their rows for a logical stream."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from sftstream.config import RowSettings, SourceConfig
from sftstream.records import RawRow, Ref
from sftstream.sources.resolve import open_source, refuse_without_rows, source_door
from sftstream.sources.rows import Bookmark, FileIdentity, RowFile
from sftstream.sources.streamed import StreamedSource
from sftstream.sources.streamed_reader import StreamedReader

Bookmarks = Mapping[int, Sequence[Bookmark]]
"""Number of a streamed source -> bookmarks."""


class FileSet:
    """Rows of a source that is not streamed, numbered through all its files in order.

    `file_sizes` holds the number of rows of each file. Example: files of 3 and 2 rows have the row
    numbers 0 to 2 and 3 to 4. Raises ValueError if the source holds no row.
    """

    def __init__(self, source: SourceConfig) -> None:
        self.files = open_source(source)
        self.file_sizes = tuple(len(file) for file in self.files)
        self._path = source.path
        self.door = source_door(source)
        self.settings: RowSettings = source
        self._ends = list(accumulate(self.file_sizes))
        if not len(self):
            refuse_without_rows(source)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def identities(self) -> tuple[FileIdentity, ...]:
        """Identities of the files when they were opened."""
        return tuple(file.identity for file in self.files)

    def read(self, row: int) -> RawRow:
        """Return a row as stored; raises BrokenRow if unreadable."""
        file, local = self._file_and_row(row)
        return file.read(local)

    def locate_row(self, row: int) -> str:
        """Return the row's location for messages and editors: `path:line` or `path[index]`."""
        file, local = self._file_and_row(row)
        return file.locate_row(local)

    def require_intact(self, row: int) -> None:
        """Raise RuntimeError if a row is broken by a damaged row index or a changed file."""
        file, local = self._file_and_row(row)
        file.require_intact(local)

    def require_unchanged(self, rows: Iterable[int]) -> None:
        """Raise RuntimeError if the content of a file with one of the rows has changed."""
        for index in {bisect_right(self._ends, row) for row in rows} if len(self.files) > 1 else (0,):
            self.files[index].require_unchanged()

    def _file_and_row(self, row: int) -> tuple[RowFile, int]:
        index = bisect_right(self._ends, row)
        if index == len(self.files):
            raise RuntimeError(
                f"row {row} of {self._path!r} is no longer there: the source has {len(self)} rows; restore the source"
            )
        return self.files[index], row - (self._ends[index - 1] if index else 0)


class Corpus:
    """All sources of a config, opened once for all logical streams of a process.

    Raises ValueError if a source holds no row.
    """

    def __init__(self, sources: tuple[SourceConfig, ...]) -> None:
        self.sources = [StreamedSource(source) if source.streaming else FileSet(source) for source in sources]
        for source, opened in zip(sources, self.sources, strict=True):
            if isinstance(opened, StreamedSource) and not opened.has_row():
                refuse_without_rows(source)

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """Number of rows of each source; None if streamed."""
        return tuple(len(source) if isinstance(source, FileSet) else None for source in self.sources)

    def locate_row(self, source: int, row: int) -> str:
        """Return a row's location for messages and editors."""
        return self.sources[source].locate_row(row)


class CorpusReader:
    """Reads the rows of all sources for one logical stream.

    Each reader has its own positions in streamed sources. `settings` holds for each source the
    settings of `formats.parse_row`.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.sources: list[FileSet | StreamedReader] = [
            StreamedReader(source) if isinstance(source, StreamedSource) else source for source in corpus.sources
        ]
        self.settings = [source.settings for source in corpus.sources]
        self._corpus = corpus

    def expect(self, ref: Ref) -> None:
        """Announce that a row will be read again, because a loaded state refers to it."""
        source = self.sources[ref.source]
        if isinstance(source, StreamedReader):
            source.expect(ref)

    def remember(self, bookmarks: Bookmarks) -> None:
        """Add the bookmarks of a loaded state, from which announced rows are reached soon."""
        for number, of_source in bookmarks.items():
            source = self.sources[number]
            if isinstance(source, StreamedReader):
                source.remember(of_source)

    def bookmarks(self, refs: Sequence[Ref]) -> Bookmarks:
        """Return the bookmarks of streamed sources from which the rows `refs` can be reached.

        All rows must have been read. Bookmarks of earlier rows are forgotten.
        """
        found: dict[int, tuple[Bookmark, ...]] = {}
        for number, source in enumerate(self.sources):
            if isinstance(source, StreamedReader) and (
                of_source := source.bookmarks(ref for ref in refs if ref.source == number)
            ):
                found[number] = of_source
        return found

    def read(self, ref: Ref) -> RawRow:
        """Return a row as stored; raises BrokenRow if unreadable.

        A row of a streamed source can be read once, and once more for each announcement.
        """
        source = self.sources[ref.source]
        if isinstance(source, StreamedReader):
            return source.read(ref)
        with source.door:
            return source.read(ref.row)

    def require_unchanged(self, refs: Sequence[Ref]) -> None:
        """Raise RuntimeError if the content of a file with one of the rows has changed.

        Compares size, times and inode of each file: a microsecond a file. A file that was only
        touched is read, and goes on.
        """
        for number in {ref.source for ref in refs}:
            source = self.sources[number]
            files = source.source if isinstance(source, StreamedReader) else source
            files.require_unchanged(ref.row for ref in refs if ref.source == number)

    def locate_broken(self, ref: Ref) -> str:
        """Return the location of a broken row.

        Raises RuntimeError if the row is broken by a damaged row index or a changed file.
        """
        source = self.sources[ref.source]
        if isinstance(source, FileSet):
            source.require_intact(ref.row)
        return self._corpus.locate_row(ref.source, ref.row)
