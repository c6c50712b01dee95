"""A stored row -> Conversation.

Rows of plain messages are decoded directly (`typed.py`). All other rows are read by their layout
(`layouts.py`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from sftstream.config import RowSettings
from sftstream.excerpt import one_line
from sftstream.formats.exclusions import require_wanted
from sftstream.formats.fields import Row, decoded, refuse_deep
from sftstream.formats.layouts import DEFAULT, parse_layout
from sftstream.formats.messages import ignored_keys
from sftstream.formats.tools import parse_tools
from sftstream.formats.typed import MESSAGE_KEYS, typed_json, typed_messages, typed_row
from sftstream.formats.unread import (
    VARIABLES,
    answer_beside,
    has_words_beside_messages,
    require_read,
    require_readable,
    tools_of,
    unread_names,
)
from sftstream.records import UNDECODABLE, BrokenRow, Conversation, RawRow, Refused, Unreadable

_HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which stands for no character."""
_DIGITS = 4300
"""Number of digits from which on Python refuses to read an integer."""


def parse_row(row: RawRow, settings: RowSettings = DEFAULT) -> Conversation:
    """Return the conversation of a stored row.

    Raises BrokenRow if the row is not JSON or has none of the columns in `settings.columns`. Raises
    Refused, naming the field, if the row matches no layout or words of the row would be lost.
    """
    usual = not settings.roles and (not settings.ignore or MESSAGE_KEYS.isdisjoint(ignored_keys(settings.ignore)))
    if isinstance(row, bytes):
        if len(row) > settings.max_row_bytes:
            raise _too_large(len(row), settings)
        if usual and settings.columns is None and not settings.ignore and (conversation := typed_json(row)):
            return conversation
    fields = row_fields(row, settings)
    require_wanted(fields)
    if usual and not isinstance(row, bytes) and (conversation := typed_row(fields, settings.max_row_bytes)):
        return conversation
    if not isinstance(row, bytes):
        require_small(row, fields, settings)
    more = has_words_beside_messages(tuple(fields))
    require_readable(fields, settings)
    messages = typed_messages(fields) if usual and not more else None
    if messages is None:
        messages = parse_layout(fields, settings)
    if not messages:
        raise Refused("empty conversation", "it has no messages")
    if not any(message.role == "assistant" for message in messages):
        raise Refused(
            "no assistant message", f"its roles are {[m.role for m in messages]}{answer_beside(fields, settings)}"
        )
    conversation = Conversation(messages, parse_tools(tools_of(fields)), _variables(fields))
    if more or settings.columns is not None:
        require_read(fields, conversation, settings)
    return conversation


def _variables(fields: Row) -> dict[str, Any]:
    """Return the template's variables of a row; raises Refused unless they are an object.

    A variable without a value (null) is left out: a table gives each row all names of the column.
    """
    if not fields.get(VARIABLES):
        return {}
    variables = decoded(fields[VARIABLES]) or {}
    if not isinstance(variables, Mapping):
        raise Refused("bad template variables", f"{VARIABLES} is a {type(variables).__name__}, not an object")
    refuse_deep([variables])
    return {str(name): value for name, value in variables.items() if value is not None}


def unread_columns(row: RawRow, settings: RowSettings = DEFAULT) -> set[str]:
    """Return the names of the columns of a row, and of the keys of its turns, that are not read.

    Return an empty set for a row that is refused.
    """
    try:
        return unread_names(row_fields(row, settings), settings)
    except (Refused, BrokenRow):
        return set()


def decode_row(row: RawRow) -> Any:
    """Decode a row of JSON text; return a row of a table unchanged.

    A column whose value Python cannot hold (`NaN`, a number out of range, half of a surrogate pair)
    becomes an `Unreadable`. Raises BrokenRow if the text is not JSON.
    """
    if not isinstance(row, bytes):
        return row
    try:
        return msgspec.json.decode(row)
    except UNDECODABLE as error:
        if (columns := _readable_columns(row)) is not None:
            return columns
        raise BrokenRow(f"is not JSON: {one_line(error)}") from None


def require_small(row: RawRow, fields: Row, settings: RowSettings) -> None:
    """Raise Refused if a row is larger than `settings.max_row_bytes`."""
    size = len(row) if isinstance(row, bytes) else _size(fields, settings.max_row_bytes)
    if size > settings.max_row_bytes:
        raise _too_large(size, settings)


def _too_large(size: int, settings: RowSettings) -> Refused:
    return Refused(
        "row too large",
        f"it has {size:,} bytes, more than max_row_bytes = {settings.max_row_bytes:,} of its source; raise "
        "max_row_bytes, or shorten the row",
    )


def _size(fields: Row, enough: int) -> int:
    """Return the number of characters in a row's texts; stop counting above `enough`."""
    size, layer = 0, [*fields.values()]
    while layer and size <= enough:
        value = layer.pop()
        if type(value) is str:
            size += len(value)
        elif type(value) is dict:
            layer += value.values()
        elif type(value) is list:
            layer += value
    return size


def row_fields(row: RawRow, settings: RowSettings) -> Row:
    """Return the columns of a row: renamed by `settings.columns`, without `settings.ignore`."""
    decoded = decode_row(row)
    if not isinstance(decoded, Mapping):
        raise Refused("unknown layout", f"the row is a {type(decoded).__name__}, not an object with columns")
    fields = decoded if settings.columns is None else _renamed(decoded, settings.columns)
    if settings.ignore:
        fields = {column: value for column, value in fields.items() if column not in settings.ignore}
    return fields


def _readable_columns(text: bytes) -> dict[str, Any] | None:
    """Return the columns of JSON text in which only single values cannot be read.

    `{"a": "x", "score": NaN}` gives `{"a": "x", "score": Unreadable("...")}`. Return None if
    Python's own JSON reader rejects the text too, or the text is not an object.
    """
    try:
        row = json.loads(text.decode(), parse_int=_integer)
        if not isinstance(row, dict):
            return None
        return {_readable(column): _readable(value) for column, value in row.items()}
    except (*UNDECODABLE, ValueError, TypeError):
        return None


def _readable(value: Any) -> Any:
    """Return the value as msgspec decodes it, or an Unreadable with the reason."""
    try:
        return msgspec.json.decode(json.dumps(value))
    except UNDECODABLE as error:
        reasons = (reason for scalar in _scalars(value) if (reason := _reason(scalar)))
        return Unreadable(next(reasons, f"is not JSON: {one_line(error)}"))


def _scalars(value: Any) -> Iterator[Any]:
    """Yield the keys and the values of lists and objects at any depth."""
    if isinstance(value, dict):
        yield from value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _scalars(item)
    yield value


def _reason(value: Any) -> str | None:
    """Say why a text or number cannot be read; None of any other value."""
    if isinstance(value, str) and (half := _HALF.search(value)):
        return f"it has half of a surrogate pair, \\u{ord(half[0]):04x}"
    if isinstance(value, float) and not math.isfinite(value):
        return "it has a number that is NaN, infinite or out of range"
    return None


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < _DIGITS else float(digits)


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the columns that `columns` names, under their new names.

    The row `{"task": "hi", "id": 7}` with `columns = {"instruction": "task"}` gives
    `{"instruction": "hi"}`. Raises BrokenRow if the row has none of the columns.
    """
    result = {name: row[column] for name, column in columns.items() if column in row}
    if not result:
        raise BrokenRow(f"has none of the columns {sorted(columns.values())}; it has {sorted(map(str, row))}")
    return result
