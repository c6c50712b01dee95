"""Find turns that a text spells out, so that a list of messages is never trained as words.

A column that should hold words, such as "prompt", may hold a conversation as text:

    '[{"role": "user", "content": "hi"}]'         JSON: returned as a list, where a list is read
    "[{'role': 'user', 'content': 'hi'}]"         Python's notation: refused
    '{"role": "user", "content": "hi"}'           a single message: refused
    '{"messages": [{"role": "user", ...}]}'       a row as text: refused
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Any

import msgspec

from sftstream.excerpt import excerpt
from sftstream.formats.fields import decoded, first, is_list, refuse_deep, require_text
from sftstream.formats.roles import ROLES
from sftstream.records import Refused

_KEY = r"""['"](?:role|from)['"]\s*:\s*['"](\w+)['"]"""
_SPELLED_TURNS = re.compile(rf"""\s*\[\s*\{{[^{{}}]{{0,200}}?{_KEY}""")
"""Beginning of a list of turns in JSON or in Python's notation: `[{'role': 'user'`."""
_SPELLED_TURN = re.compile(rf"""\s*\{{\s*{_KEY}\s*,\s*['"](?:content|value|text)['"]\s*:""")
"""Beginning of a turn in JSON or in Python's notation: `{'role': 'user', 'content':`."""
_CONTENT = ("content", "value", "text", "tool_calls")
"""Keys of which a turn has one or more."""
_ENCODED = 3
"""Number of times that a JSON text may be encoded as JSON text again."""


def require_words(value: Any, path: str, roles: Container[str] = ROLES) -> str:
    """Return the value if it is a text of words.

    Raises Refused for another type, and for a text that spells out turns.
    """
    text = require_text(value, path)
    if turns_in(text, path, roles) is not None:
        raise Refused(
            "bad messages",
            f"{path} holds a list of messages as text; read it by columns = {{messages = ...}} with the column's name",
        )
    return text


def turns_in(text: str, path: str, roles: Container[str] = ROLES) -> list[Any] | None:
    """Return the list of turns that a JSON text contains; None for a text of words.

    `roles` are the names of roles that make an object a turn. Raises Refused if the text spells out
    turns in another way.
    """
    if text.lstrip()[:1] not in ("[", "{", '"'):
        return None
    value = _decoded(text)
    if is_list(value) and any(_is_turn(turn, roles) for turn in value):
        refuse_deep(value)
        return list(value)
    if _spells_turns(value, text, roles):
        raise Refused(
            "bad messages",
            f"{path} spells out messages, but is not a JSON list of messages: {excerpt(text)}; write a JSON list, or, "
            "if the text is meant as words, write them as the content of a message",
        )
    return None


def _decoded(text: str) -> Any:
    """Return the value of a JSON text that may be encoded several times; None of any other text."""
    value: Any = text
    for _ in range(_ENCODED):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            return None
        if not isinstance(value, str):
            return value
    return None


def _spells_turns(value: Any, text: str, roles: Container[str]) -> bool:
    """Return True for a turn, an object with a list of turns, and turns in other notations."""
    if isinstance(value, Mapping):
        lists = [inner for inner in value.values() if is_list(inner)]
        whole_turn = _is_turn(value, roles) and first(value, *_CONTENT) is not None
        return whole_turn or any(_is_turn(turn, roles) for turns in lists for turn in turns)
    if value is not None:
        return False
    spelled = _SPELLED_TURNS.match(text) or _SPELLED_TURN.match(text)
    return spelled is not None and spelled[1].lower() in roles


def _is_turn(turn: Any, roles: Container[str]) -> bool:
    """Return True for an object, or the JSON text of an object, with a known role."""
    turn = decoded(turn)
    role = first(turn, "role", "from") if isinstance(turn, Mapping) else None
    return isinstance(role, str) and (role in roles or role.lower() in roles)
