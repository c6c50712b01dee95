"""Turns of a conversation -> messages: roles, content parts, tool calls, reasoning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import msgspec

from sftstream.excerpt import excerpt
from sftstream.formats.fields import Row, decoded, first, is_list, optional_text, require_text
from sftstream.formats.tools import parse_calls
from sftstream.records import REASONING_KEYS, Message, Refused, Role, ToolCall, ToolCalls

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Name of a role in datasets -> role in chat templates."""


def system_message(row: Row) -> Iterable[Message]:
    """Yield the message of a system prompt in a separate column, if any."""
    prompt = row.get("system") or row.get("system_prompt")
    if prompt:
        yield Message("system", require_text(prompt, "system"))


def parse_turns(row: Row, column: str) -> Iterable[Message]:
    """Yield the messages of a column that holds a list of turns."""
    turns = decoded(row[column])
    if not is_list(turns):
        raise Refused("bad messages", f"{column} is a {type(turns).__name__}, not a list of messages")
    yield from system_message(row)
    for index, turn in enumerate(turns):
        yield _plain(turn) or _message(turn, f"{column}[{index}]")


def _plain(turn: Any) -> Message | None:
    """Return the message of a turn with just a role and a text; None of any other turn.

    Most turns are plain; `_message` would give the same message in ten times the time.
    """
    if type(turn) is not dict or len(turn) != 2:
        return None
    role, content = turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")
    if type(role) is str and type(content) is str and role in ROLES and role != "function_call":
        return Message(ROLES[role], content)
    return None


def _message(turn: Any, path: str) -> Message:
    if not isinstance(turn, Mapping):
        raise Refused("bad messages", f"{path} is a {type(turn).__name__}, not an object")
    named = first(turn, "role", "from")
    role = ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise Refused("unknown role", f"{path} has role {named!r}; known are {', '.join(ROLES)}")
    content = first(turn, "content", "value")
    if named == "function_call":
        text, reasoning, calls = None, None, parse_calls(content, path)
    else:
        text, reasoning, calls = _parts(content, role, path)
    fields = [parse_calls(turn.get(field), f"{path}.{field}") for field in ("tool_calls", "function_call")]
    calls = ToolCalls(chain(calls, *fields))
    if text is None and not calls:
        raise Refused("message without content", f"{path} ({role}) has neither content nor tool calls")
    return Message(
        role=role,
        content=text,
        reasoning=reasoning or optional_text(turn, path, *REASONING_KEYS),
        tool_calls=calls,
        name=optional_text(turn, path, "name"),
        tool_call_id=optional_text(turn, path, "tool_call_id"),
        train=_train(turn, path),
    )


def _train(turn: Mapping[str, Any], path: str) -> bool | None:
    """Return a turn's `train` (a boolean) or `weight` (0 or 1) as a boolean, or None."""
    flag = first(turn, "train", "weight")
    if flag is not None and flag not in (0, 1):
        raise Refused("bad weight", f"{path} has train or weight {excerpt(flag)}; use true or false, 1 or 0")
    return None if flag is None else bool(flag)


def _parts(content: Any, role: str, path: str) -> tuple[str | None, str | None, ToolCalls]:
    """Return text, reasoning and tool calls of content: a text, or a list of typed parts."""
    if content is None or isinstance(content, str):
        return content, None, ToolCalls()
    if role == "tool" and isinstance(content, Mapping):
        # Some datasets store tool results as objects, but a template prints text.
        return msgspec.json.encode(content).decode(), None, ToolCalls()
    if not is_list(content):
        raise Refused("not text", f"{path} has content {excerpt(content)}, neither text nor a list of parts")
    texts, reasonings = [], []
    calls: list[ToolCall] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "tool_call":
            calls += parse_calls(part.get("value"), path)
        elif kind in ("text", "output_text", "input_text"):
            texts.append(require_text(first(part, "text", "value"), path))
        elif kind in ("reasoning", "thinking"):
            reasonings.append(require_text(first(part, kind, "text", "value"), path))
        else:
            raise Refused(
                "unknown content part", f"{path} has a part {excerpt(part)}; text, reasoning, tool_call are known"
            )
    return "".join(texts) if texts else None, "".join(reasonings) or None, ToolCalls(calls)
