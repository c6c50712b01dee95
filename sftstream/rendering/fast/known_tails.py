"""Remember the texts that a template prints after the beginnings of conversations.

The search for turns asks where the model would begin to speak: it renders the first messages of a
conversation with the generation prompt, and reads the tail, the text after the last payload
(`shared_renders.py`). Most conversations begin alike: a question of the user, then an answer. The
first such beginning is rendered, and traced on symbolic values (`symbolic.py`). The tail holds for
every later beginning of the same shape whose values answer the template's questions in the same
way.

Example. The template prints `<{{ m.role }}>{{ m.content }}</s>` for each message, its generation
prompt is `<assistant>`, and for a question with "/think" `<assistant><think>`:

    user "hi"           rendered: the tail is "</s><assistant>"; stored with one condition, that
                        value 0 does not contain "/think"
    user "where?"       known: "</s><assistant>"
    user "x /think"     rendered, since the condition does not hold
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from sftstream.records import Conversation
from sftstream.rendering.fast.render_plan import Condition, conditions_of, fulfils_conditions
from sftstream.rendering.fast.shape import ReadsInside, Shape, split_conversation, symbolic_conversation
from sftstream.rendering.fast.symbolic import Recorder, TracedTemplate, ValueRef

SHAPES, TAILS = 1024, 8
"""Largest number of stored shapes of beginnings, and of traces of a shape."""

LONGEST = 8
"""Largest number of messages of a beginning whose tail is stored."""

NOT_JSON = TypeError, ValueError, RecursionError
"""Errors raised by values that have no JSON form or no exact key, a date for example."""


class KnownTail(NamedTuple):
    """A tail, with the questions that a beginning's values must answer as the traced ones did."""

    tail: str
    conditions: tuple[Condition, ...]


class KnownTails:
    """The known tails of one template."""

    def __init__(
        self, traced: TracedTemplate, reads_inside: Callable[[], ReadsInside], to_json: Callable[..., str]
    ) -> None:
        self._traced = traced
        self._reads_inside = reads_inside
        self._to_json = to_json
        self._tails: dict[tuple[Shape, bool], list[KnownTail | None]] = {}
        """Known tails by shape; None for each trace without a result."""

    def of(self, conversation: Conversation) -> TailsOf:
        """Return the known tails of the beginnings of a conversation."""
        return TailsOf(self, conversation)

    def get(self, beginning: Conversation, prompt: bool) -> str | None:
        """Return the tail of a beginning; None if it is not known."""
        if not _is_simple(beginning):
            return None
        try:
            shape, values = split_conversation(beginning, self._reads_inside())
            for known in self._tails.get((shape, prompt), ()):
                if known and fulfils_conditions(known.conditions, values):
                    return known.tail
        except NOT_JSON:
            pass  # the render refuses the beginning, with the template's own error
        return None

    def learn(self, beginning: Conversation, prompt: bool, tail: str) -> None:
        """Trace a beginning whose tail was rendered, and store the tail if the trace prints it."""
        if not _is_simple(beginning):
            return
        try:
            shape, values = split_conversation(beginning, self._reads_inside())
            stored = self._tails.setdefault((shape, prompt), [])
            if len(stored) < TAILS:
                stored.append(self._traced_tail(beginning, values, prompt, tail))
        except NOT_JSON:
            return
        if len(self._tails) > SHAPES:
            del self._tails[next(iter(self._tails))]

    def _traced_tail(self, beginning: Conversation, values: Sequence[Any], prompt: bool, tail: str) -> KnownTail | None:
        """Return the tail with its conditions; None if the trace fails or prints another tail.

        The last printed value must be the content of the last message.
        """
        recorder, reads_inside = Recorder(), self._reads_inside()
        messages, tools = symbolic_conversation(recorder, beginning, values, reads_inside)
        trace = self._traced.trace(recorder, messages, tools, prompt=prompt, variables=beginning.variables)
        if trace is None:
            return None
        printed = [place for place, piece in enumerate(trace.pieces) if isinstance(piece, ValueRef)]
        before_last = msgspec.structs.replace(beginning, messages=beginning.messages[:-1])
        number = len(split_conversation(before_last, reads_inside)[1])
        last = trace.pieces[printed[-1]] if printed else None
        after = trace.pieces[printed[-1] + 1 :] if printed else ()
        if not isinstance(last, ValueRef) or last.number != number or "".join(map(str, after)) != tail:
            return None
        return KnownTail(tail, conditions_of(trace, self._to_json))


class TailsOf(NamedTuple):
    """The known tails of one conversation's beginnings."""

    tails: KnownTails
    conversation: Conversation

    def get(self, count: int, prompt: bool) -> str | None:
        """Return the tail of the first `count` messages; None if it is not known."""
        return self.tails.get(self._beginning(count), prompt)

    def learn(self, count: int, prompt: bool, tail: str) -> None:
        """Remember the tail of the first `count` messages for other conversations."""
        self.tails.learn(self._beginning(count), prompt, tail)

    def _beginning(self, count: int) -> Conversation:
        return msgspec.structs.replace(self.conversation, messages=self.conversation.messages[:count])


def _is_simple(beginning: Conversation) -> bool:
    """Return True for a short beginning whose last content has no white space at its ends.

    White space at the end of a content belongs to the tail, unless the template removes it.
    """
    if not 0 < len(beginning.messages) <= LONGEST:
        return False
    content = beginning.messages[-1].content or ""
    return bool(content) and content == content.strip()
