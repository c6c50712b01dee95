"""Turns of a conversation -> messages: read role, content, tool calls, reasoning and marks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import msgspec

from sftstream.config import RowSettings
from sftstream.excerpt import excerpt
from sftstream.formats.exclusions import MARKS, parse_train
from sftstream.formats.fields import Row, carries_words, decoded, first, is_list, optional_text, require_text
from sftstream.formats.items import ITEMS, join_items, parse_item
from sftstream.formats.parts import parse_parts, split_results
from sftstream.formats.tools import parse_calls
from sftstream.records import REASONING_KEYS, Message, Refused, Role, ToolCalls

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "tool_result": "tool",
}
"""Name of a role in datasets, in small letters -> role of a `Message`."""

SYSTEM = ("system", "system_prompt", "system_message")
"""Names of a column with the system prompt; the first with a value is read."""

CALLING = frozenset({"function_call", "tool_call"})
"""Names of roles whose content is a tool call."""
_CONTENT = ("content", "value", "text")
"""Keys of a turn's content."""
_READ = frozenset(
    {"role", "from", "type", *_CONTENT, *MARKS, *REASONING_KEYS, "name", "tool_call_id", "tool_calls", "function_call"}
)
"""Keys of a turn that are read."""
_WORDS = frozenset(
    {"tools", "functions", "tool_defs", "context", "documents", "system", "input", "output", "thought", "thoughts"}
    | {"reasoning_text", "refusal", "images", "audio", "videos", "response", "arguments"}
)
"""Keys of a turn that are known to hold words of a conversation but are not read; refused."""
_SPELLED_TURNS = re.compile(r"""\s*\[\s*\{[^{}]{0,200}?['"](?:role|from)['"]\s*:\s*['"](\w+)['"]""")
"""Beginning of a list of turns in JSON or in Python's notation: `[{'role': 'user'`."""


def system_message(row: Row) -> Iterable[Message]:
    """Yield a message for the column of the system prompt, if the row has such a column."""
    for column in SYSTEM:
        if prompt := row.get(column):
            yield Message("system", require_text(prompt, "system"))
            return


def parse_turns(turns: Any, column: str, settings: RowSettings) -> list[Message]:
    """Return the messages of a column of turns.

    The column is a list of turns, or an object of lists, `{"role": ["user"], "content": ["hi"]}`.
    The whole column, or each turn, may be JSON text. Raises Refused if the turns cannot be read.
    """
    turns = decoded(turns)
    if isinstance(turns, Mapping):
        turns = _turned(turns, column)
    if not is_list(turns):
        raise Refused("bad messages", f"{column} is a {type(turns).__name__}, not a list of messages")
    roles = {**ROLES, **settings.roles} if settings.roles else ROLES
    messages: list[Message] = []
    has_items = False
    for index, turn in enumerate(turns):
        if message := _plain(turn, roles):
            messages.append(message)
            continue
        parsed = decoded(turn)
        has_items = has_items or _is_item(parsed)
        messages += _messages(parsed, f"{column}[{index}]", roles, settings)
    return join_items(messages) if has_items else messages


def parse_texts(texts: Sequence[Any], path: str) -> Iterator[Message]:
    """Yield the messages of a list of texts, which belong to user and assistant in turn."""
    for index, text in enumerate(texts):
        yield Message(("user", "assistant")[index % 2], require_words(text, f"{path}[{index}]"))


def require_words(value: Any, path: str) -> str:
    """Return the value if it is a text of words.

    Raises Refused for another type, and for a text that is a list of turns written as text.
    """
    text = require_text(value, path)
    if turns_in(text, path) is not None:
        raise Refused(
            "bad messages",
            f"{path} holds a list of messages as text; read it by columns = {{messages = ...}} with the column's name",
        )
    return text


def turns_in(text: str, path: str) -> list[Any] | None:
    """Return the list of turns that a JSON text contains; None for any other text.

    Raises Refused if the text contains a list of turns in another notation, such as Python's
    `[{'role': 'user', 'content': 'hi'}]`.
    """
    if text.lstrip()[:1] != "[":
        return None
    turns = decoded(text)
    if not isinstance(turns, str):
        return turns if turns and all(_is_turn(turn) for turn in turns) else None
    if (spelled := _SPELLED_TURNS.match(text)) and spelled[1].lower() in ROLES:
        raise Refused(
            "bad messages",
            f"{path} spells a list of messages that is not JSON: {excerpt(text)}; write the list as JSON",
        )
    return None


def unread_keys(turns: Any, settings: RowSettings) -> set[str]:
    """Return the keys in a list of turns that are neither read nor ignored by the settings."""
    turns = decoded(turns)
    messages = [turn for turn in map(decoded, turns if is_list(turns) else ()) if isinstance(turn, Mapping)]
    return {
        key
        for turn in messages
        if turn.get("type") not in ITEMS
        for key, value in turn.items()
        if value is not None and key not in _READ and key not in settings.ignore
    }


def _plain(turn: Any, roles: Mapping[str, Role]) -> Message | None:
    """Return the message of a plain turn, which has only a role and a text; otherwise None.

    Most turns are plain. `_messages` returns the same message but needs ten times as long.
    """
    if type(turn) is not dict or len(turn) != 2:
        return None
    role, content = turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")
    if type(role) is str and type(content) is str and role in roles and role not in CALLING:
        return Message(roles[role], content)
    return None


def _messages(turn: Any, path: str, roles: Mapping[str, Role], settings: RowSettings) -> Iterator[Message]:
    """Yield the messages of a turn.

    A turn gives one message, except a turn with results of tools: each result is a message of its
    own, followed by a message for the rest of the content.
    """
    if not isinstance(turn, Mapping):
        raise Refused("bad messages", f"{path} is a {type(turn).__name__}, not an object")
    if settings.ignore:
        turn = {key: value for key, value in turn.items() if key not in settings.ignore}
    if _is_item(turn) and turn["type"] != "message":
        yield from parse_item(turn, path)
        return
    named, role = _role(turn, path, roles)
    _require_read(turn, path)
    content = _content(turn, path)
    results: list[Message] = []
    if is_list(content) and role in ("user", "tool"):
        results, content = split_results(content, path)
    yield from results
    if results and not content:
        return
    text, reasoning, calls = _read_content(content, named, role, path)
    fields = [parse_calls(turn.get(field), f"{path}.{field}") for field in ("tool_calls", "function_call")]
    calls = ToolCalls(chain(calls, *fields))
    if text is None and not calls:
        raise Refused("message without content", f"{path} ({role}) has neither content nor tool calls")
    yield Message(
        role=role,
        content=text,
        reasoning=reasoning or optional_text(turn, path, *REASONING_KEYS),
        tool_calls=calls,
        name=optional_text(turn, path, "name"),
        tool_call_id=optional_text(turn, path, "tool_call_id"),
        train=parse_train(turn, path),
    )


def _role(turn: Mapping[str, Any], path: str, roles: Mapping[str, Role]) -> tuple[str, Role]:
    """Return the name of the turn's role, as in `ROLES`, and the role; raises Refused."""
    named = first(turn, "role", "from", "type")
    if isinstance(named, str):
        for name in (named, named.lower()):
            if role := roles.get(name):
                return name, role
    raise Refused(
        "unknown role", f"{path} has role {named!r}; known are {', '.join(roles)}; roles = {{...}} adds names"
    )


def _content(turn: Mapping[str, Any], path: str) -> Any:
    """Return the content of a turn; raises Refused if two keys hold different contents."""
    contents = [turn[key] for key in _CONTENT if turn.get(key) is not None]
    if any(content != contents[0] for content in contents[1:]):
        raise Refused(
            "two contents",
            f"{path} has different contents in {[key for key in _CONTENT if turn.get(key)]}; leave out the wrong keys "
            "by ignore = [...]",
        )
    return contents[0] if contents else None


def _read_content(content: Any, named: str, role: Role, path: str) -> tuple[str | None, str | None, ToolCalls]:
    """Return the text, the reasoning and the tool calls in the content of a turn."""
    if named in CALLING:
        return None, None, parse_calls(content, path)
    if role == "tool" and isinstance(content, Mapping):
        # Some datasets store tool results as objects, but a template prints text.
        return msgspec.json.encode(content).decode(), None, ToolCalls()
    return parse_parts(content, path)


def _require_read(turn: Mapping[str, Any], path: str) -> None:
    """Raise Refused if a key of the turn holds words that are not read."""
    if unread := sorted(key for key in _WORDS.intersection(turn) if carries_words(turn[key])):
        raise Refused(
            "unread words",
            f"{path}.{unread[0]} holds words that no layout reads: {excerpt(turn[unread[0]])}; move them to content "
            f"or a column, or leave them out by ignore = [{unread[0]!r}]",
        )


def _is_turn(turn: Any) -> bool:
    """Return True for an object with a known role."""
    role = first(turn, "role", "from") if isinstance(turn, Mapping) else None
    return isinstance(role, str) and role.lower() in ROLES


def _is_item(turn: Any) -> bool:
    """Return True for an item of the Responses API (`items.py`)."""
    return (
        isinstance(turn, Mapping) and turn.get("type") in ITEMS and (turn["type"] == "message" or not turn.get("role"))
    )


def _turned(columns: Mapping[str, Any], path: str) -> Any:
    """Return the turns of an object of lists, the form in which `datasets` stores lists of objects.

    `{"role": ["user", "assistant"], "content": ["hi", "hello"]}` gives
    `[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]`.
    """
    lists = {key: value for key, value in columns.items() if value is not None}
    if not lists.keys() & {"role", "from"} or not all(is_list(value) for value in lists.values()):
        return columns
    if len(set(map(len, lists.values()))) > 1:
        lengths = {key: len(value) for key, value in lists.items()}
        raise Refused("bad messages", f"{path} is an object of lists of different lengths: {lengths}")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
