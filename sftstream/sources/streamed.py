"""Streamed sources: shards of rows that are read forward, neither fetched nor indexed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sftstream.config import RowSettings, SourceConfig
from sftstream.sources.arrow import UNREADABLE
from sftstream.sources.compressed import DAMAGED
from sftstream.sources.hub import data_files
from sftstream.sources.kinds import KNOWN, is_known, read_forward
from sftstream.sources.location import FileLocation, LocalLocation, require_whole
from sftstream.sources.remote import connection_errors, remote
from sftstream.sources.resolve import Dataset, resolve
from sftstream.sources.rows import FileIdentity, ReadRow, RowsFrom


class StreamedSource:
    """The shards of a streamed source: the files of a path, or of a hub dataset.

    Rows are numbered round-robin over `K` shards, since the shards' sizes are unknown: row `n` is
    row `n // K` of shard `n % K`. With 5 shards, row 12 is row 2 of shard 2.
    """

    def __init__(self, source: SourceConfig) -> None:
        self.settings: RowSettings = source
        self._locations = _locations(source)
        fingerprints = [location.fingerprint() for location in self._locations]
        self._markers = [marker for marker, _ in fingerprints]
        self.identities: tuple[FileIdentity, ...] = tuple(identity for _, identity in fingerprints)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self._locations)

    def shard_and_index(self, row: int) -> tuple[int, int]:
        """Return the shard of a row, and the row's index in the shard."""
        index, shard = divmod(row, self.shards)
        return shard, index

    def number(self, shard: int, index: int) -> int:
        """Return the number of row `index` of a shard."""
        return index * self.shards + shard

    def locate_row(self, row: int) -> str:
        """Return the row's location for messages: `shard[index]`."""
        shard, index = self.shard_and_index(row)
        return f"{self._locations[shard].display_name}[{index}]"

    def open(self, shard: int, start: int) -> RowsFrom:
        """Read the rows of a shard, from index `start` or earlier.

        Raises ValueError if the shard is unreadable, and RuntimeError if the shard has changed.
        """
        self._require_unchanged(shard)
        location = self._locations[shard]
        try:
            first, rows = read_forward(location, start)
        except _failures() as error:
            raise ValueError(f"{location.display_name} cannot be read: {error}") from None
        return RowsFrom(first, self._to_the_end(shard, rows))

    def _to_the_end(self, shard: int, rows: Iterator[ReadRow]) -> Iterator[ReadRow]:
        failures = _failures()  # before `try`: at the exit of Python nothing can be imported any more
        try:
            yield from rows
        except failures as error:
            raise ValueError(f"{self._locations[shard].display_name} cannot be read to its end: {error}") from None
        self._require_unchanged(shard)  # a file truncated at a row's border reads like a shorter file

    def _require_unchanged(self, shard: int) -> None:
        location = self._locations[shard]
        try:
            marker = location.change_marker()
        except connection_errors() as error:
            raise ValueError(f"{location.display_name} cannot be read: {error}") from None
        if marker != self._markers[shard]:
            raise RuntimeError(f"{location.display_name} changed while it was read; restore the file, or start again")


def _failures() -> tuple[type[Exception], ...]:
    """Return the errors raised for a file that is damaged or out of reach."""
    return *UNREADABLE, *DAMAGED, *connection_errors(), ValueError


def _locations(source: SourceConfig) -> list[FileLocation]:
    resolved = resolve(source)
    if isinstance(resolved, Dataset):
        locations = [_location(name, full=source.digest == "full") for name in data_files(resolved.source)]
        require_whole(source.path, [location.name for location in locations])
    else:
        locations = resolved
    if unknown := [location.display_name for location in locations if not is_known(location.name)]:
        raise ValueError(f"{unknown[0]} has a suffix that cannot be streamed; known are {KNOWN}")
    return locations


def _location(name: str, *, full: bool) -> FileLocation:
    return remote(name, full=full) if "://" in name else LocalLocation(Path(name), full)
