"""One JSON array of objects, as many published datasets are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from sftstream.sources.rows import BOM, UNDECODABLE, BrokenRow


class JsonArray:
    """The file's bytes stay in memory and each row is decoded when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._rows = msgspec.json.decode(path.read_bytes().removeprefix(BOM), type=list[msgspec.Raw])
        except UNDECODABLE as error:
            raise ValueError(f"{path} is not a JSON array of conversations: {error}") from None

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> Any:
        try:
            return msgspec.json.decode(self._rows[row])
        except UNDECODABLE as error:  # the array was divided without looking into its strings
            raise BrokenRow(f"{self.place(row)} is not JSON: {error}") from None

    def place(self, row: int) -> str:
        return f"{self.path}[{row}]"

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonArray, (self.path,)
