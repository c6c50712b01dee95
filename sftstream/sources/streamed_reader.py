"""Read the rows of a streamed source for one logical stream."""

from __future__ import annotations

from collections.abc import Iterator

from sftstream.records import BrokenRow, RawRow, Ref
from sftstream.sources.rows import ReadRow
from sftstream.sources.streamed import StreamedSource


class StreamedReader:
    """Reads rows of a streamed source by number, for one logical stream.

    A file can only be read from its beginning to its end, so a step backwards opens it again. After
    a resume, `expect` announces the rows that the state refers to. When the reader passes an
    announced row, it keeps the row in memory, undecoded, until `read` asks for it. So a resume
    reads a file once for all its announced rows, and perhaps a second time to continue in the file.
    """

    def __init__(self, source: StreamedSource) -> None:
        self.source = source
        self._rows: Iterator[ReadRow] = iter(())
        self._file = self._next = -1
        self._kept: dict[Ref, list[RawRow | BrokenRow]] = {}
        self._expected: dict[int, dict[int, list[Ref]]] = {}  # file -> index of the row -> references

    def expect(self, ref: Ref) -> None:
        """Announce one later `read` of a row, because a loaded state refers to the row."""
        file, index = self.source.file_and_index(ref.row)
        self._expected.setdefault(file, {}).setdefault(index, []).append(ref)

    def reaches(self, ref: Ref) -> bool:
        """Return True if the row exists; False if the file ends before the row."""
        if ref not in self._kept:
            self._seek(ref)
        return ref in self._kept

    def read(self, ref: Ref) -> RawRow:
        """Return a row as stored. A row can be read once, and once more for each announcement.

        Raises BrokenRow if the row is unreadable, and RuntimeError if the source has changed.
        """
        if not self.reaches(ref):
            raise RuntimeError(
                f"{self.source.locate_row(ref.row)} is no longer there: the source changed; restore the source"
            )
        content = self._kept[ref].pop()
        if not self._kept[ref]:
            del self._kept[ref]
        if isinstance(content, BrokenRow):
            raise content
        return content

    def _seek(self, ref: Ref) -> None:
        file, index = self.source.file_and_index(ref.row)
        expected = self._expected.get(file, {})
        first, last = min([index, *expected]), max([index, *expected])
        if file != self._file or index < self._next:
            self._file = file
            self._next, self._rows = self.source.open(file, first)
        while self._next <= last and (row := next(self._rows, None)) is not None:
            wanted = expected.pop(self._next, [])
            if self._next == index and ref not in wanted:  # the announcement may be for another epoch
                wanted.append(ref)
            if wanted:
                with self.source.door:
                    content = _read(row)
                for wanted_ref in wanted:
                    self._kept.setdefault(wanted_ref, []).append(content)
            self._next += 1


def _read(row: ReadRow) -> RawRow | BrokenRow:
    try:
        return row()
    except BrokenRow as broken:
        return broken
