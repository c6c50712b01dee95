"""Short, printable forms of values and messages."""

from __future__ import annotations

from typing import Any


def excerpt(value: Any, limit: int = 80) -> str:
    """Return `repr(value)`, cut to `limit` characters.

    `excerpt("abcdefghij", 9)` returns the nine characters `'abcde...`, of which the first is a
    quotation mark.
    """
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def printable(text: str) -> str:
    """Return `text` with control characters escaped, for a terminal; newlines and tabs stay.

    Example: `printable("a\\x1b[2J")` returns `"a\\\\x1b[2J"`, which clears no screen.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """Return the message of an error as a single printable line; without a message, its type."""
    return " ".join(printable(str(error)).split()) or type(error).__name__
