"""State dicts in JSON files: looked at, compared, carried over."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec

from sftstream.config import DataConfig
from sftstream.loader import PackLoader
from sftstream.state import DataState


def read_state(path: Path) -> DataState:
    """The state in a JSON file; raises ValueError naming what is wrong."""
    try:
        return DataState.parse(msgspec.json.decode(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def read_data_config(path: Path, accept: list[str]) -> DataConfig:
    """The `[data]` table of a run's TOML, with its seed and epochs."""
    try:
        tables = tomllib.loads(path.read_text())
        run: dict[str, Any] = {key: value for key, value in tables.get("run", {}).items() if key in ("seed", "epochs")}
        return msgspec.convert({**tables["data"], **run, "accept_changed": accept}, DataConfig)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, KeyError, msgspec.ValidationError) as error:
        raise ValueError(f"{path} holds no [data] table that can be read: {error}") from None


def rebased(state: DataState, config: DataConfig) -> DataState:
    """The state under another config, of which it accepts the changes that it names."""
    return PackLoader(config, workers=0, state=state).state
