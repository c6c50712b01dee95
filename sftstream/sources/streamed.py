"""Sources that are neither fetched nor indexed: shards of rows, each read from its beginning on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sftstream.config import SourceConfig
from sftstream.sources.arrow import UNREADABLE
from sftstream.sources.hub import data_files
from sftstream.sources.kinds import KNOWN, is_known, read_forward
from sftstream.sources.location import FileLocation, LocalLocation, require_whole
from sftstream.sources.remote import lost, remote
from sftstream.sources.resolve import Dataset, resolve
from sftstream.sources.rows import FileIdentity, ReadRow, RowsFrom


class StreamedSource:
    """The files that a path names, or a dataset of the hub: its shards.

    Rows are numbered across the shards, so that a number says where to look without anybody knowing the shards' sizes: of `K`
    shards, row `n` is the `n // K`-th of shard `n % K`.
    """

    def __init__(self, source: SourceConfig) -> None:
        self.columns = source.columns
        self._locations = _locations(source)
        known = [location.fingerprint() for location in self._locations]
        self._markers = [marker for marker, _ in known]
        self.identities: tuple[FileIdentity, ...] = tuple(identity for _, identity in known)

    @property
    def shards(self) -> int:
        return len(self._locations)

    def shard_and_index(self, row: int) -> tuple[int, int]:
        """The shard that a row lies in, and its place there."""
        index, shard = divmod(row, self.shards)
        return shard, index

    def number(self, shard: int, index: int) -> int:
        """The number of a shard's row."""
        return index * self.shards + shard

    def locate_row(self, row: int) -> str:
        """Where the row stands, for messages."""
        shard, index = self.shard_and_index(row)
        return f"{self._locations[shard].display_name}[{index}]"

    def open(self, shard: int, at: int) -> RowsFrom:
        """The rows of a shard, from `at` or earlier on; raises ValueError, or RuntimeError where it is no longer what it was."""
        self._require_unchanged(shard)
        location = self._locations[shard]
        try:
            first, rows = read_forward(location, at)
        except _failures() as error:
            raise ValueError(f"{location.display_name} cannot be read: {error}") from None
        return RowsFrom(first, self._to_the_end(shard, rows))

    def _to_the_end(self, shard: int, rows: Iterator[ReadRow]) -> Iterator[ReadRow]:
        try:
            yield from rows
        except _failures() as error:
            raise ValueError(f"{self._locations[shard].display_name} cannot be read to its end: {error}") from None
        self._require_unchanged(shard)  # a file that was cut at a row's border reads like a shorter one

    def _require_unchanged(self, shard: int) -> None:
        location = self._locations[shard]
        try:
            marker = location.change_marker()
        except lost() as error:
            raise ValueError(f"{location.display_name} cannot be read: {error}") from None
        if marker != self._markers[shard]:
            raise RuntimeError(f"{location.display_name} changed while it was read; restore it, or start again")


def _failures() -> tuple[type[Exception], ...]:
    """Return the errors that reading on raises if a file is damaged or out of reach."""
    return *UNREADABLE, *lost(), ValueError


def _locations(source: SourceConfig) -> list[FileLocation]:
    named = resolve(source)
    if isinstance(named, Dataset):
        locations = [_location(name, full=source.digest == "full") for name in data_files(named.source)]
        require_whole(source.path, [location.name for location in locations])
    else:
        locations = named
    if unknown := [location.display_name for location in locations if not is_known(location.name)]:
        raise ValueError(f"{unknown[0]} is of a kind that is not streamed; known are {KNOWN}")
    return locations


def _location(name: str, *, full: bool) -> FileLocation:
    return remote(name, full=full) if "://" in name else LocalLocation(Path(name), full)
