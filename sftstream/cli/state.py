"""Read held-out sources in TOML files, and carry states over to other configs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from sftstream.config import DataConfig, SourceConfig
from sftstream.door import Door
from sftstream.identity import require_settings
from sftstream.loader import PackLoader
from sftstream.state import DataState
from sftstream.toml_file import read_toml


def rebased(state: DataState, config: DataConfig) -> DataState:
    """Return the state carried over to another config.

    Raises ValueError naming each change that `config.accept_changed` does not name.
    """
    return PackLoader(config, workers=0, state=state).state


def accepting(config: DataConfig, names: Sequence[str]) -> DataConfig:
    """Return the config with `names` added to its `accept_changed`.

    Raises ValueError for a name of no setting, which names the option that the name came from.
    """
    for name in names:
        try:
            require_settings([name])
        except ValueError as error:
            raise ValueError(
                f"--accept {name!r} is no setting that a resume compares; write the name as a refused rebase prints it, "
                "for example --accept data.capacity or --accept 'data.sources[0]'"
            ) from error
    return msgspec.structs.replace(config, accept_changed=(*config.accept_changed, *names))


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
