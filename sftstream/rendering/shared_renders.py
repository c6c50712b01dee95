"""Share renders between the messages of a long conversation.

Messages of one kind, equal but for their words, look alike to a template: `representatives` names
those that have to be rendered, and `Tails` renders the beginnings of a conversation, with the
generation prompt, as few times as possible.

Example. The template prints `<{{ m.role }}>{{ m.content }}</s>` for each message; its generation
prompt is `<assistant>`. Before the answer to a user's "hi" the messages render as
`<user>hi</s><assistant>`, and the tail is the text after "hi": `</s><assistant>`. An answer to
another question of a user has the same tail, without a render of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any, Protocol

from sftstream.records import Refused
from sftstream.rendering.locate import Located
from sftstream.rendering.markers import Marked, mark
from sftstream.rendering.overlap import alike, opens_thought
from sftstream.rendering.template import ChatTemplate, TemplateMessage


def representatives(messages: Sequence[TemplateMessage], indices: Sequence[int]) -> list[int]:
    """Return the first and the last message of each of the `similar` groups of `indices`.

    If a template prints any message of a group differently once further messages follow, the first
    or the last message of the group shows the difference.
    """
    return sorted({index for group in similar(messages, indices) for index in (group[0], group[-1])})


def similar(messages: Sequence[TemplateMessage], indices: Sequence[int]) -> list[list[int]]:
    """Divide `indices` into groups of similar messages.

    The kind of a message is its role, its fields and which of them are blank (see `kind_of`). Two
    messages are similar if they have the same kind, their neighbours have the same kinds, equal
    kinds occur before, and both or neither precede the last message of a user.
    """
    kinds = [kind_of(message) for message in messages]
    before = distinct_before(kinds)
    asked = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
    groups: dict[Hashable, list[int]] = {}
    for index in indices:
        neighbours = tuple(kinds[max(0, index - 1) : index + 2])
        groups.setdefault((neighbours, before[index], index < asked), []).append(index)
    return list(groups.values())


def kind_of(message: TemplateMessage) -> tuple[Any, ...]:
    """Return the kind of a message: everything that may change the template's text, except the
    message's words."""
    content = message["content"]
    return (
        message["role"],
        tuple(message),
        bool(content) and not content.isspace(),
        "</think>" in content or opens_thought(content),
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


class BeginningTails(Protocol):
    """The tails of a conversation's beginnings that are known from other conversations."""

    def get(self, count: int, prompt: bool) -> str | None:
        """Return the tail of the first `count` messages; None if it is not known."""

    def learn(self, count: int, prompt: bool, tail: str) -> None:
        """Remember the tail of the first `count` messages for other conversations."""


class Tails:
    """The tails of one conversation's beginnings: the texts after the last payload of a render."""

    def __init__(
        self,
        template: ChatTemplate,
        role_marker: str,
        messages: Sequence[TemplateMessage],
        tools: Sequence[Any],
        located: Located,
        known: BeginningTails | None = None,
    ) -> None:
        self._known = known
        self._template = template
        self._role_marker = role_marker
        self._messages = messages
        self._tools = tools
        self._text = located.text
        self._payloads = located.index
        self._located = located
        self._tails: dict[tuple[Any, ...], list[tuple[str, str | None]]] = {}

    def kinds_before(self, index: int) -> tuple[int, int | None]:
        """Return what decides the tail of a beginning, besides words.

        The number of the set of kinds of the messages before `index`, and the kind of the message
        directly before; None without a message before.
        """
        return self._distinct_before[index], self._kinds[index - 1] if index else None

    def tail(self, index: int, gap: str, *, prompt: bool) -> tuple[str | None, bool]:
        """Return the text after the last payload of a render of the messages before `index`.

        The tail is None if the template refuses the messages. The second item tells whether this
        call rendered the messages, or knew their tail from another conversation. Turns share a
        render if the same kinds of messages precede them, if the message directly before has the
        same kind, and if their gaps are equal up to the last role marker. A question with 200 tool
        calls and their results needs two renders.

        The gap begins with the end of the message before, which may hold an id or a number. Two
        turns whose gaps differ there only in such words (see `alike`) still share a render, if the
        shared tail begins with the beginning of the other turn's gap. The returned tail begins with
        the beginning of this turn's gap instead.
        """
        head = self._role_marker_at(gap)
        key = *self.kinds_before(index), gap[head:][: len(self._role_marker)], prompt
        for shared_head, tail in self._tails.get(key, ()):
            if shared_head == gap[:head]:
                return tail, False
            if tail is not None and tail.startswith(shared_head) and alike(shared_head, gap[:head]):
                return gap[:head] + tail[len(shared_head) :], False
        # Of all turns that may share the render, the first has the shortest.
        first = self._first_alike(index, gap[:head], key)
        tail = self._known.get(first, prompt) if self._known else None
        if tail is None:
            tail = self._rendered_tail(first, prompt)
            if self._known and tail is not None:
                self._known.learn(first, prompt, tail)
        self._tails.setdefault(key, []).append((gap[:head], tail))
        return tail, True

    def _rendered_tail(self, count: int, prompt: bool) -> str | None:
        """Return the tail of the first `count` messages; None if the template refuses them."""
        try:
            return self._marked.tail(self._template.render(self._marked.messages[:count], self._tools, prompt=prompt))
        except Refused:
            return None

    def _first_alike(self, index: int, head: str, key: tuple[Any, ...]) -> int:
        """Return the first assistant message that may share the render of `tail` with `index`.

        `head` is the gap of message `index` up to the last role marker, and `key` the key of
        `tail`.
        """
        first = self._first_after[key[:2]]
        place = self._payloads.neighbours(first) if first < index else None
        if place is None:
            return index
        gap = self._text[place.before : place.own[0].start]
        at = self._role_marker_at(gap)
        return first if gap[:at] == head and gap[at:][: len(self._role_marker)] == key[2] else index

    @cached_property
    def _first_after(self) -> dict[tuple[Any, ...], int]:
        """First assistant message, by the number of kinds before and the kind directly before."""
        first: dict[tuple[Any, ...], int] = {}
        for index, message in enumerate(self._messages):
            if message["role"] == "assistant":
                first.setdefault(self.kinds_before(index), index)
        return first

    def _role_marker_at(self, gap: str) -> int:
        """Return the offset of the last role marker in a gap, or the gap's length without one."""
        at = gap.rfind(self._role_marker) if self._role_marker else -1
        return at if at >= 0 else len(gap)

    @cached_property
    def _marked(self) -> Marked:
        """The conversation with markers, without markers inside a content."""
        marked = self._located.marked
        if not marked.split_thoughts:
            return marked
        return mark(self._messages, self._text, fill=marked.filled)

    @cached_property
    def _kinds(self) -> list[int]:
        numbers: dict[tuple[Any, ...], int] = {}
        return [numbers.setdefault(kind_of(message), len(numbers)) for message in self._messages]

    @cached_property
    def _distinct_before(self) -> list[int]:
        return distinct_before(self._kinds)
