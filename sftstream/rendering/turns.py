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
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from sftstream.records import Refused, Span
from sftstream.rendering.markers import Located, Marking, Payload, locate
from sftstream.rendering.overlap import (
    common_prefix,
    cut,
    cut_prefix,
    is_within,
    opens_thought,
    shared_end,
    token_or_tag,
)
from sftstream.rendering.probe_messages import USER
from sftstream.rendering.template import ChatTemplate, TemplateMessage
from sftstream.rendering.turn_format import TurnFormat


class Turn(NamedTuple):
    """An assistant message's span, from after the prompt to after the stop token."""

    message: int
    """Index of the message in the conversation."""
    span: Span
    payloads: tuple[Payload, ...]
    by_prompt: bool = False
    """True if the start was searched by a render of the generation prompt."""
    by_comparison: bool = False
    """True if further renders were compared; the start holds for this conversation only."""


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
    evidence; without, each prompt is rendered for comparison. The turns are equal either way. An
    empty message without a header or a stop of its own has no turn.
    """
    search = _TurnSearch(template, turn_format, control, messages, tools, located, shortcut=shortcut)
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            try:
                turns.append(search.turn(index, turns[-1].span.end if turns else 0))
            except Refused as refused:
                if search.has_payload(index) or refused.reason not in ("no header", "no stop token"):
                    raise
    if template.has_generation_tags:
        tags = template.tagged_spans(messages, tools)
        return _narrow_to_tags(turns, tags, located.text, turn_format.stops) or turns
    return turns


class _Start(NamedTuple):
    """The start of a turn and the evidence."""

    offset: int
    by_prompt: bool = True
    by_comparison: bool = False


class _TurnSearch:
    """The search for turns in the text of one conversation."""

    def __init__(
        self,
        template: ChatTemplate,
        turn_format: TurnFormat,
        control: re.Pattern[str],
        messages: Sequence[TemplateMessage],
        tools: Sequence[Any],
        located: Located,
        *,
        shortcut: bool,
        compare: bool = True,
    ) -> None:
        self._template = template
        self._format = turn_format
        self._control = control
        self._messages = messages
        self._tools = tools
        self._text = located.text
        self._payloads = located.payloads
        self._fill_blanks = located.fill_blanks
        self._shortcut = shortcut
        self._compare = compare

    def has_payload(self, index: int) -> bool:
        """Return True if a text of message `index` is printed."""
        return any(payload.message == index for payload in self._payloads)

    def turn(self, index: int, earliest: int) -> Turn:
        """Return the turn of assistant message `index`, at or after `earliest`.

        Raises `Refused` if start or end are not found.
        """
        # Some templates repeat earlier messages later: count only payloads before the message.
        first = min((p.start for p in self._payloads if p.message == index), default=len(self._text))
        before = max((p.end for p in self._payloads if p.message < index and p.end <= first), default=0)
        payloads = self._first_prints(index, max(before, earliest))
        limit = payloads[0].start if payloads else self._next_message(index, before)
        start = self._start(index, before, limit, empty=not payloads)
        if start.offset < earliest:
            raise Refused("messages out of order", f"message {index} begins inside the turn before it")
        payloads = [p._replace(start=max(p.start, start.offset)) for p in payloads if p.end > start.offset]
        last = max((p.end for p in payloads), default=start.offset)
        end = self._end(index, last, self._next_message(index, last))
        return Turn(index, Span(start.offset, end), tuple(payloads), start.by_prompt, start.by_comparison)

    def _first_prints(self, index: int, earliest: int) -> list[Payload]:
        """Return the message's payloads from `earliest` on, each at its first print, in order."""
        first_prints: dict[tuple[str, int], Payload] = {}
        for payload in self._payloads:
            if payload.message == index and payload.start >= earliest:
                first_prints.setdefault((payload.kind, payload.number), payload)
        return sorted(first_prints.values())

    def _next_message(self, index: int, offset: int) -> int:
        """Return the first start at or after `offset` of a later message, or the text's end."""
        starts = (p.start for p in self._payloads if p.message > index and p.start >= offset)
        return min(starts, default=len(self._text))

    def _start(self, index: int, before: int, limit: int, *, empty: bool) -> _Start:
        """Return a start from `before` on; before a message with text, at most at `limit`.

        A thought that the generation prompt opens may reach into the message's text.
        """
        gap = self._text[before:limit]
        prompt, role_marker = self._format.prompt, self._format.role_marker
        if self._shortcut and prompt and not empty and gap.endswith(prompt):
            return _Start(limit, by_prompt=False)
        start = self._start_by_prompt(index, before, gap, empty=empty)
        if start is None and (at := self._start_by_role_marker(gap)) is not None:
            start = _Start(at)
        if start is None and not empty and self._compare:
            start = self._start_without_header(index, gap)
        if start is None:
            missing = repr(role_marker) if role_marker else "the template's text before an assistant message"
            raise Refused("no header", f"{missing} is missing before message {index}")
        return start._replace(offset=before + start.offset)

    def _start_by_prompt(self, index: int, before: int, gap: str, *, empty: bool) -> _Start | None:
        """Return the start in `gap`, compared with the prompt of inference; None if not shown.

        The gap holds the template's text before the message, `tail` the end of the prompt. Three
        cases show a start:

            the tail is a beginning of the gap      the rest of the gap is said by the model
            the gap is the tail, or a beginning,    all of the gap is said by the prompt
              or the tail without a middle part
            both agree up to the role's name        the rest of the gap is said by the model
        """
        tail = self._tail(self._messages[:index], prompt=True)
        if tail is None:
            return None
        role_marker = self._format.role_marker
        shown = role_marker in tail if role_marker else index > 0
        following = self._text[before:]
        if following.startswith(tail) and (shown or (index and self._is_said(gap[len(tail) :], empty=empty))):
            start = len(tail) if len(tail) <= len(gap) else self._thought_in_message(following, gap, tail)
        elif not empty and is_within(gap, tail):
            start = self._thought_in_message(following, gap, tail)
        else:
            cut = len(cut_prefix(gap, tail, self._control))
            if cut < (tail.rfind(role_marker) + len(role_marker) if role_marker and shown else len(tail)):
                return None
            start = cut + shared_end(gap[cut:], tail[cut:])
        return _Start(start) if self._is_said(gap[start:], empty=empty) else None

    def _thought_in_message(self, following: str, gap: str, tail: str) -> int:
        """Return the end of the gap, or of a thought's tag that prompt and message both print next.

        Gap `<assistant>`, tail `<assistant><think>`, message `<think>hm</think>seven`: the turn
        starts at `hm`, as for a template that prints the tag and a reasoning.
        """
        if tail.startswith(gap) and opens_thought(tail[len(gap) :]):
            return max(len(gap), len(cut_prefix(following, tail, self._control)))
        return len(gap)

    def _is_said(self, lead: str, *, empty: bool) -> bool:
        """Return True unless the text before the message's own text holds a role marker."""
        role_marker = self._format.role_marker
        return empty or not role_marker or role_marker not in lead

    def _start_by_role_marker(self, gap: str) -> int | None:
        """Return the end of the gap's only role marker and of the prompt's matching rest."""
        prompt, role_marker = self._format.prompt, self._format.role_marker
        if not role_marker or gap.count(role_marker) != 1:
            return None
        at = gap.index(role_marker)
        return at + max(cut(common_prefix(gap[at:], prompt), prompt, self._control), len(role_marker))

    def _start_without_header(self, index: int, gap: str) -> _Start | None:
        """Return the start of a message that the template prints without a header.

        The evidence: the gap is text of the generation prompt, then text that the template prints
        behind the header if the message answers a question.
        """
        tail = self._tail(self._messages[:index], prompt=True)
        plain = self._tail(self._messages[:index], prompt=False)
        if not index or not plain or not tail or not (gap.startswith(plain) and tail.startswith(plain)):
            return None
        asked = [message for message in self._messages[:index] if message["role"] == "user"][-1:] or [USER]
        control, options = [*asked, self._messages[index]], {"shortcut": self._shortcut, "compare": False}
        try:
            located = locate(self._template, control, self._tools)
            search = _TurnSearch(self._template, self._format, self._control, control, self._tools, located, **options)
            turn = search.turn(1, 0)
        except Refused:
            return None
        lead = located.text[turn.span.start : turn.payloads[0].start] if turn.payloads else ""
        start = len(gap) - len(lead)
        return _Start(start, by_comparison=True) if gap.endswith(lead) and is_within(gap[:start], tail) else None

    def _tail(self, messages: Sequence[TemplateMessage], *, prompt: bool) -> str | None:
        """Return the rendered text behind the last payload of the messages; None if refused."""
        marking = Marking(self._messages, self._text, fill_blanks=self._fill_blanks)
        try:
            return marking.tail(self._template.render(marking.mark(messages), self._tools, prompt=prompt))
        except Refused:
            return None

    def _end(self, index: int, last: int, following: int) -> int:
        """Return the end of the first stop in `[last, following)`, before any role marker."""
        rest = self._text[last:following]
        message = self._messages[index]
        stops = self._format.stops + (self._format.call_stops if message.get("tool_calls") else ())
        begins = min((at for at in map(rest.find, self._openers) if at >= 0), default=len(rest))
        ends = [(at, at + len(stop)) for stop in stops if 0 <= (at := rest.find(stop)) <= begins]
        if ends:
            return last + min(ends)[1]
        if self._format.open_end and index == len(self._messages) - 1 and following == len(self._text):
            return last + len(rest.rstrip()) if rest.strip() else last + self._printed_space(index, rest)
        raise Refused("no stop token", f"none of {list(stops)} ends message {index}")

    @cached_property
    def _openers(self) -> list[str]:
        """Texts that begin a message and end none."""
        stops = self._format.stops + self._format.call_stops
        begins = token_or_tag(self._control).match(self._format.role_marker.lstrip())
        return [text for text in {self._format.role_marker, begins[0] if begins else ""} if text and text not in stops]

    def _printed_space(self, index: int, rest: str) -> int:
        """Return the length of the message's own white space at the text's end, if printed."""
        content = "" if self._messages[index].get("tool_calls") else self._messages[index]["content"]
        space = content[len(content.rstrip()) :]
        if not space or rest != space:
            return 0
        # A template that trims and prints equal white space itself puts the letter beside the word.
        longer = [*self._messages[:index], {**self._messages[index], "content": content + "x"}]
        return len(space) if self._template.render(longer, self._tools) == self._text + "x" else 0


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
