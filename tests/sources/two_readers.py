"""Read the stored rows of a file in both ways, which must agree: by number, and forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sftstream import SourceConfig
from sftstream.sources import FileSet, StreamedSource


def by_number(path: Path) -> list[Any]:
    source = FileSet(SourceConfig(path=str(path)))
    return [source.read(row) for row in range(len(source))]


def forward(path: Path) -> list[Any]:
    return [row() for row in StreamedSource(SourceConfig(path=str(path), streaming=True)).open(0, 0).rows]


READERS = [by_number, forward]
