"""State dicts in JSON files and data configs in TOML files."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec

from sftstream.config import DataConfig
from sftstream.loader import PackLoader
from sftstream.state import DataState


def read_state(path: Path) -> DataState:
    """Return the state in a JSON file. Raises ValueError if the file holds no readable state."""
    try:
        return DataState.parse(msgspec.json.decode(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from None


def read_data_config(path: Path, accept: list[str]) -> DataConfig:
    """Return the `[data]` table of a run's TOML, with `seed` and `epochs` of its `[run]` table.

    `accept` names the settings that may differ from those of a state. Raises ValueError if the file
    cannot be read or its table is not valid.
    """
    try:
        tables = tomllib.loads(path.read_text())
        run: dict[str, Any] = {key: value for key, value in tables.get("run", {}).items() if key in ("seed", "epochs")}
        return msgspec.convert({**tables["data"], **run, "accept_changed": accept}, DataConfig)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from None
    except KeyError:
        raise ValueError(f"{path} has no [data] table; name the TOML file of a run") from None
    except msgspec.ValidationError as error:
        raise ValueError(f"the [data] table of {path} is not valid: {error}") from None


def rebased(state: DataState, config: DataConfig) -> DataState:
    """Return the state carried over to another config.

    Raises ValueError naming each change that `config.accept_changed` does not name.
    """
    return PackLoader(config, workers=0, state=state).state
