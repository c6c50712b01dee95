"""A stored row -> Conversation: the fast path first, then the layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from sftstream.config import RowSettings
from sftstream.formats.fields import Row, decoded, refuse_deep
from sftstream.formats.layouts import DEFAULT, parse_layout
from sftstream.formats.tools import parse_tools
from sftstream.formats.typed import typed_json, typed_messages
from sftstream.formats.unread import BESIDE_MESSAGES, VARIABLES, require_read, require_readable, tools_of, unread_names
from sftstream.records import UNDECODABLE, BrokenRow, Conversation, RawRow, Refused, Unreadable

_DIGITS = 4300
"""Digits of an integer that Python refuses to read."""


def parse_row(row: RawRow, settings: RowSettings = DEFAULT) -> Conversation:
    """Return the conversation that a stored row holds.

    Raises BrokenRow if the row is not JSON or has none of the columns of `settings.columns`, and
    Refused, naming the field, if the layout is not understood or words would be lost.
    """
    if isinstance(row, bytes) and len(row) > settings.max_row_bytes:
        raise _too_large(len(row), settings)
    plain = settings.columns is None and not settings.ignore and not settings.roles
    if plain and isinstance(row, bytes) and (conversation := typed_json(row)):
        return conversation
    fields = _fields(row, settings)
    if not isinstance(row, bytes) and (size := _size(fields, settings.max_row_bytes)) > settings.max_row_bytes:
        raise _too_large(size, settings)
    known = fields.keys().isdisjoint(BESIDE_MESSAGES)
    messages = typed_messages(fields) if known and (plain or not settings.roles) else None
    if messages is None:
        require_readable(fields, settings)
        messages = parse_layout(fields, settings)
    if not messages:
        raise Refused("empty conversation", "it has no messages")
    if not any(message.role == "assistant" for message in messages):
        raise Refused("no assistant message", f"its roles are {[message.role for message in messages]}")
    conversation = Conversation(messages, parse_tools(tools_of(fields)), _variables(fields))
    if not known or settings.columns is not None:
        require_read(fields, conversation, settings)
    return conversation


def _variables(fields: Row) -> dict[str, Any]:
    """Return the template's variables of a row; raises Refused unless they are an object.

    A variable without a value (null) is left out: a table gives each row all names of the column.
    """
    if not fields.get(VARIABLES):
        return {}
    variables = decoded(fields[VARIABLES])
    if not isinstance(variables, Mapping):
        raise Refused("bad template variables", f"{VARIABLES} is a {type(variables).__name__}, not an object")
    refuse_deep([variables])
    return {str(name): value for name, value in variables.items() if value is not None}


def unread_columns(row: RawRow, settings: RowSettings = DEFAULT) -> set[str]:
    """Return the columns of a row, and the keys of its messages, that nothing reads.

    Empty for a row that is refused.
    """
    try:
        return unread_names(_fields(row, settings), settings)
    except (Refused, BrokenRow):
        return set()


def decode_row(row: RawRow) -> Any:
    """Return the value of a row's JSON text, or a table's row unchanged.

    A column with NaN, a number out of range, or half a surrogate pair becomes an `Unreadable`.
    Raises BrokenRow if the text is not JSON.
    """
    if not isinstance(row, bytes):
        return row
    try:
        return msgspec.json.decode(row)
    except UNDECODABLE as error:
        if (columns := _readable_columns(row)) is not None:
            return columns
        raise BrokenRow(f"is not JSON: {error}") from None


def _too_large(size: int, settings: RowSettings) -> Refused:
    return Refused(
        "row too large",
        f"it has {size:,} bytes, more than max_row_bytes = {settings.max_row_bytes:,} of its source; raise "
        "max_row_bytes, or shorten the row",
    )


def _size(fields: Row, enough: int) -> int:
    """Return the size of a row's texts in characters, or a size above `enough`."""
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


def _fields(row: RawRow, settings: RowSettings) -> Row:
    """Return the columns of a row under the names that a layout knows, without ignored columns."""
    decoded = decode_row(row)
    if not isinstance(decoded, Mapping):
        raise Refused("unknown layout", f"the row is a {type(decoded).__name__}, not an object with columns")
    fields = decoded if settings.columns is None else _renamed(decoded, settings.columns)
    if settings.ignore:
        fields = {column: value for column, value in fields.items() if column not in settings.ignore}
    return fields


def _readable_columns(text: bytes) -> dict[str, Any] | None:
    """Return the columns of an object that Python's JSON reader accepts; None of any other text.

    `{"a": "x", "score": NaN}` gives `{"a": "x", "score": Unreadable("...")}`.
    """
    try:
        row = json.loads(text.decode(), parse_int=_integer)
        if not isinstance(row, dict):
            return None
        return {_column(json.dumps(column)): _column(json.dumps(value)) for column, value in row.items()}
    except (*UNDECODABLE, ValueError, TypeError):
        return None


def _column(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except UNDECODABLE as error:
        return Unreadable(f"is not JSON: {error}")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < _DIGITS else float(digits)


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the columns that `columns` names, under the names that a layout knows."""
    result = {name: row[column] for name, column in columns.items() if column in row}
    if not result:
        raise BrokenRow(f"has none of the columns {sorted(columns.values())}; it has {sorted(map(str, row))}")
    return result
