"""A source that is streamed, as one logical stream reads it."""

from __future__ import annotations

from collections.abc import Iterator

from sftstream.records import BrokenRow, RawRow, Ref
from sftstream.sources.rows import ReadRow
from sftstream.sources.streamed import StreamedSource


class ShardReader:
    """Gives each row once. It is wound on to a row that lies ahead; a shard of which a row lies behind is begun again.

    Rows that are expected are kept when the tape passes them. So after a resume all that waits in a shard is found in one
    reading, whatever the order in which it is asked for; a second one may come where the stream itself goes on in it.
    """

    def __init__(self, source: StreamedSource) -> None:
        self.source = source
        self._rows: Iterator[ReadRow] = iter(())
        self._shard = self._next = -1
        self._kept: dict[Ref, list[RawRow | BrokenRow]] = {}
        self._expected: dict[int, dict[int, list[Ref]]] = {}  # by shard, there by place

    def expect(self, ref: Ref) -> None:
        """This row was read before, and will be asked for again, as often as this says so."""
        shard, index = self.source.shard_and_index(ref.row)
        self._expected.setdefault(shard, {}).setdefault(index, []).append(ref)

    def reaches(self, ref: Ref) -> bool:
        """Whether there is such a row: its shard may have ended before."""
        if ref not in self._kept:
            self._wind(ref)
        return ref in self._kept

    def read(self, ref: Ref) -> RawRow:
        """The decoded row; raises `BrokenRow`, or RuntimeError where the source is no longer what it was."""
        if not self.reaches(ref):
            raise RuntimeError(f"{self.source.locate_row(ref.row)} is no longer there: the source changed; restore it")
        content = self._kept[ref].pop()
        if not self._kept[ref]:
            del self._kept[ref]
        if isinstance(content, BrokenRow):
            raise content
        return content

    def _wind(self, ref: Ref) -> None:
        shard, index = self.source.shard_and_index(ref.row)
        expected = self._expected.get(shard, {})
        first, last = min([index, *expected]), max([index, *expected])
        if shard != self._shard or index < self._next:
            self._shard = shard
            self._next, self._rows = self.source.open(shard, first)
        while self._next <= last and (row := next(self._rows, None)) is not None:
            wanted = expected.pop(self._next, [])
            if self._next == index and ref not in wanted:  # those may be of another epoch
                wanted.append(ref)
            if wanted:
                content = _read(row)
                for one in wanted:
                    self._kept.setdefault(one, []).append(content)
            self._next += 1


def _read(row: ReadRow) -> RawRow | BrokenRow:
    try:
        return row()
    except BrokenRow as broken:
        return broken
