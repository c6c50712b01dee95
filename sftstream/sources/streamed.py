"""Open streamed sources, whose files are read from beginning to end, not downloaded or indexed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from sftstream.config import RowSettings, SourceConfig
from sftstream.door import Door
from sftstream.sources.hub import data_files
from sftstream.sources.kinds import is_known, read_forward
from sftstream.sources.location import FileLocation, LocalLocation, require_whole
from sftstream.sources.remote import remote
from sftstream.sources.resolve import Dataset, SavedSlices, resolve, source_door
from sftstream.sources.rows import FileIdentity, Place, ReadRow, RowsFrom
from sftstream.sources.stored import Stored


class StreamedSource:
    """A streamed source: the files of a path or of a hub dataset.

    The sizes of the files are unknown, so rows are numbered round-robin over the `K` files: row `n`
    is row `n // K` of file `n % K`. With 5 files, row 12 is row 2 of file 2.
    """

    def __init__(self, source: SourceConfig) -> None:
        self.settings: RowSettings = source
        self.door = source_door(source)
        with self.door:
            self._locations = _locations(source)
            self._watched = [location.watched() for location in self._locations]
        self.identities: tuple[FileIdentity, ...] = tuple(watched.identity for watched in self._watched)
        self.local_files = {number: file for number, file in enumerate(self._watched) if isinstance(file, Stored)}

    @property
    def file_count(self) -> int:
        """Number of files."""
        return len(self._locations)

    def file_and_index(self, row: int) -> tuple[int, int]:
        """Return the number of a row's file, and the row's number in the file."""
        index, file = divmod(row, self.file_count)
        return file, index

    def number(self, file: int, index: int) -> int:
        """Return the number, in the source, of row `index` of a file."""
        return index * self.file_count + file

    def locate_row(self, row: int) -> str:
        """Return the row's location for messages: `file[index]`."""
        file, index = self.file_and_index(row)
        return f"{self._locations[file].display_name}[{index}]"

    def open(self, file: int, start: int, place: Place | None = None) -> RowsFrom:
        """Read file number `file` from row `start`, or from an earlier row, to its end.

        `place` is the place of row `start`; None if unknown. Raises ValueError if the file is
        unreadable, and RuntimeError if the file has changed.
        """
        self._require_unchanged(file)
        location = self._locations[file]
        with Door(f"{location.display_name} cannot be read"):
            read = read_forward(location, start, place)
        return read._replace(rows=self._to_the_end(file, read.rows))

    def require_unchanged(self, rows: Iterable[int]) -> None:
        """Raise RuntimeError if the content of a local file with one of the rows has changed.

        A remote file is checked when it is opened and when it ends, since a check is a request.
        """
        for file in {self.file_and_index(row)[0] for row in rows}:
            if file in self.local_files:
                self._require_unchanged(file)

    def has_row(self) -> bool:
        """Return True if a file holds a row; reads the files up to the first row."""
        return any(next(self.open(file, 0).rows, None) is not None for file in range(self.file_count))

    def _to_the_end(self, file: int, rows: Iterator[ReadRow]) -> Iterator[ReadRow]:
        with Door(f"{self._locations[file].display_name} cannot be read to its end"):
            yield from rows
        self._require_unchanged(file)  # a file truncated after a row seems complete

    def _require_unchanged(self, file: int) -> None:
        with Door(f"{self._locations[file].display_name} cannot be read"):
            self._watched[file].require_unchanged()


def _locations(source: SourceConfig) -> list[FileLocation]:
    resolved = resolve(source)
    if isinstance(resolved, SavedSlices):
        raise ValueError(
            f"source {source.path!r} is streamed, and split = {source.split!r} selects rows by number; leave out "
            "streaming, or name a whole split"
        )
    if isinstance(resolved, Dataset):
        locations = [_location(name, full=source.digest == "full") for name in data_files(resolved.source)]
        require_whole(source.path, [location.name for location in locations])
    else:
        locations = resolved
    for location in locations:
        if not is_known(location.name):
            read_forward(location, 0)
    return locations


def _location(name: str, *, full: bool) -> FileLocation:
    return remote(name, full=full) if "://" in name else LocalLocation(Path(name), full)
