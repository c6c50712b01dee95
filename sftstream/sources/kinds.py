"""Which kind of storage a file is, by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath

from sftstream.sources.arrow import arrow
from sftstream.sources.compressed import CODECS, unpacked
from sftstream.sources.delimited import Delimited
from sftstream.sources.json_array import JsonArray
from sftstream.sources.jsonl import JsonLines
from sftstream.sources.location import FileLocation
from sftstream.sources.parquet import parquet
from sftstream.sources.rows import BOM, RowFile, Stored


def _json(stored: Stored) -> RowFile:
    # Many published .json files are JSON lines in truth.
    with stored.open() as file:
        array = file.read(4096).removeprefix(BOM).lstrip().startswith(b"[")
    return JsonArray(stored) if array else JsonLines(stored)


KINDS: dict[str, Callable[[Stored], RowFile]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": _json,
    ".csv": lambda stored: Delimited(stored, ","),
    ".tsv": lambda stored: Delimited(stored, "\t"),
    ".parquet": parquet,
    ".arrow": arrow,
}
KNOWN = f"{', '.join(KINDS)}, and these with {' or '.join(CODECS)}"


def is_known(name: str) -> bool:
    return suffixes(name)[0] in KINDS


def open_file(location: FileLocation) -> RowFile:
    """Raises ValueError where the file is of no known kind, or not what its name says."""
    kind, packed = suffixes(location.name)
    if kind not in KINDS:
        raise ValueError(f"{location.display_name} is of no known kind {kind + packed!r}; known are {KNOWN}")
    stored = location.stored()
    return KINDS[kind](unpacked(stored, packed) if packed else stored)


def suffixes(name: str) -> tuple[str, str]:
    """The kind's suffix, and the compression's or none."""
    path = PurePath(name)
    packed = path.suffix if path.suffix in CODECS else ""
    return PurePath(name.removesuffix(packed)).suffix, packed
