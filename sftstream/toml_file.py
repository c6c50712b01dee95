"""Read a config in a TOML file, and its table of data."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec

from sftstream.config import DataConfig
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


def read_data_config(path: Path, accept: list[str] | None = None) -> DataConfig:
    """Return the `[data]` table of a run's TOML, with `seed`, `epochs` and `skip` of its `[run]`
    table.

    `accept` names the settings that may differ from those of a state, in place of the table's own
    `accept_changed`. Raises ValueError if the file cannot be read or its table is not valid.
    """
    tables = read_toml(path)
    data, run = tables.get("data"), tables.get("run", {})
    if not isinstance(data, dict) or not isinstance(run, dict):
        raise ValueError(f"config {str(path)!r} has no [data] table; name the TOML file of a run")
    of_run = {key: value for key, value in run.items() if key in ("seed", "epochs", "skip")}
    accepted = {} if accept is None else {"accept_changed": accept}
    with Door(f"config {str(path)!r}: the [data] table is not valid"):
        return msgspec.convert({**data, **of_run, **accepted}, DataConfig)
