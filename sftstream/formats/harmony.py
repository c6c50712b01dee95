"""Read the channels of OpenAI's Harmony format, whose turns of the assistant are several messages.

    {"role": "assistant", "channel": "analysis", "content": "add them"}
    {"role": "assistant", "channel": "commentary", "recipient": "functions.add", "content": "{}"}

    Message("assistant", None, "add them", (ToolCall("add", {}),))

https://cookbook.openai.com/articles/openai-harmony
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sftstream.excerpt import excerpt
from sftstream.formats.fields import in_turns
from sftstream.formats.tools import parse_calls
from sftstream.records import Refused, ToolCalls

HARMONY = frozenset({"channel", "recipient"})
"""Keys of a message's channel, and of the tool that a message is for."""
CHANNELS = ("analysis", "commentary", "final")
"""Channels of the assistant: reasoning, calls and texts beside them, and the answer."""
_FUNCTIONS = "functions."
_TO_ALL = (None, "", "all", "user", "assistant")
"""Recipients of a message that calls no tool."""


Content = tuple[str | None, str | None, ToolCalls]
"""Text, reasoning and tool calls of a message."""


def has_channel(turn: Mapping[str, Any]) -> bool:
    """Return True for a message in a channel or to a function; other values are notes."""
    return turn.get("channel") in CHANNELS or function_in(turn.get("recipient")) is not None


def function_in(name: Any) -> str | None:
    """Return "add" of "functions.add", a recipient or the role of a tool; None of another name."""
    return name.removeprefix(_FUNCTIONS) if isinstance(name, str) and name.startswith(_FUNCTIONS) else None


def by_channel(turn: Mapping[str, Any], content: Content, path: str) -> Content:
    """Return the content of an assistant's message as its channel and its recipient say.

    The words of a message to a function are the arguments of a call, and the words of an analysis
    are reasoning. Other channels change nothing. Raises Refused if the message is for another tool.
    """
    text, reasoning, calls = content
    if name := function_in(turn.get("recipient")):
        return None, reasoning, ToolCalls((*calls, *parse_calls({"name": name, "arguments": text}, path)))
    if (recipient := turn.get("recipient")) not in _TO_ALL:
        raise Refused(
            "bad messages",
            f"{path} is for {excerpt(recipient)}, and only a call of functions.NAME can be read; leave the row out, or "
            f"read the message as words of its channel by ignore = [{in_turns(path, 'recipient')}]",
        )
    return (None, (reasoning or "") + (text or ""), calls) if turn["channel"] == "analysis" else content
