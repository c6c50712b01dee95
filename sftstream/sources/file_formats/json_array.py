"""Read files that contain a single JSON array of rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from io import FileIO

import msgspec
import numpy as np

from sftstream.excerpt import one_line
from sftstream.records import UNDECODABLE
from sftstream.sources.row_index import IndexedFile, Integers
from sftstream.sources.rows import BOM, RowsFrom, Text, after_bom
from sftstream.sources.stored import Stored

_ELEMENTS = msgspec.json.Decoder(list[msgspec.Raw])
_LENIENT = json.JSONDecoder(parse_int=str, parse_float=str)
_SPACES = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(rb"[ \t\r\n,]*")

Element = msgspec.Raw | bytes
"""The JSON text of an element."""


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
    elements = _elements(text.file.read(), text.display_name)
    return RowsFrom(start, (partial(bytes, element) for element in elements[start:]))


def _divide(file: FileIO, display_name: str) -> Iterator[tuple[Integers, Integers]]:
    content = file.read()
    lead = len(BOM) if content.startswith(BOM) else 0
    elements = _elements(memoryview(content)[lead:], display_name)
    borders = np.fromiter(_borders(content, lead, elements), np.int64)
    yield borders, np.arange(len(borders))


def _elements(content: bytes | memoryview, display_name: str) -> list[Element]:
    """Return the JSON texts of an array's elements; raises ValueError if there is no array.

    A value that is no JSON, such as NaN, is the mistake of its element and not of the file.
    """
    try:
        return [*_ELEMENTS.decode(content)]
    except UNDECODABLE as error:
        if (elements := _lenient_elements(bytes(content))) is not None:
            return elements
        raise ValueError(
            f"{display_name} is not a JSON array of conversations: {one_line(error)}; restore the file, or write JSON lines"
        ) from None


def _lenient_elements(content: bytes) -> list[Element] | None:
    """Return the texts of an array's elements as Python's JSON reader sees them, else None."""
    text = content.decode("latin-1")  # a character a byte, whatever the letters inside strings are
    elements: list[Element] = []
    position, separator = text.find("[") + 1, ","
    while separator == ",":
        start = _after_spaces(text, position)
        try:
            _, end = _LENIENT.raw_decode(text, start)
        except (ValueError, RecursionError):
            return None
        elements.append(content[start:end])
        position = _after_spaces(text, end) + 1
        separator = text[position - 1 : position]
    return elements if separator == "]" and _after_spaces(text, position) == len(text) else None


def _after_spaces(text: str, position: int) -> int:
    spaces = _SPACES.match(text, position)
    assert spaces is not None
    return spaces.end()


def _borders(content: bytes, lead: int, elements: list[Element]) -> Iterator[int]:
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
