"""Find the start and end of each assistant turn in a rendered text.

A turn starts after the generation prompt, where the model would begin to write at inference. A turn
ends after its stop, the text that ends the model's reply. `turn_format.py` finds the prompt and the
stops of a template at the start of the run. `locate.py` finds the payloads of the conversation. A
conversation is refused if the start or end of a turn cannot be proved.

Example. The template prints `<{{ m.role }}>{{ m.content }}</s>` for each message; its generation
prompt is `<assistant>`. The conversation is a user's "hi" and an assistant's "seven":

    text    <user>hi</s><assistant>seven</s>
    format  TurnFormat(prompt="<assistant>", role_marker="<assistant>", stops=("</s>",), ...)
    gap     the template text between the payloads "hi" and "seven": "</s><assistant>"
    tail    the user's message alone, rendered with the generation prompt, is
            "<user>hi</s><assistant>"; the tail is the text after "hi": "</s><assistant>"
    start   gap and tail are equal, so the turn starts at the end of the gap: offset 23
    end     the first stop after "seven" ends at offset 32
    turn    Turn(message=1, span=Span(23, 32), ...), the characters "seven</s>"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from sftstream.records import REASONING_KEYS, Refused, Span
from sftstream.rendering.generation_tags import narrow
from sftstream.rendering.locate import Located, locate
from sftstream.rendering.overlap import (
    common_prefix,
    cut,
    cut_prefix,
    is_within,
    opens_thought,
    shared_end,
    token_or_tag,
)
from sftstream.rendering.payloads import Payload
from sftstream.rendering.probe_messages import USER
from sftstream.rendering.shared_renders import BeginningTails, Tails
from sftstream.rendering.template import ChatTemplate, TemplateMessage
from sftstream.rendering.turn_format import TurnFormat


class Turn(NamedTuple):
    """The place of an assistant message, from the end of the prompt to the end of the stop."""

    message: int
    """Index of the message in the conversation."""
    span: Span
    payloads: tuple[Payload, ...]
    """Payloads of the message inside the turn; of a payload printed twice, the first occurrence."""
    by_prompt: bool = False
    """True if the earlier messages were rendered with the generation prompt to find the start."""
    by_comparison: bool = False
    """True if the start was found by a comparison with a shorter conversation.

    Such a start is proved for this conversation only, not for others of the same shape.
    """


def find_turns(
    template: ChatTemplate,
    turn_format: TurnFormat,
    control: re.Pattern[str],
    messages: Sequence[TemplateMessage],
    tools: Sequence[Any],
    located: Located,
    *,
    shortcut: bool = True,
    known: BeginningTails | None = None,
) -> list[Turn]:
    """Return the assistant turns in text order; raises `Refused` if a start or end is not proved.

    With `shortcut`, a payload directly after a complete generation prompt starts a turn without a
    further render. Without `shortcut`, the earlier messages are rendered with the prompt for every
    turn, and the result is compared with the text. Both ways return equal spans. `known` are the
    tails that need no render, since other conversations began alike. An assistant
    message without any text has no turn if its header or stop is not printed.
    """
    search = _TurnSearch(template, turn_format, control, messages, tools, located, shortcut=shortcut, known=known)
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            try:
                turns.append(search.turn(index, turns[-1].span.end if turns else 0))
            except Refused as refused:
                if search.is_printed(index) or refused.reason not in ("no header", "no stop token"):
                    raise
    if template.has_generation_tags:
        spans = [narrow(turn.span, turn.payloads, located.tags, located.text, turn_format.stops) for turn in turns]
        narrowed = [turn._replace(span=span) for turn, span in zip(turns, spans, strict=True) if span is not None]
        return narrowed if len(narrowed) == len(turns) else turns
    return turns


class _Start(NamedTuple):
    """The offset at which a turn starts, with the flags of `Turn` that tell how it was found."""

    offset: int
    by_prompt: bool = True
    by_comparison: bool = False


class _TurnSearch:
    """The search for turns in the text of one conversation.

    With `compare`, the start of a message without a header may be proved by a render of a shorter
    conversation.
    """

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
        known: BeginningTails | None = None,
    ) -> None:
        self._template = template
        self._format = turn_format
        self._control = control
        self._messages = messages
        self._tools = tools
        self._text = located.text
        self._payloads = located.index
        self._located = located
        self._shortcut = shortcut
        self._compare = compare
        self._tails = Tails(template, turn_format.role_marker, messages, tools, located, known)
        self._starts: dict[tuple[Any, ...], tuple[int, str]] = {}
        self._ends: dict[tuple[str, bool], int] = {}

    def is_printed(self, index: int) -> bool:
        """Return True if a payload or white space of message `index` is printed."""
        content = self._messages[index]["content"]
        if self._payloads.of(index) or not content:
            return bool(self._payloads.of(index))
        emptied = [*self._messages]
        emptied[index] = {**emptied[index], "content": ""}
        return self._template.render(emptied, self._tools) != self._text

    def turn(self, index: int, earliest: int) -> Turn:
        """Return the turn of assistant message `index`, which may not start before `earliest`.

        `earliest` is the end of the previous turn, or 0. Raises `Refused` if the start or the end
        is not found.
        """
        # `before` is the end of the earlier messages. A template may print an earlier message again
        # after this message; such a second print is ignored.
        place = self._payloads.neighbours(index)
        if place and place.own[0].start >= earliest:
            before, payloads, after = place
            limit, last = payloads[0].start, payloads[-1].end
            following = len(self._text) if after is None else after
        else:
            own = self._payloads.of(index)
            before = self._payloads.last_end(index, own[0].start if own else len(self._text))
            payloads = self._payloads.first_prints(index, max(before, earliest))
            limit = payloads[0].start if payloads else self._next_message(index, before)
        start = self._start(index, before, limit, empty=not payloads)
        if start.offset < earliest:
            raise Refused("messages out of order", f"message {index} begins inside the turn before it")
        if payloads and payloads[0].start < start.offset:
            payloads = [p._replace(start=max(p.start, start.offset)) for p in payloads if p.end > start.offset]
            place = None
        if not place:
            last = max((p.end for p in payloads), default=start.offset)
            following = self._next_message(index, last)
        end = self._end(index, last, following)
        return Turn(index, Span(start.offset, end), tuple(payloads), start.by_prompt, start.by_comparison)

    def _next_message(self, index: int, offset: int) -> int:
        """Return the start of the first payload of a later message, at or after `offset`.

        Return the end of the text if there is no such payload.
        """
        start = self._payloads.next_start(index, offset)
        return len(self._text) if start is None else start

    def _start(self, index: int, before: int, limit: int, *, empty: bool) -> _Start:
        """Return the start of the turn.

        The gap is the text from `before`, the end of the earlier messages' payloads, to `limit`,
        the beginning of the message's first payload. An `empty` message has no payload; its gap
        ends at the next message. The start lies in the gap or at its end, with one exception: if
        the generation prompt ends with `<think>` and the message's own text begins with the same
        `<think>`, the start lies after this `<think>`.
        """
        gap = self._text[before:limit]
        prompt, role_marker = self._format.prompt, self._format.role_marker
        if self._shortcut and prompt and not empty and gap.endswith(prompt):
            return _Start(limit, by_prompt=False)
        if not empty and (offset := self._known_start(index, gap, limit)) is not None:
            return _Start(before + offset, by_prompt=False)
        start = self._start_by_prompt(index, before, gap, empty=empty)
        if start is None and (at := self._start_by_role_marker(gap)) is not None:
            start = _Start(at)
        if start is None and not empty and self._compare:
            start = self._start_without_header(index, gap)
        if start is None:
            missing = repr(role_marker) if role_marker else "the template's text before an assistant message"
            raise Refused("no header", f"{missing} is missing before message {index}")
        if not empty and not start.by_comparison:
            self._know_start(index, gap, limit, start.offset)
        return start._replace(offset=before + start.offset)

    def _known_start(self, index: int, gap: str, limit: int) -> int | None:
        """Return the start as an offset in `gap`, as found for an earlier turn; None if unknown.

        Two turns have the same start if their gaps are equal, if the same kinds of messages precede
        them, and if the words of both messages change nothing: the content does not begin with
        white space, and the text does not begin like the rest of the generation prompt.
        """
        offset, next_character = self._starts.get(self._place(index, gap), (None, ""))
        return None if offset is None or self._words_matter(index, limit, next_character) else offset

    def _know_start(self, index: int, gap: str, limit: int, offset: int) -> None:
        """Store the start of a turn for `_known_start`, unless the message's words matter."""
        tail, _ = self._tails.tail(index, gap, prompt=True)
        next_character = tail[len(gap) : len(gap) + 1] if tail and tail.startswith(gap) else ""
        if not self._words_matter(index, limit, next_character):
            self._starts[self._place(index, gap)] = offset, next_character

    def _words_matter(self, index: int, limit: int, next_character: str) -> bool:
        """Return True if the words of a message may change the start of its turn.

        `next_character` follows the gap in the generation prompt; "" if the prompt ends before.
        """
        message = self._messages[index]
        indented = message["content"][:1].isspace() or message.get("reasoning_content", "")[:1].isspace()
        return indented or self._text[limit : limit + 1] == next_character

    def _place(self, index: int, gap: str) -> tuple[Any, ...]:
        return gap, *self._tails.kinds_before(index)

    def _start_by_prompt(self, index: int, before: int, gap: str, *, empty: bool) -> _Start | None:
        """Return the start as an offset in `gap`, proved by a render of the generation prompt.

        The earlier messages are rendered alone, with the generation prompt. The tail is the text
        after the last payload of this render; at inference the model speaks after the tail. Three
        cases are tried in order:

            the gap begins with the tail          the model says the rest of the gap
                gap   </s><assistant><tool_call>  the turn starts at <tool_call>
                tail  </s><assistant>

            the gap is a part of the tail         the model says nothing of the gap
                gap   </s><assistant>             the turn starts at the message's text
                tail  </s><assistant><think></think>

            both agree up to the role marker      the model says the gap from the difference on
                gap   </s><assistant><quick>      the turn starts at <quick>
                tail  </s><assistant><deep>

        In the third case, the rest of the gap after the common beginning may start with a suffix of
        the tail. The suffix belongs to the prompt, so the turn starts after the suffix: for the gap
        `</s><assistant></think><call>` and the tail `</s><assistant><think></think>`, at `<call>`.
        Return None if no case applies, or if the gap has a role marker after the start.
        """
        tail, rendered = self._tails.tail(index, gap, prompt=True)
        if tail is None:
            return None
        role_marker = self._format.role_marker
        shown = role_marker in tail if role_marker else index > 0
        if self._text.startswith(tail, before) and (shown or (index and self._is_said(gap[len(tail) :], empty=empty))):
            start = len(tail) if len(tail) <= len(gap) else self._thought_in_message(before, gap, tail)
        elif not empty and is_within(gap, tail):
            start = self._thought_in_message(before, gap, tail) - self._own_indent(index, before, gap, tail)
        else:
            cut = len(cut_prefix(gap, tail, self._control))
            if cut < (tail.rfind(role_marker) + len(role_marker) if role_marker and shown else len(tail)):
                return None
            start = cut + shared_end(gap[cut:], tail[cut:])
        said = self._is_said(gap[start:], empty=empty) and not self._is_inside_role_marker(gap, start)
        return _Start(start, by_prompt=rendered) if said else None

    def _thought_in_message(self, before: int, gap: str, tail: str) -> int:
        """Return the start of a turn whose `<think>` may already belong to the prompt.

        The text from the offset `before` on begins with `gap` and the message.
        Gap `<assistant>`, tail `<assistant><think>`, message `<think>hm</think>seven`: the prompt
        already contains `<think>`, so the turn starts at `hm`. If the tail has no opened thought
        after the gap, the turn starts at the end of the gap.
        """
        if tail.startswith(gap) and opens_thought(tail[len(gap) :]):
            following = self._text[before : before + len(tail)]
            return max(len(gap), len(cut_prefix(following, tail, self._control)))
        return len(gap)

    def _own_indent(self, index: int, before: int, gap: str, tail: str) -> int:
        """Return how many characters at the end of `gap` are white space of the message's text.

        Gap `<assistant>\\n`, tail `<assistant><think>\\n`, content "\\nseven": the line end is the
        content's, not the end of the prompt. The content, or the reasoning if it is printed first,
        is rendered without the white space: if nothing else disappears from the text, the white
        space is the message's, else the result is 0. A blank text is replaced by an "x", which must
        stand where the white space ended. The result is 0 too if the gap is a beginning of the
        tail.
        """
        message = self._messages[index]
        reasons = "reasoning_content" in message and self._payloads.of(index)[0].kind == "reasoning"
        keys = REASONING_KEYS if reasons else ("content",)
        text = message[keys[0]]
        space = text[: len(text) - len(text.lstrip())]
        if not space or tail.startswith(gap) or not gap.endswith(space):
            return 0
        stripped = [*self._messages]
        word = "" if text.lstrip() else "x"
        stripped[index] = {**message, **dict.fromkeys(keys, text.lstrip() or word)}
        at = before + len(gap)
        without = self._text[: at - len(space)] + word + self._text[at:]
        return len(space) if self._template.render(stripped, self._tools) == without else 0

    def _is_said(self, lead: str, *, empty: bool) -> bool:
        """Return True if `lead`, the text from the start to the first payload, has no role marker.

        A role marker in `lead` would show that the turn starts later. For an `empty` message, which
        has no payload, the result is True without a check.
        """
        role_marker = self._format.role_marker
        return empty or not role_marker or role_marker not in lead

    def _is_inside_role_marker(self, gap: str, start: int) -> bool:
        """Return True if a role marker in the gap begins before `start` and ends after `start`."""
        role_marker = self._format.role_marker
        at = gap.find(role_marker, max(0, start - len(role_marker) + 1))
        return 0 <= at < start < at + len(role_marker)

    def _start_by_role_marker(self, gap: str) -> int | None:
        """Return the start after the gap's only role marker; None unless there is exactly one.

        From the role marker on, the gap is compared with the prompt. The turn starts after their
        common beginning: for the gap `<assistant>\\n<think>\\n\\n`, the role marker `<assistant>`
        and the prompt `<assistant>\\n`, the turn starts at `<think>`.
        """
        prompt, role_marker = self._format.prompt, self._format.role_marker
        if not role_marker or gap.count(role_marker) != 1:
            return None
        at = gap.index(role_marker)
        return at + max(cut(common_prefix(gap[at:], prompt), prompt, self._control), len(role_marker))

    def _start_without_header(self, index: int, gap: str) -> _Start | None:
        """Return the start of a message that the template prints without a header.

        Apertus and DeepSeek 3.2 print no header before an answer to a tool's result. As evidence,
        the last message of a user and this message are rendered as a conversation of two messages,
        for which the template prints a header. The lead is the text between the header and the
        first payload of this message, `<|inner|>` for example. The start is proved if the gap ends
        with the lead, and if the rest of the gap is within the tail (see `is_within`). The tail
        is the text after the earlier messages, rendered with the generation prompt. The turn then
        starts with the lead. Return None otherwise.
        """
        tail, _ = self._tails.tail(index, gap, prompt=True)
        plain, _ = self._tails.tail(index, gap, prompt=False)
        if not index or not plain or not tail or not (gap.startswith(plain) and tail.startswith(plain)):
            return None
        asked = [message for message in self._messages[:index] if message["role"] == "user"][-1:] or [USER]
        control: list[TemplateMessage] = [*asked, self._messages[index]]
        try:
            located = locate(self._template, control, self._tools)
            given = self._template, self._format, self._control, control, self._tools, located
            turn = _TurnSearch(*given, shortcut=self._shortcut, compare=False).turn(1, 0)
        except Refused:
            return None
        lead = located.text[turn.span.start : turn.payloads[0].start] if turn.payloads else ""
        start = len(gap) - len(lead)
        return _Start(start, by_comparison=True) if gap.endswith(lead) and is_within(gap[:start], tail) else None

    def _end(self, index: int, last: int, following: int) -> int:
        """Return the end of the turn: the end of the first stop after the message's last payload.

        `last` is the end of that payload, and `following` is the start of the next payload of a
        later message. The stop is searched between the two, up to a text that begins a message.
        Raises `Refused` if no stop is found. If the format has an open end, the last message of the
        conversation needs no stop: its turn ends with the text, without the white space that the
        template adds.
        """
        rest, calls = self._text[last:following], bool(self._messages[index].get("tool_calls"))
        if (length := self._ends.get((rest, calls))) is not None:
            return last + length
        stops = self._format.stops + (self._format.call_stops if calls else ())
        begins = min((at for at in map(rest.find, self._openers) if at >= 0), default=len(rest))
        ends = [(at, at + len(stop)) for stop in stops if 0 <= (at := rest.find(stop)) <= begins]
        if ends:
            self._ends[rest, calls] = min(ends)[1]
            return last + min(ends)[1]
        if self._format.open_end and index == len(self._messages) - 1 and following == len(self._text):
            return last + len(rest.rstrip()) if rest.strip() else last + self._printed_space(index, rest)
        raise Refused("no stop token", f"none of {list(stops)} ends message {index}")

    @cached_property
    def _openers(self) -> list[str]:
        """Texts that begin a message: the role marker and its first token, without the stops."""
        stops = self._format.stops + self._format.call_stops
        begins = token_or_tag(self._control).match(self._format.role_marker.lstrip())
        return [text for text in {self._format.role_marker, begins[0] if begins else ""} if text and text not in stops]

    def _printed_space(self, index: int, rest: str) -> int:
        """Return how many characters of `rest` are white space of the message's own content.

        `rest` is the white space between the message's last payload and the end of the text. The
        result is the length of `rest` or 0.
        """
        content = "" if self._messages[index].get("tool_calls") else self._messages[index]["content"]
        space = content[len(content.rstrip()) :]
        if not space or rest != space:
            return 0
        # A template may trim the content and print the same white space itself. To find out, the
        # content is rendered with an "x" added at its end. If the template prints the space itself,
        # the space follows the "x"; if the space is part of the content, "x" is printed last.
        longer = [*self._messages[:index], {**self._messages[index], "content": content + "x"}]
        return len(space) if self._template.render(longer, self._tools) == self._text + "x" else 0
