"""Read datasets of the Hugging Face hub, and local directories with the layout of hub datasets."""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa

from sftstream.cache import derived
from sftstream.config import SourceConfig
from sftstream.door import Door
from sftstream.sources.file_formats.arrow import Batches
from sftstream.sources.location import require_whole
from sftstream.sources.rows import SAMPLED_ABOVE, FileIdentity
from sftstream.sources.saved import choose
from sftstream.sources.slices import refuse_empty
from sftstream.sources.stored import stored

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_DECLARED = re.compile(r"---\n(?:(?!---).*\n)*?(?:configs|dataset_info):")
_CARD, _YAML = "README.md", ".huggingface.yaml"
"""Files in which `datasets` looks for subsets and splits: a card with YAML on top, and YAML."""
_PLACE = ("name", "version", "data_dir", "data_files", "description", "features")
"""Fields of a builder's settings that do not change how a file is divided into rows."""
_VALUES = 1_000_000
"""Values in the YAML of a dataset card; cards with hundreds of subsets have some 10,000."""
_SLICE, _SLICES = 1000, 128
"""Number of rows in a slice of a digest, and of slices in a sampled digest."""


class Loaded:
    """Rows of a split by number, from the Arrow files in the cache of `datasets`.

    `datasets` may divide the rows into other files on another machine, so the identity is a digest
    of the rows, not of the files. The digest covers all rows, or above 256 MiB 128 evenly spread
    slices of 1000 rows.
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
        """Do nothing: there is no row index that could be damaged."""

    def require_unchanged(self) -> None:
        """Do nothing: `datasets` keeps a copy of the rows for each content of the files."""

    def digest_in_full(self, interrupted: Callable[[], bool], *, quiet: bool) -> None:
        """Return None: the rows are in the copy of `datasets`, not in the user's files."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Loaded, (self._source,)


def is_hub_name(path: str) -> bool:
    """Return True if a path has the form `organisation/name`."""
    return _NAME.fullmatch(path) is not None


def is_repository(directory: Path) -> bool:
    """Return True if the directory has a dataset card, or a YAML file, that declares splits."""
    yaml = _read(directory / _YAML)
    return _DECLARED.match(_read(directory / _CARD)) is not None or _DECLARED.match(f"---\n{yaml}") is not None


def data_files(source: SourceConfig) -> list[str]:
    """Return the paths or URLs of a split's files, in the order that `datasets` uses.

    Raises ValueError if the split does not exist, and lists the existing splits, or if the dataset
    card has settings of the reader of `datasets`, such as `sep: ";"`.
    """
    import datasets

    with _asking(source):
        builder = datasets.load_dataset_builder(source.path, source.subset, revision=source.revision)
    files = {str(split): list(names) for split, names in (builder.config.data_files or {}).items()}
    chosen = files[choose(source.path, source.split, list(files))]
    _require_usual(source, builder.config, chosen)
    return chosen


def _require_usual(source: SourceConfig, settings: Any, files: list[str]) -> None:
    """Raise ValueError if a dataset card changes how `datasets` divides files into rows."""
    usual = vars(type(settings)())
    if all(".tsv" in file for file in files):
        usual["sep"] = "\t"
    changed = {name: value for name, value in vars(settings).items() if name not in _PLACE and value != usual.get(name)}
    if changed:
        listed = ", ".join(f"{name} = {value!r}" for name, value in sorted(changed.items()))
        raise ValueError(
            f"source {source.path!r} is streamed, and its dataset card sets {listed}, which only the library datasets "
            "applies; leave out streaming"
        )


def _only_split(source: SourceConfig) -> str:
    import datasets  # here, since the import takes a second and most runs read files

    with _asking(source):
        names = datasets.get_dataset_split_names(source.path, source.subset, revision=source.revision)
    return choose(source.path, None, names)


def _load(source: SourceConfig, split: str) -> pa.Table:
    import datasets

    if Path(source.path, "state.json").is_file():  # the order of rows may lie in one of its files
        raise ValueError(
            f"source {source.path!r} has state.json, as save_to_disk writes, but no dataset_info.json; restore "
            "dataset_info.json, or leave out split and name the Arrow files by a glob"
        )
    cache = _cache(Path(source.path))
    with _asking(source):
        builder = datasets.load_dataset_builder(source.path, source.subset, revision=source.revision, cache_dir=cache)
        builder.download_and_prepare()
        sizes = {name: info.num_examples for name, info in builder.info.splits.items()}
        chosen = "+".join(sizes) if split == "all" else split
        parts = datasets.ReadInstruction.from_spec(chosen).to_absolute(sizes)
    # Without the filter, `datasets` reads "train[9:8]" from row 9 on to the end.
    filled = [part for part in parts if part.from_ < part.to]
    if not filled:
        refuse_empty(source.path, split, {part.splitname: sizes[part.splitname] for part in parts})
    with _asking(source):
        return builder.as_dataset(split=_sum(filled)).data.table


def _sum(parts: Sequence[Any]) -> Any:
    """Return the instruction to read absolute parts of splits one after the other."""
    from datasets import ReadInstruction

    read = (ReadInstruction(part.splitname, from_=part.from_, to=part.to, unit="abs") for part in parts)
    return reduce(operator.add, read)


def _cache(directory: Path) -> str | None:
    """Return a cache directory for the current content of a local directory; None for a hub name.

    `datasets` itself compares only paths and modification times. If the content of a file changed
    but these did not, it would read the old content from its cache.
    """
    if not directory.is_dir():
        return None
    import datasets

    paths = sorted(path for path in directory.rglob("[!.]*") if path.is_file())
    require_whole(str(directory), [str(path.relative_to(directory)) for path in paths])
    content = [(path.relative_to(directory), stored(path).key) for path in paths]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / derived(*content))


def _require_bounded_card(directory: Path) -> None:
    """Raise ValueError if aliases make the YAML of a directory's dataset card explode.

    `datasets` walks the values as a tree: 9 lists of 9 aliases each, 9 levels deep, are 400 million
    values in a card of 300 bytes.
    """
    import yaml

    parts = _read(directory / _CARD).split("---\n", 2)
    header = parts[1] if len(parts) == 3 and not parts[0].strip() else ""
    for file, text in ((_CARD, header), (_YAML, _read(directory / _YAML))):
        size = _tree_size(yaml.compose(text, Loader=yaml.SafeLoader), {}) if text else 0
        if size > _VALUES:
            raise ValueError(
                f"source {str(directory)!r} has a dataset card whose aliases stand for {size:.3g} values, above "
                f"{_VALUES:,}; write the values out in {file}, or remove the aliases"
            )


def _read(path: Path) -> str:
    """Return the text of a file without its byte order mark; "" if there is no file."""
    return path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""


def _tree_size(node: Any, sizes: dict[int, int]) -> int:
    """Return the number of values below a YAML node, shared nodes counted each time."""
    if id(node) not in sizes:
        inner = node.value if isinstance(getattr(node, "value", None), list) else ()
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(_tree_size(part, sizes) for part in parts)
    return sizes[id(node)]


@contextmanager
def _asking(source: SourceConfig) -> Iterator[None]:
    """Hide the progress bars of `datasets`, and turn its errors into a ValueError of one line."""
    import datasets

    had_progress_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    is_local = Path(source.path).is_dir()
    kind = "a dataset" if is_local else f"a dataset of the hub, and matches no local path from {Path.cwd()}"
    request = f"subset = {source.subset!r}, split = {source.split!r}, revision = {source.revision!r}"
    try:
        with Door(f"source {source.path!r} cannot be read as {kind} ({request})"):
            _require_bounded_card(Path(source.path))
            yield
    finally:
        if had_progress_bars:
            datasets.enable_progress_bars()


def _identify(name: str, table: pa.Table, *, full: bool) -> FileIdentity:
    """Return the identity of a table's rows.

    All slices have the same number of rows, whatever the division into batches and files.
    """
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
