"""Read held-out sources in TOML files, and carry states over to other configs."""

from __future__ import annotations

from pathlib import Path

import msgspec

from sftstream.config import DataConfig, SourceConfig
from sftstream.door import Door
from sftstream.loader import PackLoader
from sftstream.state import DataState
from sftstream.toml_file import read_toml


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
