"""Find the start and end of each assistant turn in a rendered text, by evidence from the template.

A turn starts where the model would begin to speak at inference: after the generation prompt. A turn
ends after the stop token, by which the model ends its reply. `probe_turn_format` learns prompt and
stops from a few renders of the template, once; `find_turns` then finds the turns of a conversation
around its located payloads, and refuses a turn without evidence.

Example. Template `<{{ m.role }}>{{ m.content }}</s>` for each message, prompt `<assistant>`:

    format  TurnFormat(prompt="<assistant>", role_marker="<assistant>", stops=("</s>",), ...)
    text    <user>hi</s><assistant>seven</s>
    turn    Turn(message=1, span=Span(23, 32), ...), the characters "seven</s>"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from sftstream.records import Refused, Span
from sftstream.rendering.markers import MARK, Located, Payload, mark_all
from sftstream.rendering.template import ChatTemplate, TemplateMessage

SAID = "Zq said Zq"
"""The assistant's text in probes; "Zq" occurs in no template."""

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
    """The texts around an assistant turn. A state stores the fields as an array, in this order."""

    prompt: str
    """The generation prompt after a user's message; empty if the template has none (Mistral)."""
    role_marker: str
    """The beginning of the prompt that names the role, without a thought opened by the prompt.

    `<|im_start|>assistant\\n` of the prompt `<|im_start|>assistant\\n<think>\\n`.
    """
    stops: tuple[str, ...]
    """Texts that end a turn, `("<|im_end|>",)` for example."""
    call_stops: tuple[str, ...]
    """Further texts that end a turn with tool calls; empty if `stops` end tool calls too."""
    open_end: bool
    """True if a conversation's last turn has no stop: the next role's marker is the stop (GLM)."""


class Turn(NamedTuple):
    """An assistant message's span, from after the prompt to after the stop token."""

    message: int
    """Index of the message in the conversation."""
    span: Span
    payloads: tuple[Payload, ...]
    by_prompt: bool = False
    """True if the start was searched by a render of the generation prompt."""


def probe_turn_format(template: ChatTemplate, control: re.Pattern[str]) -> TurnFormat:
    """Learn the turn format from renders of short conversations.

    `control` matches the text of every special token. Raises ValueError if the template cannot
    print a user's message, does not end, or ends an assistant turn by nothing.
    """
    prompt = _probe_prompt(template, control)
    at_end, in_middle = _text_after(template, [USER, ANSWER]), _text_after(template, [USER, ANSWER, USER])
    stops = _stops(at_end, in_middle, control)
    if not stops:
        raise ValueError(
            "nothing ends an assistant's turn in this chat template, so a model could not learn to stop; "
            "use another template"
        )
    call_stops = _stops(
        _text_after(template, [USER, CALLED]),
        _text_after(template, [USER, CALLED, RESULT]),
        control,
        turn_stops=stops,
    )
    return TurnFormat(
        prompt=prompt,
        role_marker=re.split(r"<think|\[THINK", prompt)[0],
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
    """Return the assistant turns in order; raises `Refused` if a start or an end cannot be shown.

    With `shortcut`, a payload right behind a whole generation prompt starts a turn without further
    evidence; without, each prompt is rendered for comparison. The turns are equal either way.
    """

    def prompt_tail(index: int) -> str | None:
        """Return the text from the last payload before message `index` to the model's reply."""
        try:
            prompt = template.render(mark_all(messages[:index]), tools, prompt=True)
        except Refused:
            return None
        marks = list(MARK.finditer(prompt))
        return prompt[marks[-1].end() :] if marks else prompt

    search = _TurnSearch(turn_format, control, located.text, located.payloads, prompt_tail, shortcut)
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            stops = turn_format.stops, turn_format.call_stops if message.get("tool_calls") else ()
            open_end = turn_format.open_end and index == len(messages) - 1
            turns.append(search.turn(index, turns[-1].span.end if turns else 0, stops, open_end=open_end))
    if template.has_generation_tags:
        tags = template.tagged_spans(messages, tools)
        return _narrow_to_tags(turns, tags, located.text, turn_format.stops) or turns
    return turns


class _TurnSearch(NamedTuple):
    """The search for turns in the text of one conversation."""

    turn_format: TurnFormat
    control: re.Pattern[str]
    text: str
    payloads: list[Payload]
    prompt_tail: Callable[[int], str | None]
    """Function from a message's index to the end of its rendered prompt; None if refused."""
    shortcut: bool

    def turn(self, index: int, earliest: int, stops: Sequence[Sequence[str]], *, open_end: bool) -> Turn:
        """Return the turn of assistant message `index`, at or after `earliest`.

        Raises `Refused` if start or end are not found.
        """
        # Some templates repeat earlier messages later: count only payloads before the message.
        first = min((p.start for p in self.payloads if p.message == index), default=len(self.text))
        before = max((p.end for p in self.payloads if p.message < index and p.end <= first), default=0)
        payloads = self._first_prints(index, max(before, earliest))
        limit = payloads[0].start if payloads else self._next_message(index, before)
        start, by_prompt = self._start(index, before, limit, empty=not payloads)
        if start < earliest:
            raise Refused("messages out of order", f"message {index} begins inside the turn before it")
        last = max((p.end for p in payloads), default=start)
        end = self._end(index, last, self._next_message(index, last), stops, open_end=open_end)
        return Turn(index, Span(start, end), tuple(payloads), by_prompt)

    def _first_prints(self, index: int, earliest: int) -> list[Payload]:
        """Return the message's payloads from `earliest` on, each at its first print, in order."""
        first_prints: dict[tuple[str, int], Payload] = {}
        for payload in self.payloads:
            if payload.message == index and payload.start >= earliest:
                first_prints.setdefault((payload.kind, payload.number), payload)
        return sorted(first_prints.values())

    def _next_message(self, index: int, offset: int) -> int:
        """Return the first start at or after `offset` of a later message, or the text's end."""
        starts = (p.start for p in self.payloads if p.message > index and p.start >= offset)
        return min(starts, default=len(self.text))

    def _start(self, index: int, before: int, limit: int, *, empty: bool) -> tuple[int, bool]:
        """Return a start in `[before, limit]`, and True if the prompt was rendered."""
        gap = self.text[before:limit]
        prompt, role_marker = self.turn_format.prompt, self.turn_format.role_marker
        if self.shortcut and prompt and not empty and gap.endswith(prompt):
            return limit, False
        start = self._start_by_prompt(index, gap)
        if start is None:
            start = self._start_by_role_marker(gap)
        if start is None:
            missing = repr(role_marker) if role_marker else "the template's text before an assistant message"
            raise Refused("no header", f"{missing} is missing before message {index}")
        return before + start, True

    def _start_by_prompt(self, index: int, gap: str) -> int | None:
        """Return the length of the prompt's tail in `gap`; None if the role marker is cut off.

        A prompt that opens a thought counts as far as the gap follows the prompt.
        """
        tail = self.prompt_tail(index)
        if tail is None:
            return None
        cut = _cut(_common_prefix(gap, tail), tail, self.control)
        role_marker = self.turn_format.role_marker
        needed = tail.rfind(role_marker) + len(role_marker) if role_marker and role_marker in tail else len(tail)
        return cut if cut >= needed else None

    def _start_by_role_marker(self, gap: str) -> int | None:
        """Return the end of the gap's only role marker and of the prompt's matching rest."""
        prompt, role_marker = self.turn_format.prompt, self.turn_format.role_marker
        if not role_marker or gap.count(role_marker) != 1:
            return None
        at = gap.index(role_marker)
        return at + max(_cut(_common_prefix(gap[at:], prompt), prompt, self.control), len(role_marker))

    def _end(self, index: int, last: int, following: int, stops: Sequence[Sequence[str]], *, open_end: bool) -> int:
        """Return the end of the first stop in `[last, following)`; an earlier group wins."""
        rest = self.text[last:following]
        for group in stops:
            ends = [at + len(stop) for stop in group if (at := rest.find(stop)) >= 0]
            if ends:
                return last + min(ends)
        if open_end and following == len(self.text):
            return len(self.text.rstrip())
        raise Refused("no stop token", f"none of {[stop for group in stops for stop in group]} ends message {index}")


def _narrow_to_tags(turns: list[Turn], tags: list[Span], text: str, stops: Sequence[str]) -> list[Turn]:
    """Narrow each turn to the `{% generation %}` tag around the payloads.

    Return no turns if a turn's payloads lie in no tag.
    """
    result = []
    for turn in turns:
        start = min((p.start for p in turn.payloads), default=turn.span.start)
        end = max((p.end for p in turn.payloads), default=turn.span.start)
        tag = next((tag for tag in tags if tag.start <= start and end <= tag.end), None)
        if tag is None:
            return []
        # Some tags include the prompt, some leave the stop token out.
        stop_follows = text[tag.end : turn.span.end] in ("", *stops)
        tag_end = max(tag.end, turn.span.end) if stop_follows else turn.span.end
        result.append(turn._replace(span=Span(max(tag.start, turn.span.start), min(tag_end, turn.span.end))))
    return result


def _probe_prompt(template: ChatTemplate, control: re.Pattern[str]) -> str:
    """Return the text that `add_generation_prompt` adds behind a user's message."""
    try:
        plain, prompted = template.render([USER]), template.render([USER], prompt=True)
    except Refused as refused:
        if refused.reason == "template takes too long":
            raise ValueError(f"the chat template does not end: {refused.detail}; use another template") from None
        try:
            plain, prompted = template.render([USER], (TOOL,)), template.render([USER], (TOOL,), prompt=True)
        except Refused:
            raise ValueError(
                f"the chat template cannot print a user's message, with or without a tool ({refused.detail}); "
                "use another template"
            ) from None
    if prompted.startswith(plain):
        return prompted[len(plain) :]
    # Some templates close a conversation without a prompt (Phi): the prompt begins before that end.
    return prompted[_cut(_common_prefix(plain, prompted), prompted, control) :]


def _text_after(template: ChatTemplate, messages: list[TemplateMessage]) -> str | None:
    """Return the text from the assistant's payload to the next payload; None if not printed."""
    called = any("tool_calls" in message for message in messages)
    for tools in ((TOOL,),) if called else ((), (TOOL,)):
        try:
            text = template.render(messages, tools)
        except Refused:
            continue
        if SAID in text:
            return text[text.rindex(SAID) + len(SAID) :].split("Zq ")[0]
    return None


def _stops(
    at_end: str | None, in_middle: str | None, control: re.Pattern[str], turn_stops: Iterable[str] = ()
) -> frozenset[str]:
    """Return the texts that end a turn.

    `at_end` and `in_middle` are the texts behind the turn's payload at a conversation's end and
    before another message. The result is the last special token of the common beginning; without
    special tokens, the common beginning; without a common beginning, the first special token of
    each text. `turn_stops` asks for additional stops of tool calls: none if a text already contains
    a turn stop.

        at_end "<|im_end|>\\n", in_middle "<|im_end|>\\n<|im_start|>user\\n"    ->  {"<|im_end|>"}
    """
    texts = [text for text in (at_end, in_middle) if text is not None]
    if not texts or any(_contains(text, turn_stops) for text in texts):
        return frozenset()
    common = _common_prefix(*texts) if len(texts) == 2 else ""
    common = common[: _cut(common, max(texts, key=len), control)] if common not in texts else common
    if tokens := list(control.finditer(common)):
        return frozenset([common[tokens[-1].start() : tokens[-1].end()]])
    if common.strip() and not turn_stops:
        return frozenset([common.strip()])
    return frozenset(
        token[0] for text in texts if (token := control.search(text) or (_TAG.match(text) if not turn_stops else None))
    )


def _contains(text: str, stops: Iterable[str]) -> bool:
    return any(stop in text for stop in stops)


_TAG = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]")


def _common_prefix(left: str, right: str) -> str:
    lengths = (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return left[: next(lengths, min(len(left), len(right)))]


def _cut(prefix: str, text: str, control: re.Pattern[str]) -> int:
    """Return the length of `prefix` up to the last token, tag or line end of `text`.

    `prefix` is a beginning of `text`; a prefix equal to the text is not cut.
    """
    if len(prefix) == len(text):
        return len(text)
    border = re.compile(rf"{control.pattern}|{_TAG.pattern}|\n+")
    return max((match.end() for match in border.finditer(text) if match.end() <= len(prefix)), default=0)
