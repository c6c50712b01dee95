"""Datasets of the Hugging Face hub, and local directories laid out like them, as `datasets.load_dataset` reads them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from sftstream.config import SourceConfig
from sftstream.sources.arrow import Batches
from sftstream.sources.location import require_whole
from sftstream.sources.rows import SAMPLED_ABOVE, FileIdentity, derived, stored
from sftstream.sources.saved import choose

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_DECLARED = re.compile(r"---\n(?:(?!---).*\n)*?(?:configs|dataset_info):")
_SLICE, _SLICES = 1000, 128


class Loaded:
    """A split's rows, from the Arrow files that `datasets` maps from its own cache, once for all processes of a machine.

    That cache may divide the rows in one way here and in another there, so the identity is a digest of the rows as Arrow
    writes them: of all, or above 256 MB of 128 evenly spread thousands.
    """

    def __init__(self, source: SourceConfig) -> None:
        self._source = source
        split = source.split or _only_split(source)
        table = _load(source, split)
        self._display_name = f"{source.path}:{split}"
        self._batches = Batches(table.schema, table.to_batches())
        self.identity = _identify(self._display_name.rpartition("/")[2], table, full=source.digest == "full")

    def __len__(self) -> int:
        return len(self._batches)

    def read(self, row: int) -> Mapping[str, Any]:
        return self._batches.read(row)

    def locate_row(self, row: int) -> str:
        return f"{self._display_name}[{row}]"

    def require_intact(self, row: int) -> None:
        """Do nothing: a table has no row index."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Loaded, (self._source,)


def is_hub_name(path: str) -> bool:
    return _NAME.fullmatch(path) is not None


def is_repository(directory: Path) -> bool:
    """Whether the directory's card says what its splits are."""
    card = directory / "README.md"
    return card.is_file() and _DECLARED.match(card.read_text(encoding="utf-8", errors="replace")) is not None


def data_files(source: SourceConfig) -> list[str]:
    """Paths or URLs of a split's files, in order, as `datasets` finds them; raises ValueError naming the splits there are."""
    import datasets

    with _asking(source):
        builder = datasets.load_dataset_builder(source.path, source.subset, revision=source.revision)
    files = {str(split): list(names) for split, names in (builder.config.data_files or {}).items()}
    return files[choose(source.path, source.split, list(files))]


def _only_split(source: SourceConfig) -> str:
    import datasets  # takes a second to import, and most runs read files

    with _asking(source):
        names = datasets.get_dataset_split_names(source.path, source.subset, revision=source.revision)
    return choose(source.path, None, names)


def _load(source: SourceConfig, split: str) -> pa.Table:
    import datasets

    cache = _cache(Path(source.path))
    with _asking(source):
        asked = {"name": source.subset, "split": split, "revision": source.revision, "cache_dir": cache}
        return datasets.load_dataset(source.path, **asked).data.table


def _cache(directory: Path) -> str | None:
    """A place for what a local directory holds now: `datasets` would find it again by paths and times, which a copy can keep."""
    if not directory.is_dir():
        return None
    import datasets

    paths = sorted(path for path in directory.rglob("[!.]*") if path.is_file())
    require_whole(str(directory), [str(path.relative_to(directory)) for path in paths])
    content = [(path.relative_to(directory), stored(path).key) for path in paths]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / derived(*content))


@contextmanager
def _asking(source: SourceConfig) -> Iterator[None]:
    """`datasets` without its progress bars, and what it says of a failure in one line."""
    import datasets

    display_name = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        here = Path(source.path).is_dir()
        tried = "" if here else f" is no file or directory here (looked from {Path.cwd()}), and as one of the hub"
        asked = f"subset = {source.subset!r}, split = {source.split!r}, revision = {source.revision!r}"
        said = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"source {source.path!r}{tried} cannot be read as a dataset ({asked}): {said}") from None
    finally:
        if display_name:
            datasets.enable_progress_bars()


def _identify(name: str, table: pa.Table, *, full: bool) -> FileIdentity:
    """Slices of a fixed number of rows, so that the borders of batches and files do not matter."""
    starts: Sequence[int] = range(0, table.num_rows, _SLICE)
    sampled = table.nbytes > SAMPLED_ABOVE and len(starts) > _SLICES and not full
    if sampled:
        starts = [i * (table.num_rows - _SLICE) // (_SLICES - 1) for i in range(_SLICES)]
    digest = hashlib.sha256(table.schema.remove_metadata().serialize())
    size = 0
    for start in starts:
        for batch in table.slice(start, _SLICE).combine_chunks().to_batches():
            content = batch.serialize()
            digest.update(content)
            size += len(content)
    return FileIdentity(name=name, size=size, sha256=digest.hexdigest(), sampled=sampled)
