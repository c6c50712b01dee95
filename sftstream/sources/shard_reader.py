"""The reader of one logical stream for a streamed source."""

from __future__ import annotations

from collections.abc import Iterator

from sftstream.records import BrokenRow, RawRow, Ref
from sftstream.sources.rows import ReadRow
from sftstream.sources.streamed import StreamedSource


class ShardReader:
    """Reads rows of shards in any order by reading forward; seeking backwards reopens the shard.

    Announced rows (`expect`) are kept in memory when the reader passes. So after a resume one pass
    over a shard finds all announced rows of the shard, in any order of `read`; a second pass may
    follow if the stream continues in the shard. Rows are kept as stored, not decoded.
    """

    def __init__(self, source: StreamedSource) -> None:
        self.source = source
        self._rows: Iterator[ReadRow] = iter(())
        self._shard = self._next = -1
        self._kept: dict[Ref, list[RawRow | BrokenRow]] = {}
        self._expected: dict[int, dict[int, list[Ref]]] = {}  # shard -> index -> references

    def expect(self, ref: Ref) -> None:
        """Announce one later `read` of a row that was read before the state was taken."""
        shard, index = self.source.shard_and_index(ref.row)
        self._expected.setdefault(shard, {}).setdefault(index, []).append(ref)

    def reaches(self, ref: Ref) -> bool:
        """Return True if the row exists; False if the shard ends before the row."""
        if ref not in self._kept:
            self._seek(ref)
        return ref in self._kept

    def read(self, ref: Ref) -> RawRow:
        """Return a row as stored, once for each announcement or first read.

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
        shard, index = self.source.shard_and_index(ref.row)
        expected = self._expected.get(shard, {})
        first, last = min([index, *expected]), max([index, *expected])
        if shard != self._shard or index < self._next:
            self._shard = shard
            self._next, self._rows = self.source.open(shard, first)
        while self._next <= last and (row := next(self._rows, None)) is not None:
            wanted = expected.pop(self._next, [])
            if self._next == index and ref not in wanted:  # an announcement may be of a different epoch
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
