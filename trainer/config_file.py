"""Read a run's TOML file, with `section.key=value` overrides from the command line.

Example: `load_config(Path("run.toml"), ["run.steps=10", "data.sources.0.path=rows.jsonl"])` reads
`run.toml`, replaces two values, and returns a TrainConfig.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from sftstream import read_toml
from trainer.config import ModelConfig, TrainConfig

NONE = "none"
"""Word of an override that leaves a key out; the default of such keys in docs/config.md."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read the config in `path` and apply `section.key=value` overrides.

    `key=none` leaves a key out whose default is none; any other word without quotes is a string.
    Raises ValueError, with the wrong key, if the file or an override is not valid.
    """
    table = read_toml(path)
    for override in overrides:
        _override(table, override)
    try:
        return parse_config(table)
    except ValueError as error:
        raise ValueError(f"config {str(path)!r}: {error}") from None


def parse_config(table: dict[str, Any]) -> TrainConfig:
    """Check parsed TOML tables and return the config.

    `run.seed`, `run.epochs` and `run.skip` are copied into `[data]`. Raises ValueError with the
    wrong key.
    """
    for name in ("run", "data", "model"):
        if not isinstance(table.get(name, {}), dict):
            raise ValueError(f"{name} = {table[name]!r} is a value, not a table; write [{name}] and keys below")
    run, data = table.get("run", {}), table.get("data", {})
    for key in ("seed", "epochs", "skip"):
        if key in data:
            raise ValueError(f"data.{key} is set by run.{key} in a training run; move it there")
        if key in run:
            data = {**data, key: run[key]}
    # In the file the keys of the shape stand beside init_from.
    model = dict(table.get("model", {}))
    nested = {key: model.pop(key) for key in ("init_from", "resize_vocabulary") if key in model}
    if model:
        nested["shape"] = model
    try:
        return msgspec.convert({**table, "data": data, "model": nested}, TrainConfig)
    except RecursionError:
        raise ValueError("a value is nested too deeply; write lists in tables only") from None
    except msgspec.ValidationError as error:
        raise ValueError(str(error).replace("$.model.shape", "$.model")) from None


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"{override!r} is not an override; write section.key=value")
    *path, last = key.split(".")
    leaves_out = text == NONE and _is_optional([*path, last])
    node: Any = table
    for name in path:
        if leaves_out and isinstance(node, dict) and name not in node:
            return
        node = node[_index(key, name, node)] if isinstance(node, list) else node.setdefault(name, {})
        if not isinstance(node, dict | list):
            raise ValueError(f"override {key!r}: {name!r} is a value, not a table; name a key of a table")
    if leaves_out and isinstance(node, dict):
        node.pop(last, None)
        return
    node[_index(key, last, node) if isinstance(node, list) else last] = _value(text)


def _is_optional(path: Sequence[str]) -> bool:
    """Return True if the default of the key at `path` is none."""
    kinds: list[inspect.Type] = [inspect.type_info(TrainConfig)]
    found: list[inspect.Field] = []
    for name in path:
        if not name.isdecimal():  # the elements of a list have the keys of their table
            found = [field for kind in kinds for field in _fields(kind) if field.encode_name == name]
            kinds = [field.type for field in found]
    return any(field.default is None for field in found)


def _fields(kind: inspect.Type) -> Iterator[inspect.Field]:
    """Yield the keys of a table, of the elements of a list, or of the tables that a key may be."""
    if isinstance(kind, inspect.StructType):
        yield from kind.fields
        if kind.cls is ModelConfig:
            yield from (key for field in kind.fields if field.name == "shape" for key in _fields(field.type))
    for inner in getattr(kind, "types", ()):
        yield from _fields(inner)
    if isinstance(kind, inspect.VarTupleType):
        yield from _fields(kind.item_type)


def _index(key: str, name: str, array: list[Any]) -> int:
    if not name.isdecimal() or int(name) >= len(array):
        raise ValueError(
            f"override {key!r}: {name!r} is not an index into a list of {len(array)} elements, counted from 0"
        )
    return int(name)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text  # a word without quotes is a string
