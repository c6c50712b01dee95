"""Read files that contain a single JSON array of rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from io import FileIO

import msgspec
import numpy as np

from sftstream.records import UNDECODABLE
from sftstream.sources.row_index import IndexedFile, Integers
from sftstream.sources.rows import BOM, RowsFrom, Text, after_bom
from sftstream.sources.stored import Stored

_ELEMENTS = msgspec.json.Decoder(list[msgspec.Raw])
_BETWEEN = re.compile(rb"[ \t\r\n,]*")


class JsonArray(IndexedFile):
    """Elements of a JSON array by number.

    Building the row index needs as much memory as the size of the file.
    """

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored, "array", lambda file, _size: _divide(file, stored.display_name))

    def read(self, row: int) -> bytes:
        return self._index.read(row).rstrip(b" \t\r\n,")

    def locate_row(self, row: int) -> str:
        return f"{self._stored.display_name}[{row}]"

    def require_intact(self, row: int) -> None:
        """Do nothing: an element may begin anywhere in a line, so there is nothing to check."""


def elements_forward(text: Text, start: int) -> RowsFrom:
    """Read the elements of a JSON array from element `start`.

    Raises ValueError if the file is not a JSON array.
    """
    after_bom(text.file)
    try:
        elements = _ELEMENTS.decode(text.file.read())
    except UNDECODABLE as error:
        raise ValueError(f"{text.display_name} is not a JSON array of conversations: {error}") from None
    return RowsFrom(start, (partial(bytes, element) for element in elements[start:]))


def _divide(file: FileIO, display_name: str) -> Iterator[tuple[Integers, Integers]]:
    content = file.read()
    lead = len(BOM) if content.startswith(BOM) else 0
    try:
        elements = _ELEMENTS.decode(memoryview(content)[lead:])
    except UNDECODABLE as error:
        raise ValueError(f"{display_name} is not a JSON array of conversations: {error}") from None
    borders = np.fromiter(_borders(content, lead, elements), np.int64)
    yield borders, np.arange(len(borders))


def _borders(content: bytes, lead: int, elements: list[msgspec.Raw]) -> Iterator[int]:
    position = content.index(b"[", lead) + 1
    for element in elements:
        start = _skip(content, position)
        yield start
        position = start + len(memoryview(element))
    yield position


def _skip(content: bytes, position: int) -> int:
    between = _BETWEEN.match(content, position)
    assert between is not None
    return between.end()
