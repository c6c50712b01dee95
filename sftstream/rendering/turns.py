"""Where the assistant's turns begin and end in a text: by evidence from the template itself, verified, or refused.

A turn begins where the model would begin to speak at inference: after the generation prompt. It ends with the stop
token, inclusive, by which the model tells that it is done. What both look like is found once, by probing the template
(`learn_form`); where they are in a conversation is found from its located payloads (`find_turns`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sftstream.records import Refused, Span
from sftstream.rendering.markers import MARK, Located, Payload, mark_all
from sftstream.rendering.template import ChatTemplate, TemplateMessage

SAID = "Zq said Zq"
"""What the assistant says in probes: no template has it."""

USER: TemplateMessage = {"role": "user", "content": "Zq asked Zq"}
ANSWER: TemplateMessage = {"role": "assistant", "content": SAID}
CALLED: TemplateMessage = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "abcdefghi", "function": {"name": "look_up", "arguments": {"key": SAID}}}
    ],
}
RESULT: TemplateMessage = {"role": "tool", "name": "look_up", "content": "Zq found Zq", "tool_call_id": "abcdefghi"}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a key up.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "What to look up."}},
            "required": ["key"],
        },
    },
}


class TurnFormat(NamedTuple):
    """What assistant's turns look like in a template."""

    prompt: str
    """The generation prompt after a user's message; empty where there is none (Mistral)."""
    role_marker: str
    """The part of the header that names the role, without the thoughts that some headers open."""
    stops: tuple[str, ...]
    """What ends a text."""
    call_stops: tuple[str, ...]
    """What ends a tool call, where that is something else."""
    open_end: bool
    """The last turn of a conversation has no stop token, since the next role's marker is the stop (GLM)."""


class Turn(NamedTuple):
    """An assistant's message in the text: `span` from after the header to after the stop token."""

    message: int
    span: Span
    payloads: tuple[Payload, ...]
    by_prompt: bool = False
    """Where it begins was found by printing the conversation up to there once more."""


def probe_turn_format(template: ChatTemplate, control: re.Pattern[str]) -> TurnFormat:
    """Probe a template. `control` matches every special token's text. Raises ValueError where it cannot be trained on."""
    header = _learn_header(template, control)
    at_end, in_middle = _after(template, [USER, ANSWER]), _after(template, [USER, ANSWER, USER])
    stops = _stops(at_end, in_middle, control)
    if not stops:
        raise ValueError(
            "nothing ends an assistant's turn in this chat template, so a model could not learn to stop; use another template"
        )
    call_stops = _stops(
        _after(template, [USER, CALLED]), _after(template, [USER, CALLED, RESULT]), control, known=stops
    )
    return TurnFormat(
        prompt=header,
        role_marker=re.split(r"<think|\[THINK", header)[0],
        stops=tuple(sorted(stops)),
        call_stops=tuple(sorted(call_stops)),
        open_end=at_end is not None and not _contains(at_end, stops),
    )


def find_turns(
    template: ChatTemplate,
    turn_format: TurnFormat,
    control: re.Pattern[str],
    messages: Sequence[TemplateMessage],
    tools: Sequence[Any],
    located: Located,
    *,
    shortcut: bool = True,
) -> list[Turn]:
    """The assistant's turns in order; raises `Refused` where one cannot be shown to be where it seems.

    With `shortcut` a turn right behind a whole generation prompt needs no other evidence; the result is the same.
    """
    finder = _Finder(template, turn_format, control, messages, tools, located, shortcut)
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            turns.append(finder.turn(index, turns[-1].span.end if turns else 0))
    tagged = _tagged(template, turn_format, messages, tools, located, turns)
    return tagged or turns


class _Finder:
    """One conversation under search."""

    def __init__(
        self,
        template: ChatTemplate,
        turn_format: TurnFormat,
        control: re.Pattern[str],
        messages: Sequence[TemplateMessage],
        tools: Sequence[Any],
        located: Located,
        shortcut: bool,
    ) -> None:
        self._shortcut = shortcut
        self._template = template
        self._turn_format = turn_format
        self._control = control
        self._messages = messages
        self._tools = tools
        self._text = located.text
        self._payloads = located.payloads
        self._firsts = {payload.message: payload.start for payload in reversed(sorted(located.payloads))}

    def turn(self, index: int, earliest: int) -> Turn:
        """The turn of assistant's message `index`, not before `earliest`."""
        self._prompted = False
        # Payloads that stand before the message's own: some templates print others' words again, later.
        first = self._firsts.get(index, len(self._text))
        before = max((p.end for p in self._payloads if p.message < index and p.end <= first), default=0)
        own = self._own(index, max(before, earliest))
        limit = min((p.start for p in own), default=None)
        following = min(
            (p.start for p in self._payloads if p.message > index and p.start >= before), default=len(self._text)
        )
        start = self._start(index, before, following if limit is None else limit, empty=limit is None)
        if start < earliest:
            raise Refused("messages out of order", f"message {index} begins inside the turn before it")
        last = max((p.end for p in own), default=start)
        following = min(
            (p.start for p in self._payloads if p.message > index and p.start >= last), default=len(self._text)
        )
        return Turn(index, Span(start, self._end(index, last, following)), tuple(own), self._prompted)

    def _own(self, index: int, earliest: int) -> list[Payload]:
        """The message's payloads, each where it is printed first."""
        own: dict[str, Payload] = {}
        for payload in self._payloads:
            if payload.message == index and payload.start >= earliest:
                own.setdefault(f"{payload.kind} {payload.number}", payload)
        return sorted(own.values())

    def _start(self, index: int, before: int, limit: int, *, empty: bool) -> int:
        gap = self._text[before:limit]
        header = self._turn_format.prompt
        if self._shortcut and header and not empty and gap.endswith(header):
            return limit  # right behind the whole generation prompt
        start = self._start_by_prompt(index, gap)
        if start is None:
            start = self._start_by_header(gap)
        if start is None:
            wanted = (
                repr(self._turn_format.role_marker)
                if self._turn_format.role_marker
                else "what the template prints where the model is to speak"
            )
            raise Refused("no header", f"{wanted} does not stand before message {index}")
        return before + start

    def _start_by_prompt(self, index: int, gap: str) -> int | None:
        """What the template prints between the last words and where the model is to speak, found in the gap."""
        self._prompted = True
        try:
            prompt = self._template.render(mark_all(self._messages[:index]), self._tools, prompt=True)
        except Refused:
            return None
        marks = list(MARK.finditer(prompt))
        tail = prompt[marks[-1].end() :] if marks else prompt
        cut = _cut(_shared(gap, tail), tail, self._control)
        core = self._turn_format.role_marker
        needed = tail.rfind(core) + len(core) if core and core in tail else len(tail)
        return cut if cut >= needed else None

    def _start_by_header(self, gap: str) -> int | None:
        core, header = self._turn_format.role_marker, self._turn_format.prompt
        if not core or gap.count(core) != 1:
            return None
        at = gap.index(core)
        return at + max(_cut(_shared(gap[at:], header), header, self._control), len(core))

    def _end(self, index: int, last: int, following: int) -> int:
        rest = self._text[last:following]
        called = bool(self._messages[index].get("tool_calls"))
        for stops in (self._turn_format.stops, self._turn_format.call_stops if called else ()):
            ends = [at + len(stop) for stop in stops if (at := rest.find(stop)) >= 0]
            if ends:
                return last + min(ends)
        if self._turn_format.open_end and index == len(self._messages) - 1 and following == len(self._text):
            return len(self._text.rstrip())
        wanted = [*self._turn_format.stops, *(self._turn_format.call_stops if called else ())]
        raise Refused("no stop token", f"none of {wanted} ends message {index}")


def _tagged(
    template: ChatTemplate,
    turn_format: TurnFormat,
    messages: Sequence[TemplateMessage],
    tools: Sequence[Any],
    located: Located,
    turns: list[Turn],
) -> list[Turn]:
    """The turns as the template's `{% generation %}` tags have them, where every one verifies; else none."""
    if not template.has_generation_tags:
        return []
    tags = template.tagged_spans(messages, tools)
    result = []
    for turn in turns:
        hull = Span(
            min((p.start for p in turn.payloads), default=turn.span.start),
            max((p.end for p in turn.payloads), default=turn.span.start),
        )
        tag = next((tag for tag in tags if tag.start <= hull.start and hull.end <= tag.end), None)
        if tag is None:
            return []
        # Some tags take the header in, some leave the stop token out.
        end = (
            max(tag.end, turn.span.end)
            if located.text[tag.end : turn.span.end] in ("", *turn_format.stops)
            else turn.span.end
        )
        result.append(turn._replace(span=Span(max(tag.start, turn.span.start), min(end, turn.span.end))))
    return result


def _learn_header(template: ChatTemplate, control: re.Pattern[str]) -> str:
    try:
        plain, prompt = template.render([USER]), template.render([USER], prompt=True)
    except Refused as refused:
        if refused.reason == "template takes too long":
            raise ValueError(f"the chat template does not end: {refused.detail}; use another template") from None
        try:
            plain, prompt = template.render([USER], (TOOL,)), template.render([USER], (TOOL,), prompt=True)
        except Refused:
            raise ValueError(
                f"the chat template cannot print a user's message, with or without a tool ({refused.detail}); "
                "use another template"
            ) from None
    if prompt.startswith(plain):
        return prompt[len(plain) :]
    # Some templates close a conversation that is not to go on (Phi): the prompt then begins before its end.
    return prompt[_cut(_shared(plain, prompt), prompt, control) :]


def _after(template: ChatTemplate, messages: list[TemplateMessage]) -> str | None:
    """What is printed after the assistant's words, up to the next words; None where the template knows no such shape."""
    called = any("tool_calls" in message for message in messages)
    for tools in ((TOOL,),) if called else ((), (TOOL,)):
        text = _probe(template, messages, tools)
        if text is not None and SAID in text:
            return text[text.rindex(SAID) + len(SAID) :].split("Zq ")[0]
    return None


def _probe(
    template: ChatTemplate, messages: list[TemplateMessage], tools: Sequence[Any] = (), *, prompt: bool = False
) -> str | None:
    try:
        return template.render(messages, tools, prompt=prompt)
    except Refused:
        return None


def _stops(
    at_end: str | None, in_middle: str | None, control: re.Pattern[str], known: Iterable[str] = ()
) -> frozenset[str]:
    """What ends words that are followed by `at_end` at a conversation's end and by `in_middle` before another turn.

    What both begin with, up to its last special token, or up to its last character where the tokenizer knows none of
    them; where they have nothing in common, the first special token of each.
    """
    both = [after for after in (at_end, in_middle) if after is not None]
    if not both or any(_contains(after, known) for after in both):
        return frozenset()
    shared = _shared(*both) if len(both) == 2 else ""
    shared = shared[: _cut(shared, max(both, key=len), control)] if shared not in both else shared
    if tokens := list(control.finditer(shared)):
        return frozenset([shared[tokens[-1].start() : tokens[-1].end()]])
    if shared.strip() and not known:
        return frozenset([shared.strip()])
    return frozenset(
        found[0] for after in both if (found := control.search(after) or (_TAG.match(after) if not known else None))
    )


def _contains(text: str, stops: Iterable[str]) -> bool:
    return any(stop in text for stop in stops)


_TAG = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]")


def _shared(one: str, other: str) -> str:
    """What both begin with."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _cut(shared: str, whole: str, control: re.Pattern[str]) -> int:
    """Where the shared beginning of `whole` ends without cutting a token or tag in two."""
    if len(shared) == len(whole):
        return len(whole)
    border = re.compile(rf"{control.pattern}|{_TAG.pattern}|\n+")
    return max((found.end() for found in border.finditer(whole) if found.end() <= len(shared)), default=0)
