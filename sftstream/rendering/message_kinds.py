"""Compare messages by everything but their words, to render long conversations fewer times."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from sftstream.rendering.overlap import opens_thought
from sftstream.rendering.template import TemplateMessage


def representatives(messages: Sequence[TemplateMessage], indices: Sequence[int]) -> list[int]:
    """Divide `indices` into groups of similar messages; return the first and last of each group.

    The kind of a message is its role, its fields and which of them are blank (see `kind_of`). Two
    messages are similar if they have the same kind, their neighbours have the same kinds, the same
    kinds occur before them, and both or neither of them precede the last message of a user. If
    a template prints any message of a group differently once further messages follow, the first or
    the last message of the group shows the difference.
    """
    kinds = [kind_of(message) for message in messages]
    before = distinct_before(kinds)
    asked = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
    groups: dict[Hashable, list[int]] = {}
    for index in indices:
        neighbours = tuple(kinds[max(0, index - 1) : index + 2])
        groups.setdefault((neighbours, before[index], index < asked), []).append(index)
    return sorted({index for group in groups.values() for index in (group[0], group[-1])})


def kind_of(message: TemplateMessage) -> tuple[Any, ...]:
    """Return the kind of a message: everything that may change the template's text, except the
    message's words."""
    content = message["content"]
    return (
        message["role"],
        tuple(message),
        bool(content) and not content.isspace(),
        opens_thought(content),
        len(message.get("tool_calls", ())),
    )


def distinct_before(kinds: Sequence[Hashable]) -> list[int]:
    """Return for each index the number of different kinds before: `[0, 1, 1]` for "aab"."""
    seen: set[Hashable] = set()
    counts = []
    for kind in kinds:
        counts.append(len(seen))
        seen.add(kind)
    return counts
