"""Read a config in a TOML file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from sftstream.door import Door

_LARGEST = 16 << 20
"""Bytes of a config; a long list of sources has a few thousand."""


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file in UTF-8.

    Raises ValueError, naming the file, if the file cannot be read, is no TOML or is too large.
    """
    with Door(f"config {str(path)!r} cannot be read"):
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError(f"config {str(path)!r} has more than {_LARGEST:,} bytes; name the TOML file of a run")
    with Door(f"config {str(path)!r} is not TOML"):
        try:
            return tomllib.loads(content.decode("utf-8").replace("\r\n", "\n"))
        except RecursionError:
            raise ValueError(f"config {str(path)!r} is nested too deeply; write lists in tables only") from None
