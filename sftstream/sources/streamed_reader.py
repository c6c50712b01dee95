"""Read the rows of a streamed source for one logical stream."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import xxhash

from sftstream.records import BrokenRow, RawRow, Ref
from sftstream.sources.rows import Bookmark, Place, ReadRow, RowsFrom
from sftstream.sources.skipping import Progress
from sftstream.sources.streamed import StreamedSource

ROWS_BETWEEN_BOOKMARKS = 1000
"""Rows of a file from one bookmark to the next. To skip them takes milliseconds."""


class StreamedReader:
    """Reads rows of a streamed source by number, for one logical stream.

    A file can only be read forward, so a step backwards opens it again, at the last bookmark before
    the row. After a resume, `remember` gives the bookmarks of the state, and `expect` announces the
    rows that the state refers to. When the reader reads the first row of a file, it also keeps all
    announced rows of the file in memory, undecoded, until `read` asks for them. So a resume reads a
    stretch of a file once for all its announced rows, and perhaps a second time to continue in the
    file.
    """

    def __init__(self, source: StreamedSource) -> None:
        self.source = source
        self._opened = RowsFrom(0, iter(()))
        self._file = self._next = -1
        self._kept: dict[Ref, list[RawRow | BrokenRow]] = {}
        self._expected: dict[int, dict[int, list[Ref]]] = {}  # file -> index of the row -> references
        self._bookmarks: dict[int, dict[int, Bookmark]] = {}  # file -> index of the row -> bookmark

    def remember(self, bookmarks: Iterable[Bookmark]) -> None:
        """Add the bookmarks of a loaded state."""
        for bookmark in bookmarks:
            self._bookmarks.setdefault(bookmark.file, {})[bookmark.row] = bookmark

    def bookmarks(self, refs: Iterable[Ref]) -> tuple[Bookmark, ...]:
        """Return the bookmarks from which the rows `refs` can be reached, and forget earlier ones.

        For each file and epoch, the last bookmark before the first of the rows is returned. Rows of
        a file's beginning need no bookmark. All rows must have been read.
        """
        first: dict[tuple[int, int], int] = {}
        for ref in refs:
            file, index = self.source.file_and_index(ref.row)
            first[file, ref.epoch] = min(index, first.get((file, ref.epoch), index))
        chosen: dict[tuple[int, int], Bookmark] = {}
        lowest: dict[int, int] = {}
        for (file, _), index in first.items():
            bookmark = self._last_before(file, index)
            row = 0 if bookmark is None else bookmark.row
            lowest[file] = min(row, lowest.get(file, row))
            if bookmark is not None:
                chosen[file, row] = bookmark
        self._bookmarks = {
            file: {row: bookmark for row, bookmark in of_file.items() if row >= lowest[file]}
            for file, of_file in self._bookmarks.items()
            if file in lowest
        }
        return tuple(chosen[at] for at in sorted(chosen))

    def expect(self, ref: Ref) -> None:
        """Announce one later `read` of a row, because a loaded state refers to the row."""
        file, index = self.source.file_and_index(ref.row)
        self._expected.setdefault(file, {}).setdefault(index, []).append(ref)

    def reaches(self, ref: Ref) -> bool:
        """Return True if the row exists; False if the file ends before the row."""
        if ref not in self._kept:
            self._keep(ref)
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

    def _keep(self, ref: Ref) -> None:
        """Read a row and all announced rows of its file, and keep them in memory."""
        file, index = self.source.file_and_index(ref.row)
        wanted = self._expected.pop(file, {})
        refs = wanted.setdefault(index, [])
        if ref not in refs:  # the announcement may be for another epoch
            refs.append(ref)
        for number in sorted(wanted):
            row = self._row(file, number)
            if row is None:
                return
            content = self._content(row)
            for wanted_ref in wanted[number]:
                self._kept.setdefault(wanted_ref, []).append(content)

    def _row(self, file: int, index: int) -> ReadRow | None:
        """Return row `index` of a file; None if the file ends before the row."""
        if file != self._file or index < self._next:
            self._open(file, index)
        elif index > self._next + ROWS_BETWEEN_BOOKMARKS:
            bookmark = self._last_before(file, index)
            if bookmark and bookmark.row > self._next + ROWS_BETWEEN_BOOKMARKS:
                self._open(file, index)
        row = self._advance()
        if self._next <= index:
            row = self._skip_to(index, row)
        return row

    def _skip_to(self, index: int, row: ReadRow | None) -> ReadRow | None:
        """Return row `index` of the open file; None if the file ends before. The last read row is
        `row`."""
        begun, progress = self._next, None
        if index - begun > ROWS_BETWEEN_BOOKMARKS:
            progress = Progress(self.source.locate_row(self.source.number(self._file, index)), index - begun, "rows")
        while row is not None and self._next <= index:
            if progress and self._next % ROWS_BETWEEN_BOOKMARKS == 0:
                progress.report(self._next - begun)
            row = self._advance()
        return row

    def _open(self, file: int, index: int) -> None:
        """Open a file at the last bookmark before row `index`, or else at its beginning."""
        bookmark = self._last_before(file, index)
        self._file = file
        if bookmark is None:
            self._opened = self.source.open(file, index)
        else:
            self._opened = self.source.open(file, bookmark.row, Place(bookmark.offset, bookmark.skipped))
        self._next = self._opened.first

    def _last_before(self, file: int, index: int) -> Bookmark | None:
        """Return the last bookmark of a file before row `index`, or of the row itself."""
        of_file = self._bookmarks.get(file, {})
        last = max((row for row in of_file if row <= index), default=None)
        return None if last is None else of_file[last]

    def _advance(self) -> ReadRow | None:
        """Return the next row of the open file; None at its end."""
        number = self._next
        if number % ROWS_BETWEEN_BOOKMARKS == 0 or number == self._opened.first:
            row = self._advance_over_bookmark()
        else:
            row = next(self._opened.rows, None)
        if row is not None:
            self._next = number + 1
        return row

    def _advance_over_bookmark(self) -> ReadRow | None:
        """Return the next row, and make a bookmark of it.

        Raises RuntimeError if the row has a bookmark, and is another row than at that time.
        """
        number, of_file = self._next, self._bookmarks.get(self._file, {})
        place = self._opened.place() if self._opened.place else None
        row = next(self._opened.rows, None)
        if number not in of_file and (not number or place is None or number % ROWS_BETWEEN_BOOKMARKS):
            return row
        digest = None if row is None else _digest(self._content(row), number)
        if number in of_file:
            self._require_same(of_file[number], digest)
        elif digest is not None and place is not None:
            self.remember([Bookmark(self._file, number, *place, digest)])
        return row

    def _require_same(self, bookmark: Bookmark, digest: int | None) -> None:
        if digest != bookmark.digest:
            row = self.source.locate_row(self.source.number(bookmark.file, bookmark.row))
            raise RuntimeError(
                f"{row} is not the row of the state's bookmark: the source changed, or the state is damaged; restore "
                "the source, or use another state"
            )

    def _content(self, row: ReadRow) -> RawRow | BrokenRow:
        try:
            with self.source.door:
                return row()
        except BrokenRow as broken:
            return broken


def _digest(content: RawRow | BrokenRow, number: int) -> int:
    """Return a 32-bit digest of a row and its number."""
    if isinstance(content, BrokenRow):
        content = str(content).encode()
    elif not isinstance(content, bytes):
        content = msgspec.msgpack.encode(content)
    return xxhash.xxh3_64_intdigest(content, number) & 0xFFFFFFFF
