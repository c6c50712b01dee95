"""The keys of an object inside a conversation: a turn, an item, a part, a call, a round.

No words are lost silently: a key that is known to hold words is read, or the row is refused. The
same holds for two keys with different values of one meaning.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sftstream.excerpt import excerpt
from sftstream.formats.exclusions import refuse_marks
from sftstream.formats.fields import carries_words, in_turns
from sftstream.records import REASONING_KEYS, Refused

CONTENT = ("content", "value", "text")
"""Keys of a turn's content."""
ARGUMENTS = ("arguments", "parameters", "input")
"""Keys of the arguments of a call."""
WORDS = frozenset(
    {*CONTENT, *REASONING_KEYS, "thought", "thoughts", "reasoning_text", "refusal", "instruction", "response"}
    | {"tools", "functions", "tool_defs", "context", "documents", "system", "input", "output", "arguments"}
    | {"image", "images", "image_url", "audio", "audios", "video", "videos"}
)
"""Keys that are known to hold words of a conversation."""


def require_read(fields: Mapping[str, Any], read: Collection[str], path: str, ignored: Collection[str] = ()) -> None:
    """Raise Refused if a key in `WORDS` holds words, and is neither in `read` nor `ignored`."""
    unread = [key for key in WORDS.intersection(fields) if key not in read and key not in ignored]
    if unread := sorted(key for key in unread if carries_words(fields[key])):
        raise Refused(
            "unread words",
            f"{path}.{unread[0]} holds words that no layout reads: {excerpt(fields[unread[0]])}; move them to content "
            f"or a column, or leave them out by ignore = [{in_turns(path, unread[0])}]",
        )


def require_plain(part: Mapping[str, Any], read: Collection[str], path: str, ignored: Collection[str]) -> None:
    """Raise Refused if a part of a message has a mark, or words in a key that is not in `read`.

    Keys in `ignored` are left out.
    """
    refuse_marks(part, path, ignored)
    require_read(part, read, path, ignored)


def only_value(fields: Mapping[str, Any], names: Sequence[str], path: str) -> Any:
    """Return the value of keys of the same meaning; None if no key has a value.

    An empty value beside another counts as none. Raises Refused if two values differ.
    """
    present = {name: fields[name] for name in names if fields.get(name) is not None}
    filled = {name: value for name, value in present.items() if not _is_empty(value)}
    values = [*filled.values()]
    if any(value != values[0] for value in values[1:]):
        raise Refused(
            "two contents",
            f"{path} has different contents in {[*filled]}; leave out the wrong keys by ignore = "
            f"[{in_turns(path, next(iter(filled)))}], for example",
        )
    return next(iter(values or present.values()), None)


def _is_empty(value: Any) -> bool:
    return not value.strip() if isinstance(value, str) else value in ([], {})
