"""Short forms of values for error messages."""

from __future__ import annotations

from typing import Any


def excerpt(value: Any, limit: int = 80) -> str:
    """Return `repr(value)`, cut to `limit` characters.

    `excerpt("abcdefghij", 9)` returns the nine characters `'abcde...`, of which the first is a
    quotation mark.
    """
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
