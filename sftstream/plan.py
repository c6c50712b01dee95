"""Conversations of a shape that was seen before: put together from pieces and masked by plan, without running the template.

The first conversation of a shape goes the whole way: rendered, marked, its turns found and verified. If its text is also what
a trace of the template says, its spans are kept as places between the pieces. They hold for any other conversation that
has the same shape, answers the trace's questions alike, and whose words are inert: nothing in them could be taken for a part
of the template, and no white space at their ends could be trimmed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sftstream.payloads import MARK
from sftstream.records import Conversation, Message, Rendered, Span
from sftstream.template import REASONING_KEYS, ChatTemplate, template_message
from sftstream.trace import Guard, Leaf, Recorder, Trace, TracedTemplate, Value, Word
from sftstream.turns import Form, Turn

SHAPES = 4096
"""Shapes that are remembered; what comes later goes the whole way."""
PLANS = 8
"""Plans of a shape, one for each way in which its conversations answer."""

Shape = tuple[Any, ...]


class Place(NamedTuple):
    """A character of the text: of piece number `piece`, counted from its beginning."""

    piece: int
    offset: int


class Plan(NamedTuple):
    """How conversations of one shape are printed, and what of them is trained."""

    pieces: tuple[str | Leaf, ...]
    guards: tuple[Guard, ...]
    trimmed: tuple[bool, ...]
    """Of each of a conversation's values: white space at its ends is not printed."""
    silent: tuple[int, ...]
    """Values that are not printed: ids in most templates, earlier thoughts in some."""
    spans: tuple[tuple[Place, Place], ...]


class Planner:
    """The plans of one template under one policy."""

    def __init__(self, template: ChatTemplate, form: Form, control: re.Pattern[str]) -> None:
        self._traced = TracedTemplate(template)
        self._to_json: Any = template.environment.filters["tojson"]
        self._alien = re.compile(
            "|".join([control.pattern, MARK.pattern, "</?think", *map(re.escape, _marks_of_turns(form))])
        )
        self._plans: dict[Shape, list[Plan]] = {}

    def render(self, dialogue: Conversation) -> Rendered | None:
        """The text and its trained spans; None where no plan holds."""
        shape, values = _take_apart(dialogue)
        for plan in self._plans.get(shape, ()):
            if all(self._answers(guard, values) for guard in plan.guards):
                return self._assembled(plan, values)
        return None

    def learn(self, dialogue: Conversation, rendered: Rendered, turns: Sequence[Turn]) -> None:
        """Keep how a conversation was rendered, where others can be rendered alike."""
        shape, values = _take_apart(dialogue)
        plans = self._plans.setdefault(shape, []) if len(self._plans) < SHAPES else self._plans.get(shape, [])
        if len(plans) >= PLANS or (trace := self._trace(dialogue, values, turns)) is None:
            return
        texts = [self._print(piece, values) for piece in trace.pieces]
        spans = tuple(_spans(rendered.spans, texts, trace.pieces))
        plan = Plan(trace.pieces, trace.guards, _trimmed(trace.pieces, len(values)), _silent(trace, len(values)), spans)
        if self._assembled(plan, values) == rendered:
            plans.append(plan)

    def _trace(self, dialogue: Conversation, values: Sequence[Any], turns: Sequence[Turn]) -> Trace | None:
        recorder = Recorder()
        messages, tools = _unknown(recorder, dialogue, values)
        for turn in turns:
            if turn.by_prompt and self._traced.trace(recorder, messages[: turn.message], tools, prompt=True) is None:
                return None
        return self._traced.trace(recorder, messages, tools)

    def _assembled(self, plan: Plan, values: Sequence[Any]) -> Rendered | None:
        texts = [self._print(piece, values) for piece in plan.pieces]
        words = [text for text, piece in zip(texts, plan.pieces, strict=True) if not isinstance(piece, str)]
        words += [str(values[number]) for number in plan.silent]
        if self._alien.search("\0".join(words)) or _has_loose_ends(values, plan.trimmed):
            return None
        starts, at = [], 0
        for text in texts:
            starts.append(at)
            at += len(text)
        spans = [Span(starts[begin.piece] + begin.offset, starts[end.piece] + end.offset) for begin, end in plan.spans]
        return Rendered("".join(texts), tuple(spans))

    def _answers(self, guard: Guard, values: Sequence[Any]) -> bool:
        return bool(getattr(self._print(guard.leaf, values), guard.method)(*guard.arguments)) is guard.answer

    def _print(self, piece: str | Leaf, values: Sequence[Any]) -> Any:
        if isinstance(piece, str):
            return piece
        value = values[piece.number]
        for method, arguments in piece.ops:
            value = (
                self._to_json(value, **dict(arguments)) if method == "tojson" else getattr(value, method)(*arguments)
            )
        return value


def _marks_of_turns(form: Form) -> set[str]:
    """What the search for turns looks for."""
    return {text for text in (form.core.strip(), *form.stops, *form.call_stops) if text}


def _take_apart(dialogue: Conversation) -> tuple[Shape, list[Any]]:
    """What decides how a conversation is printed and masked, its values apart; and these, in a fixed order."""
    shape: list[Any] = [len(dialogue.tools)]
    values: list[Any] = list(dialogue.tools)
    for message in dialogue.messages:
        content = message.content or ""
        values.append(content)
        shape += (message.role, message.train, bool(content) and not content.isspace())
        if message.reasoning or message.tool_calls or message.name is not None or message.tool_call_id is not None:
            shape.append(_more(message, values))
    return tuple(shape), values


def _more(message: Message, values: list[Any]) -> tuple[Any, ...]:
    """What few messages have."""
    reasoning = message.reasoning or ""
    optional = (reasoning, message.name or "", message.tool_call_id or "")
    values += optional
    for call in message.tool_calls:
        values += (call.id or "", call.name, call.arguments)
    return (
        *(bool(value) and not value.isspace() for value in optional),
        message.name is None,
        message.tool_call_id is None,
        *(call.id is None for call in message.tool_calls),
    )


def _unknown(
    recorder: Recorder, dialogue: Conversation, values: Sequence[Any]
) -> tuple[list[dict[str, Any]], list[Value]]:
    """The conversation as the template gets it, its values unknown."""
    numbers = iter(range(len(values)))

    def unknown(kind: type[Word] | type[Value]) -> Any:
        number = next(numbers)
        return kind(recorder, Leaf(number), values[number])

    tools = [unknown(Value) for _ in dialogue.tools]
    messages = []
    for message in dialogue.messages:
        plain = template_message(message)
        plain["content"] = unknown(Word)
        if message.reasoning or message.tool_calls or message.name is not None or message.tool_call_id is not None:
            reasoning, name, call_id = (unknown(Word) for _ in range(3))
            plain |= {key: reasoning for key in plain if key in REASONING_KEYS}
            plain |= {key: value for key, value in (("name", name), ("tool_call_id", call_id)) if key in plain}
            for call, own in zip(plain.get("tool_calls", ()), message.tool_calls, strict=True):
                given, function, arguments = unknown(Word), unknown(Word), unknown(Value)
                call["id"] = call["id"] if own.id is None else given
                call["function"] = {"name": function, "arguments": arguments}
        messages.append(plain)
    return messages, tools


def _trimmed(pieces: Iterable[str | Leaf], count: int) -> tuple[bool, ...]:
    loose = {piece.number for piece in pieces if isinstance(piece, Leaf) and not _trims(piece)}
    return tuple(number not in loose for number in range(count))


def _silent(trace: Trace, count: int) -> tuple[int, ...]:
    printed = {piece.number for piece in trace.pieces if isinstance(piece, Leaf)}
    return tuple(number for number in range(count) if number not in printed)


def _trims(leaf: Leaf) -> bool:
    return any(op in (("strip", (None,)), ("strip", ())) for op in leaf.ops)


def _has_loose_ends(values: Sequence[Any], trimmed: Sequence[bool]) -> bool:
    return any(
        isinstance(value, str) and value and not trim and (value[0].isspace() or value[-1].isspace())
        for value, trim in zip(values, trimmed, strict=True)
    )


def _spans(spans: Iterable[Span], texts: Sequence[str], pieces: Sequence[str | Leaf]) -> Iterator[tuple[Place, Place]]:
    """Spans by place; those with an end within a value are left out."""
    for span in spans:
        begin, end = _place(span.start, texts, pieces), _place(span.end, texts, pieces)
        if begin is not None and end is not None:
            yield begin, end


def _place(at: int, texts: Sequence[str], pieces: Sequence[str | Leaf]) -> Place | None:
    """Within a string of the template where possible: the ends of a value would do as well."""
    start = 0
    for number, (text, piece) in enumerate(zip(texts, pieces, strict=True)):
        if isinstance(piece, str) and start <= at <= start + len(text):
            return Place(number, at - start)
        start += len(text)
    return None
