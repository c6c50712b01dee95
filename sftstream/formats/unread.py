"""Find columns and keys that are not read, so that no words of a conversation are lost silently.

A row is refused if a column that is not read has a name known for words of a conversation, such as
"context", and its words are missing from the conversation. Other columns that are not read, such as
"id" and "score", are named to the user.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from sftstream.config import RowSettings
from sftstream.excerpt import excerpt
from sftstream.formats.fields import (
    ANSWERS,
    EMPTY,
    SYSTEM,
    TOOLS,
    Row,
    carries_words,
    decoded,
    is_list,
    spellings,
    texts_in,
)
from sftstream.formats.keys import COMMON_WORDS, MEDIA, REASONINGS
from sftstream.formats.layouts import LAYOUTS, ROUND_KEYS, columns_read, find_layout, is_mode, is_rounds
from sftstream.formats.messages import unread_keys
from sftstream.records import REASONING_KEYS, BrokenRow, Conversation, Refused, Unreadable

VARIABLES = "chat_template_kwargs"
"""Column of variables for the chat template."""
_OF_LAYOUTS = {name for layout in LAYOUTS for names in (*layout.required, *layout.optional) for name in names}
WORDS = frozenset(_OF_LAYOUTS | {*SYSTEM, *TOOLS} | COMMON_WORDS)
"""Names of columns known to hold words of a conversation, in small letters."""


def tools_of(row: Row) -> Any:
    """Return the row's tool definitions as stored; None if the row has no tool definitions."""
    return next((row[column] for column in TOOLS if row.get(column)), None)


@lru_cache(maxsize=4096)
def is_for_words(column: str) -> bool:
    """Return True for a name in `WORDS`, also if spelled "Chat History" or "chatHistory"."""
    return not WORDS.isdisjoint(spellings(column))


@lru_cache(maxsize=4096)
def has_words_beside_messages(columns: tuple[str, ...]) -> bool:
    """Return True if columns besides `messages` and `tools` may hold words of a conversation."""
    return any(is_for_words(column) for column in columns if column not in ("messages", "tools"))


def require_read(row: Row, conversation: Conversation, settings: RowSettings) -> None:
    """Raise Refused if a column holds words that are missing from the conversation."""
    present = tuple([column for column, value in row.items() if value is not None])
    valued = tuple([column for column, value in row.items() if value])
    if not (suspects := _suspects(present, valued, settings.columns is not None)):
        return
    remedy = "give the column a name in columns that this layout reads, or leave it out of columns"
    _require_within(
        " ".join(_words(conversation)),
        row,
        suspects,
        f"the layout {find_layout(row)} does not read",
        remedy if settings.columns is not None else None,
    )


def require_in_text(row: Row) -> None:
    """Raise Refused if a column holds words that are missing from the column `text`."""
    suspects = [column for column, value in row.items() if value and column != "text" and is_for_words(column)]
    _require_within(row["text"], row, suspects, "the column 'text' does not hold")


def answer_beside(row: Row, settings: RowSettings) -> str:
    """Return the remedy for turns with their answer in a column; "" without such a column."""
    turns = next((name for name in ("messages", "conversations", "conversation") if row.get(name)), None)
    answer = next((name for name in ANSWERS if row.get(name)), None)
    if turns is None or answer is None or settings.columns is not None:
        return ""
    same = [
        next((name for name in names if row.get(name)), None) for names in (SYSTEM, REASONING_KEYS, TOOLS, (VARIABLES,))
    ]
    columns = {"prompt": turns, "completion": answer} | {name: name for name in same if name}
    listed = ", ".join(f'{name} = "{column}"' for name, column in columns.items())
    return f"; read the answer in column {answer!r} by columns = {{{listed}}}"


def _require_within(read: str, row: Row, suspects: Iterable[str], lack: str, remedy: str | None = None) -> None:
    """Raise Refused if a column of `suspects` holds words that are missing from the text `read`."""
    words = " ".join(read.split())
    for column in suspects:
        texts = texts_in(decoded(row[column])) if _carries(column, row[column]) else ()
        if not MEDIA.isdisjoint(spellings(column)) or not all(_within(" ".join(text.split()), words) for text in texts):
            usual = f"read the column under a known name by columns = {{...}}, or leave the column out by ignore = [{column!r}]"
            raise Refused(
                "unread words", f"column {column!r} holds words that {lack}: {excerpt(row[column])}; {remedy or usual}"
            )


def _within(text: str, words: str) -> bool:
    """Return True if a text is among words, not inside of one: "on" is not in "once"."""
    start = words.find(text)
    while start >= 0:
        end = start + len(text)
        borders = (words[start - 1 : start] + text[:1], text[-1:] + words[end : end + 1])
        if not any(len(border) == 2 and border.isascii() and border.isalnum() for border in borders):
            return True
        start = words.find(text, start + 1)
    return False


@lru_cache(maxsize=4096)
def _suspects(present: tuple[str, ...], valued: tuple[str, ...], renamed: bool) -> tuple[str, ...]:
    """Return the columns that have a value, may hold words, and are not read by the row's layout.

    With `renamed`, that is with `columns` in the settings, every column may hold words.
    """
    read = _read({column: column in valued for column in present})
    return tuple(column for column in valued if (renamed or is_for_words(column)) and column not in read)


def require_readable(row: Row, settings: RowSettings) -> None:
    """Raise BrokenRow if a column that may hold words has a value that Python cannot hold."""
    for column, value in row.items():
        if type(value) is Unreadable and (is_for_words(column) or column == VARIABLES or settings.columns is not None):
            raise BrokenRow(f"cannot be decoded: column {column!r}: {value.reason}")


def unread_names(row: Row, settings: RowSettings) -> set[str]:
    """Return the names of the columns of a row, and of the keys of its turns, that are not read.

    An empty value, such as `"input": ""` of an Alpaca row, counts as no column.
    Keys of turns are named like `messages[].score`. Raises Refused if the layout is unknown.
    """
    read = _read(row)
    names = {str(column) for column, value in row.items() if column not in read and value not in EMPTY}
    for column in read & {"messages", "conversations", "conversation"}:
        turns = decoded(row[column])
        known = ROUND_KEYS if column == "conversation" and is_rounds(turns) else None
        names |= {f"{column}[].{key}" for key in unread_keys(turns, settings, known)}
    return names


def _read(row: Row) -> set[str]:
    """Return the names of the row's columns that are read, tool definitions included."""
    tools = next((column for column in TOOLS if row.get(column)), None)
    return columns_read(row, find_layout(row)) | {VARIABLES} | ({tools} if tools else set())


def _carries(column: str, value: Any) -> bool:
    """Return True if the value of the column may hold words of a conversation."""
    if not REASONINGS.isdisjoint(spellings(column)) and is_mode(value):
        return False
    if column == "data":  # a common name, often of other things than texts
        value = decoded(value)
        return is_list(value) and any(isinstance(text, str) for text in value)
    return carries_words(value)


def _words(conversation: Conversation) -> Iterator[str]:
    """Yield the contents and reasonings of a conversation, and the texts of its tools."""
    for message in conversation.messages:
        yield from filter(None, (message.content, message.reasoning))
    yield from texts_in(conversation.tools)
