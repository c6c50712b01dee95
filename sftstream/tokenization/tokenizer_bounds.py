"""Refuse a tokenizer.json whose tables or texts would outgrow the memory, before it is loaded.

Example: 34 normalizers that each replace "a" by "aa" turn one letter into 17 GB.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

MOST_IDS = 2**24
"""Number of token ids; a table of sizes has an entry for each id, used or not."""
MOST_GROWTH = 1000.0
"""Limit of a normalized text's length, as a multiple of the text's length."""

_GROWTH = {"NFD": 4.0, "NFKD": 18.0, "NFC": 3.0, "NFKC": 18.0, "Precompiled": 18.0, "ByteLevel": 4.0}
"""Most characters that a normalizer makes of one character; 1 for types that are not listed."""


class _Model(msgspec.Struct):
    vocab: Any = None
    dropout: float | None = None


class _Added(msgspec.Struct):
    id: int
    content: str = ""


class _File(msgspec.Struct):
    model: _Model
    normalizer: dict[str, Any] | None = None
    added_tokens: list[_Added] = []


def require_bounded(description: str | bytes, name: str) -> None:
    """Raise ValueError if a tokenizer.json has an id too large, a normalizer too greedy, or chance.

    `name` is the directory or hub name for the message.
    """
    file = msgspec.json.decode(description, type=_File)
    vocabulary = file.model.vocab.items() if isinstance(file.model.vocab, dict) else ()
    ids = [(token, index) for token, index in vocabulary if not _is_id(index)]
    ids += [(token.content, token.id) for token in file.added_tokens if not _is_id(token.id)]
    if ids:
        token, index = ids[0]
        raise ValueError(
            f"tokenizer {name!r} has the id {index!r} for {token[:40]!r}; ids are numbers from 0 to {MOST_IDS - 1}, "
            "without large gaps: number the tokens anew"
        )
    if (growth := _growth(file.normalizer)) > MOST_GROWTH:
        raise ValueError(
            f"tokenizer {name!r} has normalizers that may make a text {growth:.3g} times as long, above the limit of "
            f"{MOST_GROWTH:.0f}; remove replacements from its normalizer"
        )
    if file.model.dropout:
        raise ValueError(
            f"tokenizer {name!r} draws its merges by chance (dropout = {file.model.dropout}), so no run could be "
            'repeated; set "dropout" of its model to null'
        )


def _is_id(index: Any) -> bool:
    return type(index) is int and 0 <= index < MOST_IDS


def _growth(normalizer: dict[str, Any] | None) -> float:
    """Return a bound of the length of a normalized text, as a multiple of the text's length."""
    if normalizer is None:
        return 1.0
    if normalizer.get("type") == "Sequence":
        return math.prod(map(_growth, normalizer["normalizers"]))
    if normalizer.get("type") == "Replace":
        pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
        # A regular expression may match between any two characters, as an empty text does.
        return max(1.0, len(content) / len(pattern)) if pattern else 1.0 + len(content)
    return _GROWTH.get(str(normalizer.get("type")), 1.0)
