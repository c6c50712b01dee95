"""Slices and sums of a saved dataset's splits, in the syntax of `datasets`: "train[:10%]+test"."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import msgspec

from sftstream.excerpt import one_line
from sftstream.records import RawRow
from sftstream.sources.kinds import open_file
from sftstream.sources.location import FileLocation
from sftstream.sources.rows import FileIdentity, RowFile
from sftstream.sources.saved import has_splits, saved_files

_NAME = re.compile(r"(?:^|\+)\s*([\w.]+)")
_UNNAMED = "train"
"""Name of the rows of a dataset without splits, as in `datasets`."""


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `stop` of a file; `stop` is not included."""

    file: RowFile
    start: int
    stop: int

    @property
    def identity(self) -> FileIdentity:
        """Identity of the file, with the slice as a part of the name: "data.arrow[0:10]"."""
        whole = self.file.identity
        return msgspec.structs.replace(whole, name=f"{whole.name}[{self.start}:{self.stop}]")

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, row: int) -> RawRow:
        return self.file.read(self.start + row)

    def locate_row(self, row: int) -> str:
        return self.file.locate_row(self.start + row)

    def require_intact(self, row: int) -> None:
        self.file.require_intact(self.start + row)

    def require_unchanged(self) -> None:
        self.file.require_unchanged()

    def digest_in_full(self, interrupted: Callable[[], bool], *, quiet: bool) -> str | None:
        return self.file.digest_in_full(interrupted, quiet=quiet)


def is_slice(split: str | None) -> bool:
    """Return True if `split` is more than the name of a split."""
    return split is not None and ("[" in split or "+" in split)


def open_slices(directory: FileLocation, split: str) -> list[RowFile]:
    """Open the rows of a saved dataset that `split` selects, in order.

    "train[:10%]" is the first tenth. A dataset without splits has its rows under the name "train".
    Raises ValueError if `split` names no split of the dataset, or is not in the syntax of
    `datasets`.
    """
    from datasets import ReadInstruction  # here, since the import takes a second

    names = dict.fromkeys(_NAME.findall(split))
    named = has_splits(directory)
    if not named and set(names) != {_UNNAMED}:
        raise ValueError(
            f"source {directory.display_name!r} is a saved dataset without splits, and split = {split!r} names "
            f"{', '.join(map(repr, names)) or 'none'}; name its rows {_UNNAMED!r}"
        )
    files = {name: list(map(open_file, saved_files(directory, name if named else None))) for name in names}
    sizes = {name: sum(map(len, files[name])) for name in files}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(sizes)
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"source {directory.display_name!r} has no rows of split = {split!r}: {one_line(error)}; "
            'write "train[:10%]", "train[5:10]" or "train+test"'
        ) from None
    cuts = [cut for part in parts for cut in _cut(files[part.splitname], part.from_ or 0, part.to)]
    if not cuts:
        refuse_empty(directory.display_name, split, sizes)
    return cuts


def refuse_empty(path: str, split: str, sizes: Mapping[str, int]) -> NoReturn:
    """Raise ValueError for a `split` that selects no row.

    `sizes` holds the number of rows of each split that `split` names; it may leave out splits
    without rows.
    """
    if whole := "+".join(f"{name}[0:{size}]" for name, size in sizes.items() if size):
        raise ValueError(
            f"split = {split!r} selects none of the {sum(sizes.values()):,} rows of source {path!r}; write "
            f"split = {whole!r} to select all of them, or fewer"
        )
    raise ValueError(
        f"split = {split!r} of source {path!r} holds no row; set split to rows of another split, or remove the source"
    )


def _cut(files: list[RowFile], start: int, stop: int | None) -> list[RowFile]:
    """Return the files with rows `start` to `stop` of all rows, cut to these rows."""
    first, cuts = 0, list[RowFile]()
    for file in files:
        begin, end = max(start - first, 0), min(len(file) if stop is None else stop - first, len(file))
        if begin < end:
            cuts.append(Slice(file, begin, end))
        first += len(file)
    return cuts
