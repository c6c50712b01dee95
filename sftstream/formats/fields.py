"""Read the values of a row: decode JSON text, require text, limit the nesting."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from sftstream.excerpt import excerpt
from sftstream.records import Refused

Row = Mapping[str, Any]
"""A decoded row: column -> value."""

QUESTIONS = ("prompt", "question", "query", "input")
"""Names of a column with a question; the first name present is read."""
ANSWERS = ("completion", "response", "answer", "output", "chosen")
"""Names of a column with an answer; the first name present is read."""

SYSTEM = ("system", "system_prompt", "system_message")
"""Names of a column with the system prompt; the first with a value is read."""
TOOLS = (
    *("tools", "functions", "tool_defs", "tool_definitions", "tools_definitions", "function_definitions"),
    *("available_tools", "available_functions", "tool_schemas", "tools_schema", "tool_list"),
)
"""Names of a column with tool definitions; the first with a value is read."""

_SCALARS = frozenset({str, int, float, bool, type(None)})


EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values of a column or key without content."""
NESTING = 64
"""Largest depth of nested lists and objects in a row: `{"a": [1]}` has the depth 2.

The limit is fixed, because the depth that Python's recursion limit allows depends on the caller.
"""


def decoded(value: Any) -> Any:
    """Return the list, the object or the null of a JSON text; return any other value unchanged.

    `'[1]'` gives `[1]`; `'hi'`, `'[hi'` and `[1]` are returned unchanged.
    """
    if not isinstance(value, str):
        return value
    if value == "null":
        return None  # json.dumps(None), as some datasets store a missing list or object
    if value.lstrip()[:1] in ("[", "{"):
        try:
            decoded = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            return value
        refuse_deep(decoded)
        return decoded
    return value


def refuse_deep(value: Any) -> None:
    """Raise Refused if the value nests lists and objects more than `NESTING` levels deep."""
    if not isinstance(value, str) and not _nested_within(NESTING, value):
        raise Refused("nested too deep", f"the row nests lists and objects more than {NESTING} levels deep; flatten it")


def _nested_within(levels: int, value: Any) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [inner for outer in layer for inner in _items(outer) if type(inner) not in _SCALARS]
        if not layer:
            return True
    return False


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, (dict, Mapping)):  # `dict` first: isinstance is slow for an abstract class
        return value.values()
    return value if is_list(value) else ()


def is_list(value: Any) -> bool:
    """Return True for a list or another sequence, but False for text and bytes."""
    return isinstance(value, list) or (isinstance(value, Sequence) and not isinstance(value, str | bytes))


def first(fields: Mapping[str, Any], *names: str) -> Any:
    """Return the first of the named fields that is not None; None if there is no such field.

    A table stores a missing field as None, so None counts as missing.
    """
    for name in names:
        if (value := fields.get(name)) is not None:
            return value
    return None


_AT_CAPITALS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+")
"""Borders of the words in a name such as "chatHistory" or "Chat history"."""


@lru_cache(maxsize=4096)
def spellings(name: Any) -> tuple[Any, ...]:
    """Return a name as given and in the spellings of this package: "chat_history", "cot".

    "chatHistory" has its words joined by "_", and "CoT" is in small letters. A key from Python that
    is no text, such as 5, has no other spelling.
    """
    if not isinstance(name, str):
        return (name,)
    return name, name.lower(), _AT_CAPITALS.sub("_", name).lower()


def without_ignored(fields: Mapping[str, Any], ignored: Collection[str]) -> Mapping[str, Any]:
    """Return the fields whose name is `ignored` in none of its spellings."""
    if not ignored:
        return fields
    return {key: value for key, value in fields.items() if not any(name in ignored for name in spellings(key))}


def in_turns(path: str, key: str) -> str:
    """Return the entry of `ignore` for a key of the turns in a path, as text.

    The key "mask" at "messages[1].tool_calls" gives "'messages[].mask'".
    """
    return repr(f"{path.partition('[')[0]}[].{key}")


def carries_words(value: Any) -> bool:
    """Return True for a text that is not blank, and for a list or an object that is not empty."""
    return bool(value.strip() if isinstance(value, str) else isinstance(value, Mapping | Sequence) and value)


def texts_in(value: Any) -> Iterator[str]:
    """Yield all texts in lists and objects at any depth, except values of role and type keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ("role", "from", "type"):
                yield from texts_in(item)
    elif is_list(value):
        for item in value:
            yield from texts_in(item)


def optional_text(fields: Mapping[str, Any], path: str, *names: str) -> str | None:
    """Return the text of the first of the named fields that is not None; None without such a field.

    Raises Refused, naming `path`, if the field is not a text.
    """
    value = first(fields, *names)
    return None if value is None else require_text(value, f"{path}.{names[0]}")


def optional_id(fields: Mapping[str, Any], path: str, *names: str) -> str | None:
    """Return the id of a call, as `optional_text` does; some datasets number the calls."""
    value = first(fields, *names)
    if value is None or type(value) is str:
        return value
    return str(value) if type(value) is int else require_text(value, f"{path}.{names[0]}")


def require_text(value: Any, path: str) -> str:
    """Return the value if it is a text; otherwise raise Refused, naming `path`."""
    if not isinstance(value, str):
        raise Refused("not text", f"{path} is a {type(value).__name__}: {excerpt(value)}")
    return value
