"""Flatten nested tables into lines of path and value, and compare such lines between runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

LONGEST = 300
"""Characters of a name or a value that are kept."""
MOST_LINES = 400
"""Lines of a table that are kept."""


class Difference(msgspec.Struct, frozen=True):
    """A setting with different values in the compared runs."""

    name: str
    values: tuple[str | None, ...]
    """Value in each run; None in a run without the setting."""


def excerpt(text: str) -> str:
    """Return a text, cut to `LONGEST` characters."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def flatten(table: Mapping[str, Any]) -> dict[str, str]:
    """Return a table of tables as `{"data.sources.0.path": "rows.jsonl", ...}`.

    Values that are None are left out. Long values are cut, and lines after `MOST_LINES` are counted
    in a last line.
    """
    lines = list(_lines(table, ""))
    found = {excerpt(name): excerpt(text) for name, text in lines[:MOST_LINES]}
    if len(lines) > MOST_LINES:
        found["..."] = f"{len(lines) - MOST_LINES:,} further lines"
    return found


def _lines(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _lines(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from _lines(item, f"{path}.{index}")
    elif value is not None and path:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def differences(tables: Sequence[Mapping[str, str]]) -> tuple[Difference, ...]:
    """Return the settings in which flat tables differ, in the order of their first occurrence.

    An empty table is that of a run that recorded no settings, and differs from no other.
    """
    names = dict.fromkeys(name for table in tables for name in table)
    return tuple(
        Difference(name, tuple(table.get(name) for table in tables))
        for name in names
        if len({table.get(name) for table in tables if table}) > 1
    )
