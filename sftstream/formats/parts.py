"""Read the content of a message: a text, or a list of typed parts (OpenAI, Anthropic).

    [{"type": "thinking", "thinking": "add them"}, {"type": "text", "text": "seven"}]

has the text "seven" and the reasoning "add them".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from sftstream.excerpt import excerpt
from sftstream.formats.fields import is_list, optional_id, refuse_deep, require_text
from sftstream.formats.keys import KEEP_ONE, only_value, require_plain
from sftstream.formats.tools import parse_calls
from sftstream.records import Message, Refused, ToolCall, ToolCalls

_TEXT = ("text", "output_text", "input_text")
"""Types of parts that hold text."""
_REASONING = ("reasoning", "thinking", "reasoning_text", "summary_text")
"""Types of parts that hold reasoning."""
_CALLS = ("tool_call", "tool_use")
"""Types of parts that hold a tool call."""
_KEYS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(_TEXT, ("text", "value")),
    **{kind: (kind, "text", "value") for kind in _REASONING},
    **dict.fromkeys(_CALLS, ("value", "tool_call", "name")),
    "tool_result": ("content",),
    **{kind: (kind, "image_url", "source", "url") for kind in ("image", "input_image", "image_url")},
}
"""Type of a part -> keys of its value."""


def parse_parts(content: Any, path: str, ignored: Collection[str] = ()) -> tuple[str | None, str | None, ToolCalls]:
    """Return the text, the reasoning and the tool calls of a content.

    The content is a text or a list of typed parts. Raises Refused if a part has an unknown type, if
    a key that is not `ignored` is a mark or holds further words, or if the parts are not in the
    order in which templates print them: reasoning, text, calls.
    """
    if content is None or isinstance(content, str):
        return content, None, ToolCalls()
    if not is_list(content):
        raise Refused("not text", f"{path} has content {excerpt(content)}, neither text nor a list of parts")
    texts, reasonings = [], []
    calls: list[ToolCall] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _CALLS:
            calls += _calls(part, path, ignored)
        elif kind in _TEXT:
            texts.append(_words(part, _KEYS[kind], path, ignored))
        elif kind in _REASONING:
            reasonings.append(_words(part, _KEYS[kind], path, ignored))
        else:
            raise Refused(
                "unknown content part", f"{path} has a part {excerpt(part)}; text, reasoning, tool_call are known"
            )
        if (kind in _REASONING and (any(texts) or calls)) or (kind in _TEXT and texts[-1] and calls):
            raise Refused(
                "bad messages",
                f"{path} has {kind} after {'tool calls' if calls else 'text'}, and templates print reasoning, then text, "
                "then calls; divide the message into several messages",
            )
    return "".join(texts) if texts else None, "".join(reasonings) or None, ToolCalls(calls)


def parts_in(text: str) -> list[Any] | None:
    """Return the typed parts that a JSON text spells out; None of any other text.

    `'[{"type": "text", "text": "hi"}]'` gives `[{"type": "text", "text": "hi"}]`.
    """
    if not text.startswith("[{") or '"type"' not in text:
        return None
    try:
        parts = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    if not all(isinstance(part, dict) and _has_value(part) for part in parts):
        return None
    refuse_deep(parts)
    return list(parts)


def _has_value(part: Mapping[str, Any]) -> bool:
    """Return True for a part of a known type with a value in one of the keys of the type."""
    kind = part.get("type")
    return isinstance(kind, str) and any(part.get(key) is not None for key in _KEYS.get(kind, ()))


def _words(part: Mapping[str, Any], keys: Sequence[str], path: str, ignored: Collection[str]) -> str:
    """Return the text of a part, which is the value of one of `keys`."""
    require_plain(part, keys, path, ignored)
    return require_text(only_value(part, keys, path, KEEP_ONE), path)


def _calls(part: Mapping[str, Any], path: str, ignored: Collection[str]) -> ToolCalls:
    """Return the calls of a part: inside of a key, or the part itself."""
    inside = only_value(part, ("value", "tool_call"), path, KEEP_ONE)
    if not inside:
        return parse_calls(part, path, ignored)
    require_plain(part, ("value", "tool_call"), path, ignored)
    return parse_calls(inside, path, ignored)


def split_results(content: Sequence[Any], path: str, ignored: Collection[str]) -> tuple[list[Message], list[Any]]:
    """Return a tool's message for each part of the type `tool_result`, and the other parts.

    Raises Refused if a result follows other parts: Anthropic's Messages API requires results first.
    """
    is_result = [isinstance(part, Mapping) and part.get("type") == "tool_result" for part in content]
    count = sum(is_result)
    if not all(is_result[:count]):
        raise Refused("bad messages", f"{path} has words before a tool_result; move the words after the results")
    return [_result(part, path, ignored) for part in content[:count]], list(content[count:])


def _result(part: Mapping[str, Any], path: str, ignored: Collection[str]) -> Message:
    """Return the tool's message of a part of the type `tool_result`."""
    require_plain(part, ("content",), path, ignored)
    result = part.get("content")
    if isinstance(result, Mapping):
        result = msgspec.json.encode(result).decode()
    text, reasoning, calls = parse_parts(result, path, ignored)
    if reasoning or calls:
        raise Refused("unknown content part", f"{path} has a tool_result {excerpt(result)}; only text can be read")
    return Message("tool", text or "", tool_call_id=optional_id(part, path, "tool_use_id"))
