"""The fast path: decode rows whose turns have the fields of `Message` directly with msgspec.

`{"messages": [{"role": "user", "content": "hi"}, ...]}` is such a row. All other rows, for example
with `from` and `value`, are read by their layout, with the same result but ten times slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec

from sftstream.formats.fields import Row, refuse_deep
from sftstream.formats.tools import parse_calls, parse_tools
from sftstream.records import UNDECODABLE, Conversation, Message, Refused, ToolCalls


def typed_json(text: bytes) -> Conversation | None:
    """Return the conversation of a row of JSON text; None if the row does not fit `_TypedJson`."""
    if not text.startswith(_BEGINNING):
        return None
    try:
        typed = _TYPED.decode(text)
        tools = _known_tools(bytes(typed.tools)) if typed.tools else ()
    except (*UNDECODABLE, Refused):
        return None
    return Conversation(typed.messages, tools) if _answered(typed.messages) else None


class _Typed(msgspec.Struct, gc=False):
    """A row whose turns have only the fields of `Message`, and without a system prompt column."""

    messages: tuple[Message, ...]
    system: None = None
    system_prompt: None = None


class _TypedJson(_Typed, forbid_unknown_fields=True, gc=False):
    """A `_Typed` row without other columns: msgspec would not limit their nesting."""

    tools: msgspec.Raw = msgspec.Raw()


def _tool_calls(_type: type, value: Any) -> ToolCalls:
    refuse_deep([[[value]]])  # tool calls are three levels deep in a row
    return parse_calls(value, "tool_calls")


_TYPED = msgspec.json.Decoder(_TypedJson, dec_hook=_tool_calls)


_BEGINNING = b'{"messages"'
"""First bytes of a row that `_TYPED` tries to decode."""


def typed_messages(row: Row) -> tuple[Message, ...] | None:
    """Return the messages of a row; None if the row does not fit `_Typed`."""
    try:
        messages = msgspec.convert(row, _Typed, dec_hook=_tool_calls).messages
    except msgspec.ValidationError:
        return None
    if not _answered(messages):
        return None
    if len(row) > 1:
        refuse_deep([value for column, value in row.items() if column != "messages"])
    return messages


def _answered(messages: Sequence[Message]) -> bool:
    """Return True if each message has content or tool calls, and one is from the assistant."""
    answered = False
    for message in messages:
        if message.content is None and not message.tool_calls:
            return False
        answered = answered or message.role == "assistant"
    return answered


@lru_cache(maxsize=128)
def _known_tools(text: bytes) -> tuple[dict[str, Any], ...]:
    """Return the tool definitions of JSON text. Cached, since many conversations share tools."""
    tools = msgspec.json.decode(text)
    refuse_deep([tools])
    return parse_tools(tools)
