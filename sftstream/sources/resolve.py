"""Find the files of a source: a local path first, then a remote path, then a hub dataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, NoReturn

import msgspec

from sftstream.config import SourceConfig
from sftstream.door import Door
from sftstream.sources.hub import Loaded, is_hub_name, is_repository
from sftstream.sources.kinds import KNOWN, SUFFIXES, is_known, open_file
from sftstream.sources.location import FileLocation, LocalLocation, require_whole
from sftstream.sources.remote import remote
from sftstream.sources.rows import RowFile
from sftstream.sources.saved import is_saved, require_state, saved_files
from sftstream.sources.slices import is_slice, open_slices, refuse_empty


class Dataset(NamedTuple):
    """A source that is read by the `datasets` library."""

    source: SourceConfig


class SavedSlices(NamedTuple):
    """A saved dataset of which `split` selects some rows."""

    directory: FileLocation
    split: str


Resolved = list[FileLocation] | Dataset | SavedSlices


def resolve(source: SourceConfig) -> Resolved:
    """Return the files of a source in order, a Dataset, or slices of a saved dataset.

    Raises ValueError if the path matches nothing or a setting does not apply to the path.
    """
    full = source.digest == "full"
    location: FileLocation = LocalLocation(Path(os.path.expanduser(source.path)), full)
    with source_door(source):
        if not location.is_file() and not location.is_directory() and "://" in source.path:
            location = remote(source.path, full=full)
        # is_file first: is_directory would download a file from a web server
        if location.is_file():
            return _files(source, location, [location])
        if location.is_directory():
            return _directory(source, location)
        return _files(source, location, location.matches(SUFFIXES))


def open_source(source: SourceConfig) -> list[RowFile]:
    """Open the files of a source for reading by row number, in order.

    Raises ValueError if a file is unreadable.
    """
    resolved = resolve(source)
    with source_door(source):
        if isinstance(resolved, Dataset):
            return [Loaded(resolved.source)]
        return open_slices(*resolved) if isinstance(resolved, SavedSlices) else [open_file(file) for file in resolved]


def source_door(source: SourceConfig) -> Door:
    """Return the door that names the source in the errors of libraries."""
    return Door(f"source {source.path!r} cannot be read")


def refuse_without_rows(source: SourceConfig) -> NoReturn:
    """Raise ValueError for a source whose files hold no row."""
    if source.split:
        refuse_empty(source.path, source.split, {})
    raise ValueError(f"source {source.path!r} holds no row; remove the source or name a file with conversations")


def _files(source: SourceConfig, location: FileLocation, files: list[FileLocation]) -> Resolved:
    if not files and is_hub_name(source.path) and not is_known(location.name):
        return Dataset(source)
    if not files:
        looked = f"from {Path.cwd()}" if isinstance(location, LocalLocation) else f"for {location.display_name}"
        raise ValueError(f"source {source.path!r} matches no file (looked {looked}); correct the path")
    _refuse(source, "is a file or a glob", "split", "subset", "revision")
    return files


def _directory(source: SourceConfig, location: FileLocation) -> Resolved:
    if is_saved(location):
        _refuse(source, "was written by save_to_disk", "subset", "revision")
        if source.split is not None and is_slice(source.split):
            return SavedSlices(location, source.split)
        return saved_files(location, source.split)
    _refuse(source, "is a directory", "revision")
    if isinstance(location, LocalLocation) and (source.split or source.subset or is_repository(location.path)):
        return Dataset(msgspec.structs.replace(source, path=str(location.path)))
    _refuse(source, "is a remote directory", "split", "subset")
    files = [file for file in location.files() if is_known(file.name)]
    if not files:
        raise ValueError(
            f"source {source.path!r} is a directory without a file of a known suffix ({KNOWN}); name files in "
            "subdirectories by a glob, or set split if the directory has the layout of a hub dataset"
        )
    require_state(location, files)
    require_whole(source.path, [file.name for file in files])
    return files


def _refuse(source: SourceConfig, kind: str, *fields: str) -> None:
    for field in fields:
        if (value := getattr(source, field)) is not None:
            raise ValueError(
                f"source {source.path!r} {kind}, for which {field} = {value!r} has no meaning; leave {field} out"
            )
