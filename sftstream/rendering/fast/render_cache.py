"""Conversations of a shape that was seen before: put together from pieces and masked by plan, without running the template.

The first conversation of a shape goes the whole way: rendered, marked, its turns found and verified. If its text is also what
a trace of the template says, its spans are kept as places between the pieces. They hold for any other conversation that
has the same shape, answers the trace's questions alike, and whose words are inert: nothing in them could be taken for a part
of the template, and no white space at their ends could be trimmed.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial, reduce
from hashlib import sha256
from itertools import accumulate
from operator import methodcaller
from typing import Any, NamedTuple

from sftstream.records import REASONING_KEYS, Conversation, Message, Rendered
from sftstream.rendering.fast.symbolic import Op, Recorder, SymbolicJson, SymbolicStr, Trace, TracedTemplate, ValueRef
from sftstream.rendering.template import ChatTemplate, TemplateMessage, exact_key, template_message
from sftstream.rendering.turns import CALLED, SAID, TOOL, USER, Turn, TurnFormat

STRIPPED: Op = ("strip", (None,))

SHAPES, CHARACTERS = 4096, 16 << 20
"""Shapes that are remembered, and characters of what the template prints in them; beyond that the oldest are forgotten."""
PLANS = 8
"""Plans of a shape, one for each way in which its conversations answer."""

NOT_JSON = TypeError, ValueError, RecursionError
"""Raised of a value that cannot be printed as JSON, or has no key."""

Shape = tuple[Any, ...]
Printer = Callable[[Any], Any]


class Offset(NamedTuple):
    """A character of the text: so many behind the first values, which are printed before it."""

    values: int
    offset: int
    """Characters of the template that are printed before it."""


class Slot(NamedTuple):
    """A value that is printed, and how it gets there."""

    number: int
    printed: Printer | None
    """What is done to it, if anything."""


class Condition(NamedTuple):
    """What a value must be like for the plan to hold."""

    number: int
    printed: Printer | None
    ask: Callable[[Any], Any]
    answer: bool


class RenderPlan(NamedTuple):
    """How conversations of one shape are printed, and what of them is trained."""

    pieces: list[str]
    """What the template prints around the values, and between them nothing, where these go."""
    slots: tuple[Slot, ...]
    untrimmed: tuple[int, ...]
    """Slots whose value would be printed with the white space at its ends."""
    must_be_verbatim: tuple[int, ...]
    """Those of which more than white space at both ends could be taken: they would not be its words any more."""
    unprinted: tuple[int, ...]
    """Values that are not printed: ids in most templates, earlier thoughts in some."""
    conditions: tuple[Condition, ...]
    bounds: tuple[Offset, ...]


class TakenApart(NamedTuple):
    """What a template picks things out of, so that its plans are for one value of it; others print it as JSON."""

    tools: bool
    """The definitions of tools."""
    arguments: bool
    """The arguments of calls. Of their own strings plans know no more than of other words."""


class RenderCache:
    """The plans of one template under one policy."""

    def __init__(self, template: ChatTemplate, turn_format: TurnFormat, special: Sequence[str]) -> None:
        self._traced = TracedTemplate(template)
        self._to_json: Any = template.environment.filters["tojson"]
        self._marks = {*special, *_marks_of_turns(turn_format), "<think", "</think", "ZqM"}
        self._beginnings = {first: _beginning(first, self._marks) for first in {text[0] for text in self._marks}}
        self.plans: dict[Shape, list[RenderPlan]] = {}
        self._characters = 0

    @cached_property
    def _alien(self) -> re.Pattern[str]:
        """Matches what could be taken for a part of the template. Few texts ask for it, and hundreds of tokens take long."""
        return re.compile("|".join(map(re.escape, sorted(self._marks))))

    def render(self, conversation: Conversation) -> Rendered | None:
        """The text and its trained spans; None where no plan holds."""
        try:
            shape, values = _take_apart(conversation, self._taken_apart)
            for plan in self.plans.get(shape, ()):
                if _holds(plan, values):
                    printed = self._printed(plan, values)
                    return None if printed is None else _assembled(plan, printed)
        except NOT_JSON:
            pass  # the template is to say so
        return None

    def learn(self, conversation: Conversation, rendered: Rendered, turns: Sequence[Turn]) -> None:
        """Keep how a conversation was rendered, where others can be rendered alike."""
        try:
            shape, values = _take_apart(conversation, self._taken_apart)
            known = self.plans.get(shape, [])
            plan = self._plan(conversation, values, rendered, turns) if len(known) < PLANS else None
        except NOT_JSON:
            return
        if plan is None:
            return
        self.plans[shape] = [*known, plan]
        self._characters += sum(map(len, plan.pieces))
        while len(self.plans) > SHAPES or self._characters > CHARACTERS:
            for oldest in self.plans.pop(next(iter(self.plans))):
                self._characters -= sum(map(len, oldest.pieces))

    @cached_property
    def _taken_apart(self) -> TakenApart:
        return _probed(self._traced)

    def _plan(
        self, conversation: Conversation, values: Sequence[Any], rendered: Rendered, turns: Sequence[Turn]
    ) -> RenderPlan | None:
        trace = self._trace(conversation, values, turns)
        if trace is None:
            return None
        texts, refs = _divided(trace.pieces)
        slots = tuple(Slot(*self._printer(ref)) for ref in refs)
        conditions = tuple(
            Condition(*self._printer(guard.ref), methodcaller(guard.method, *guard.arguments), guard.answer)
            for guard in trace.guards
        )
        plan = RenderPlan(
            pieces=[piece for text in texts for piece in (text, "")][:-1],
            slots=slots,
            untrimmed=tuple(
                slot for slot, ref in enumerate(refs) if STRIPPED not in ref.ops and isinstance(values[ref.number], str)
            ),
            must_be_verbatim=tuple(slot for slot, ref in enumerate(refs) if any(map(_takes_letters, ref.ops))),
            unprinted=tuple(sorted(set(range(len(values))) - {slot.number for slot in slots})),
            conditions=conditions,
            bounds=(),
        )
        printed = self._printed(plan, values)
        if printed is None:
            return None
        plan = plan._replace(bounds=tuple(_places(rendered.bounds, texts, printed)))
        return plan if _assembled(plan, printed) == rendered else None

    def _trace(self, conversation: Conversation, values: Sequence[Any], turns: Sequence[Turn]) -> Trace | None:
        recorder = Recorder()
        messages, tools = _unknown(recorder, conversation, values, self._taken_apart)
        for turn in turns:
            if turn.by_prompt and self._traced.trace(recorder, messages[: turn.message], tools, prompt=True) is None:
                return None
        return self._traced.trace(recorder, messages, tools)

    def _printed(self, plan: RenderPlan, values: Sequence[Any]) -> list[str] | None:
        """The values as they are printed; None where one is not inert."""
        printed = [values[number] if printer is None else printer(values[number]) for number, printer in plan.slots]
        for slot in plan.must_be_verbatim:
            if printed[slot] != values[plan.slots[slot].number]:
                return None
        for slot in plan.untrimmed:
            value = printed[slot]
            if value and (value[0].isspace() or value[-1].isspace()):
                return None
        words = [*printed, *[str(values[number]) for number in plan.unprinted]] if plan.unprinted else printed
        return printed if self._inert("\0".join(words)) else None

    def _inert(self, words: str) -> bool:
        """Nothing in them could be taken for a part of the template. Almost always a look for a character tells."""
        for first, beginning in self._beginnings.items():
            if first in words and beginning.search(words):
                return not self._alien.search(words)
        return True

    def _printer(self, ref: ValueRef) -> tuple[int, Printer | None]:
        """The number of a value, and what makes of it what is printed."""
        steps = [self._step(op) for op in ref.ops]
        if len(steps) < 2:
            return ref.number, next(iter(steps), None)
        return ref.number, lambda value: reduce(lambda result, step: step(result), steps, value)

    def _step(self, op: Op) -> Printer:
        method, arguments = op
        if method == "tojson":
            return partial(self._to_json, **dict(arguments))
        # The same by another name, for what is called for each message.
        return str.strip if op == STRIPPED else methodcaller(method, *arguments)


def _holds(plan: RenderPlan, values: Sequence[Any]) -> bool:
    for number, printed, ask, answer in plan.conditions:
        value = values[number] if printed is None else printed(values[number])
        if bool(ask(value)) is not answer:
            return False
    return True


def _beginning(first: str, texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the first two characters of those that begin with `first`."""
    seconds = {re.escape(text[1:2]) for text in texts if text[0] == first}
    return re.compile(f"{re.escape(first)}(?:{'|'.join(sorted(seconds))})")


def _marks_of_turns(turn_format: TurnFormat) -> set[str]:
    """What the search for turns looks for."""
    return {text for text in (turn_format.role_marker.strip(), *turn_format.stops, *turn_format.call_stops) if text}


def _probed(traced: TracedTemplate) -> TakenApart:
    """Found by a trace of a conversation of which one thing is not known."""
    recorder = Recorder()

    def prints(tool: Any, *messages: TemplateMessage) -> bool:
        return traced.trace(recorder, [USER, *messages], [tool]) is not None

    def calling(arguments: Any) -> TemplateMessage:
        (call,) = CALLED["tool_calls"]
        return {**CALLED, "tool_calls": [{**call, "function": {**call["function"], "arguments": arguments}}]}

    words = {"key": SymbolicStr(recorder, ValueRef(0), SAID)}
    return TakenApart(
        tools=prints(TOOL) and not prints(SymbolicJson(recorder, ValueRef(0), TOOL)),
        arguments=prints(TOOL, calling(words))
        and not prints(TOOL, calling(SymbolicJson(recorder, ValueRef(0), {"key": SAID}))),
    )


def _take_apart(conversation: Conversation, apart: TakenApart) -> tuple[Shape, list[Any]]:
    """What decides how a conversation is printed and masked, its values apart; and these, in a fixed order.

    ValueError where it holds what JSON cannot, and that has to be told from other values.
    """
    tools = conversation.tools
    shape: list[Any] = [sha256(exact_key(tools)).digest() if tools and apart.tools else len(tools)]
    values: list[Any] = [] if apart.tools else list(tools)
    for message in conversation.messages:
        content = message.content or ""
        values.append(content)
        shape += (message.role, message.train, bool(content) and not content.isspace())
        if message.reasoning or message.tool_calls or message.name is not None or message.tool_call_id is not None:
            shape.append(_more(message, values, apart))
    return tuple(shape), values


def _more(message: Message, values: list[Any], apart: TakenApart) -> tuple[Any, ...]:
    """What few messages have. Blank words differ from others: nothing is looked for in the text, and nothing can be missing."""
    optional = (message.reasoning or "", message.name or "", message.tool_call_id or "")
    values += optional
    shape: list[Any] = [not text.isspace() if text else None for text in optional]
    shape += (message.name is None, message.tool_call_id is None)
    for call in message.tool_calls:
        shape += (bool(call.id), _says_something(call.name))
        values += (call.id or "", call.name)
        if apart.arguments:
            values += [argument for argument in call.arguments.values() if isinstance(argument, str)]
            kinds = {k: _says_something(v) if isinstance(v, str) else [v] for k, v in call.arguments.items()}
            shape.append(exact_key(kinds))
        else:
            values.append(call.arguments)
            shape.append(_says_something(call.arguments))
    return tuple(shape)


def _says_something(value: Any) -> bool:
    """A string that is not blank is in it."""
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    if isinstance(value, (dict, Mapping)):  # a dict is told at once, any other mapping slowly
        return any(map(_says_something, value.values()))
    return isinstance(value, (list, Sequence)) and any(map(_says_something, value))


def _unknown(
    recorder: Recorder, conversation: Conversation, values: Sequence[Any], apart: TakenApart
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The conversation as the template gets it, its values unknown."""
    numbers = iter(range(len(values)))

    def unknown(kind: type[SymbolicStr] | type[SymbolicJson]) -> Any:
        number = next(numbers)
        return kind(recorder, ValueRef(number), values[number])

    tools = list(conversation.tools) if apart.tools else [unknown(SymbolicJson) for _ in conversation.tools]
    messages = []
    for message in conversation.messages:
        plain = template_message(message)
        plain["content"] = unknown(SymbolicStr)
        if message.reasoning or message.tool_calls or message.name is not None or message.tool_call_id is not None:
            reasoning, name, call_id = (unknown(SymbolicStr) for _ in range(3))
            plain |= {key: reasoning for key in plain if key in REASONING_KEYS}
            plain |= {key: value for key, value in (("name", name), ("tool_call_id", call_id)) if key in plain}
            for call, own in zip(plain.get("tool_calls", ()), message.tool_calls, strict=True):
                given, function = unknown(SymbolicStr), unknown(SymbolicStr)
                call["id"] = given if own.id else call["id"]
                arguments: Any = (
                    {k: unknown(SymbolicStr) if isinstance(v, str) else v for k, v in own.arguments.items()}
                    if apart.arguments
                    else unknown(SymbolicJson)
                )
                call["function"] = {"name": function, "arguments": arguments}
        messages.append(plain)
    return messages, tools


def _divided(pieces: Iterable[str | ValueRef]) -> tuple[list[str], list[ValueRef]]:
    """What the template prints, and the values between it: nothing where two of them meet."""
    texts, refs = [""], []
    for piece in pieces:
        if isinstance(piece, str):
            texts[-1] += piece
        else:
            refs.append(piece)
            texts.append("")
    return texts, refs


def _takes_letters(op: Op) -> bool:
    return op[0] in ("strip", "lstrip", "rstrip") and op != STRIPPED


def _assembled(plan: RenderPlan, printed: Sequence[str]) -> Rendered:
    pieces = plan.pieces.copy()
    pieces[1::2] = printed
    ends = list(accumulate(map(len, printed), initial=0))
    return Rendered("".join(pieces), tuple([offset + ends[values] for values, offset in plan.bounds]))


def _places(bounds: Iterable[int], texts: Sequence[str], printed: Sequence[str]) -> Iterator[Offset]:
    """Of characters of the text; one within a value, or between two, has none."""
    offsets = [0, *accumulate(map(len, texts))]
    values = [0, *accumulate(map(len, printed))]
    ends = [offset + value for offset, value in zip(offsets[1:], values, strict=True)]
    for at in bounds:
        for number in range(bisect_left(ends, at), len(texts)):
            offset = at - values[number]
            if offset < offsets[number]:
                break
            if texts[number] or number == len(printed):
                yield Offset(number, offset)
                break
