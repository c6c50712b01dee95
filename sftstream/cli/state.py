"""Read data configs in TOML files, and carry states over to them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from sftstream.config import DataConfig, SourceConfig
from sftstream.door import Door
from sftstream.loader import PackLoader
from sftstream.state import DataState
from sftstream.toml_file import read_toml


def read_data_config(path: Path, accept: list[str]) -> DataConfig:
    """Return the `[data]` table of a run's TOML, with `seed`, `epochs` and `skip` of its `[run]`
    table.

    `accept` names the settings that may differ from those of a state. Raises ValueError if the file
    cannot be read or its table is not valid.
    """
    tables = read_toml(path)
    data, run = tables.get("data"), tables.get("run", {})
    if not isinstance(data, dict) or not isinstance(run, dict):
        raise ValueError(f"config {str(path)!r} has no [data] table; name the TOML file of a run")
    of_run = {key: value for key, value in run.items() if key in ("seed", "epochs", "skip")}
    with Door(f"config {str(path)!r}: the [data] table is not valid"):
        return msgspec.convert({**data, **of_run, "accept_changed": accept}, DataConfig)


def rebased(state: DataState, config: DataConfig) -> DataState:
    """Return the state carried over to another config.

    Raises ValueError naming each change that `config.accept_changed` does not name.
    """
    return PackLoader(config, workers=0, state=state).state


def read_held_out(path: Path) -> tuple[SourceConfig, ...]:
    """Return the sources of `[validation]` and the file of `[evaluation]` in a run's TOML.

    Raises ValueError if they are not valid.
    """
    tables = read_toml(path)
    with Door(f"config {str(path)!r}: the [validation] or [evaluation] table is not valid"):
        validation = msgspec.convert(tables.get("validation", {}), _Validation)
        evaluation = msgspec.convert(tables.get("evaluation", {}), _Evaluation)
    return (*validation.sources, *([SourceConfig(path=evaluation.path)] if evaluation.path else []))


class _Validation(msgspec.Struct):
    """The part of `[validation]` that names data."""

    sources: tuple[SourceConfig, ...] = ()


class _Evaluation(msgspec.Struct):
    """The part of `[evaluation]` that names data."""

    path: str | None = None
