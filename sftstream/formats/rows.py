"""A stored row -> Conversation: the fast path first, then the layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from sftstream.formats.fields import Row
from sftstream.formats.layouts import parse_layout
from sftstream.formats.tools import parse_tools
from sftstream.formats.typed import typed_json, typed_messages
from sftstream.records import UNDECODABLE, BrokenRow, Conversation, RawRow, Refused


def parse_row(row: RawRow, columns: Mapping[str, str] | None = None) -> Conversation:
    """Return the conversation that a stored row holds.

    `columns` renames a source's own columns: {"instruction": "q"} reads column `q` as
    `instruction`. Raises BrokenRow if the row is not JSON or has none of the columns, and Refused,
    naming the field, if the layout is not understood.
    """
    if columns is None and isinstance(row, bytes) and (conversation := typed_json(row)):
        return conversation
    decoded = decode_row(row)
    if not isinstance(decoded, Mapping):
        raise Refused("unknown layout", f"the row is a {type(decoded).__name__}, not an object with columns")
    fields = decoded if columns is None else _renamed(decoded, columns)
    messages = typed_messages(fields) or parse_layout(fields)
    if not messages:
        raise Refused("empty conversation", "it has no messages")
    if not any(message.role == "assistant" for message in messages):
        raise Refused("no assistant message", f"its roles are {[message.role for message in messages]}")
    return Conversation(messages, parse_tools(fields.get("tools")))


def decode_row(row: RawRow) -> Any:
    """Return the value of a row's JSON text, or a table's row unchanged.

    Raises BrokenRow if the text is not JSON.
    """
    if not isinstance(row, bytes):
        return row
    try:
        return msgspec.json.decode(row)
    except UNDECODABLE as error:
        raise BrokenRow(f"is not JSON: {error}") from None


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the columns that `columns` names, under the names that a layout knows."""
    result = {name: row[column] for name, column in columns.items() if column in row}
    if not result:
        raise BrokenRow(f"has none of the columns {sorted(columns.values())}; it has {sorted(map(str, row))}")
    return result
