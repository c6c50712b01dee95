"""One JSON array of objects, as many published datasets are stored."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import FileIO
from typing import Any

import msgspec
import numpy as np

from sftstream.sources.row_index import Integers, RowIndex
from sftstream.sources.rows import BOM, PLAIN, UNDECODABLE, Decode, FileIdentity, Stored, decoded_json

_BETWEEN = re.compile(rb"[ \t\r\n,]*")


class JsonArray:
    """Dividing the array takes the file's size in memory, once; then its elements are read like lines."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._index = RowIndex(stored, "array", self._divide)

    @property
    def identity(self) -> FileIdentity:
        return self._stored.identity

    def __len__(self) -> int:
        return len(self._index)

    def read(self, row: int, decode: Decode = PLAIN) -> Any:
        # It can be broken: the array was divided without looking into its strings.
        return decoded_json(self._index.read(row).rstrip(b" \t\r\n,"), self, row, decode)

    def locate_row(self, row: int) -> str:
        return f"{self._stored.display_name}[{row}]"

    def _divide(self, file: FileIO, _size: int) -> Iterator[tuple[Integers, Integers]]:
        content = file.read()
        lead = len(BOM) if content.startswith(BOM) else 0
        try:
            elements = msgspec.json.decode(memoryview(content)[lead:], type=list[msgspec.Raw])
        except UNDECODABLE as error:
            raise ValueError(f"{self._stored.display_name} is not a JSON array of conversations: {error}") from None
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
