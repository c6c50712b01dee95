"""Read directories that `save_to_disk` of a Hugging Face `Dataset` or `DatasetDict` wrote."""

from __future__ import annotations

import glob
import re
from typing import Any, TypeVar

import msgspec

from sftstream.excerpt import one_line
from sftstream.sources.location import FileLocation

T = TypeVar("T")
_SPLITS, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"

_NUMBER = re.compile(r"-\d{5}-of-")
"""Number of a file in a file name, such as `train-00001-of-00005.arrow`."""


class _Splits(msgspec.Struct):
    splits: list[str]


class _DataFile(msgspec.Struct):
    filename: str


class _State(msgspec.Struct):
    data_files: list[_DataFile] = msgspec.field(name="_data_files")
    indices: list[Any] | None = msgspec.field(name="_indices_data_files", default=None)


def is_saved(directory: FileLocation) -> bool:
    """Return True if `save_to_disk` wrote the directory."""
    return directory.child(_SPLITS).is_file() or all(directory.child(name).is_file() for name in (_STATE, _INFO))


def has_splits(directory: FileLocation) -> bool:
    """Return True if the saved dataset is a dictionary of splits."""
    return directory.child(_SPLITS).is_file()


def require_state(directory: FileLocation, files: list[FileLocation]) -> None:
    """Raise ValueError if Arrow files lie beside the description of a dataset that `is_saved` is
    not True of.

    The cache of `datasets` has such directories, with the files of several splits, of orders of
    rows, and of results of `map`. Only the list in `state.json` says which files are the rows.
    """
    arrow = sorted((file for file in files if file.name.endswith(".arrow")), key=_likelihood)
    if arrow and any(file.name == _INFO for file in files):
        example = arrow[0].display_name
        shards, count = _NUMBER.subn("-*-of-", glob.escape(example))
        raise ValueError(
            f"source {directory.display_name!r} has {_INFO} and Arrow files ({len(arrow)}), but no {_STATE} that lists "
            f"the files with its rows; restore {_STATE}, or name the files, such as path = {shards if count else example!r}"
        )


def _likelihood(file: FileLocation) -> tuple[bool, bool, str]:
    """Return a sort key that puts a file first that seems to hold rows for training.

    In the cache of `datasets`, orders of rows and results of `map` are files called `cache-*`.
    """
    return file.name.startswith(("cache-", "indices")), "train" not in file.name, file.name


def saved_files(directory: FileLocation, split: str | None) -> list[FileLocation]:
    """Return the Arrow files of a saved dataset, or of its split `split`, in order.

    Raises ValueError if a file is missing, or `split` does not fit the directory.
    """
    if has_splits(directory):
        splits = _read(directory.child(_SPLITS), _Splits).splits
        directory = directory.child(_named(directory, choose(directory.display_name, split, splits)))
    elif split is not None:
        raise ValueError(
            f"source {directory.display_name!r} is a saved dataset without splits; leave out split = {split!r}"
        )
    state = _read(directory.child(_STATE), _State)
    if state.indices:
        raise ValueError(
            f"source {directory.display_name!r} stores the order of its rows in a separate file; call "
            "flatten_indices() on the dataset and save it again"
        )
    files = [directory.child(_named(directory, file.filename)) for file in state.data_files]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"source {directory.display_name!r} lacks {missing[0]}, one of {len(files)} files in the list of {_STATE}; "
            "restore the file"
        )
    return files


def choose(display_name: str, split: str | None, splits: list[str]) -> str:
    """Return `split`, or the only split if None; raises ValueError if there is no such split."""
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        reason = "several splits" if split is None else f"no split {split!r}"
        raise ValueError(f"source {display_name!r} has {reason}; set split to one of {', '.join(map(repr, splits))}")
    return split


def _read(file: FileLocation, kind: type[T]) -> T:
    stored = file.stored()
    try:
        return msgspec.json.decode(stored.path.read_bytes(), type=kind)
    except msgspec.DecodeError as error:
        raise ValueError(
            f"{file.display_name} is damaged or was not written by save_to_disk: {one_line(error)}; write the dataset again"
        ) from None


def _named(directory: FileLocation, name: str) -> str:
    """Return `name`; raises ValueError if `name` is not a plain file name."""
    if "/" in name or name in ("", ".", ".."):
        raise ValueError(
            f"source {directory.display_name!r} lists {name!r}, not the name of a file in the directory; save the dataset again"
        )
    return name
