"""Learn the texts around an assistant turn from a few renders of the template, once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sftstream.records import Refused
from sftstream.rendering.overlap import TAG, common_prefix, contains, cut, cut_prefix, token_or_tag
from sftstream.rendering.probe_messages import ANSWER, CALLED, RESULT, SAID, SYSTEM, THOUGHT, TOOL, USER
from sftstream.rendering.template import ChatTemplate, TemplateMessage


class TurnFormat(NamedTuple):
    """The texts around an assistant turn. A state stores the fields as an array, in this order."""

    prompt: str
    """The generation prompt after a user's message; empty if the template has none (Mistral)."""
    role_marker: str
    """The beginning of the prompt that names the role, as far as the template prints the beginning
    before every answer: `<|im_start|>assistant\\n` of the prompt
    `<|im_start|>assistant\\n<think>\\n`.
    """
    stops: tuple[str, ...]
    """Texts that end a turn, `("<|im_end|>",)` for example."""
    call_stops: tuple[str, ...]
    """Further texts that end a turn with tool calls; empty if `stops` end tool calls too."""
    open_end: bool
    """True if a conversation's last turn has no stop: the next role's marker is the stop (GLM)."""


def probe_turn_format(template: ChatTemplate, control: re.Pattern[str]) -> TurnFormat:
    """Learn the turn format from renders of short conversations.

    `control` matches the text of every special token. Raises ValueError if the template cannot
    print a user's message, does not end, or ends an assistant turn by nothing.
    """
    prompt = _probe_prompt(template, control)
    role_marker = _probe_role_marker(template, control, prompt)
    at_end, in_middle = _text_after(template, [USER, ANSWER]), _text_after(template, [USER, ANSWER, USER])
    openers = _probe_openers(template, control, role_marker, at_end)
    stops = _stops(at_end, in_middle, control, openers)
    if not stops:
        raise ValueError(
            "nothing ends an assistant's turn in this chat template, so a model could not learn to stop; "
            "use another template"
        )
    open_end = at_end is not None and not contains(at_end, stops)
    call_stops = _stops(
        _text_after(template, [USER, CALLED]),
        _text_after(template, [USER, CALLED, RESULT]),
        control,
        openers | _texts_between_calls(template, control),
        turn_stops=stops,
        by_next_role=open_end,
    )
    return TurnFormat(
        prompt=prompt,
        role_marker=role_marker,
        stops=tuple(sorted(stops)),
        call_stops=tuple(sorted(call_stops)),
        open_end=open_end,
    )


def _probe_prompt(template: ChatTemplate, control: re.Pattern[str]) -> str:
    """Return the text that `add_generation_prompt` adds behind a user's message."""
    try:
        plain, prompted = template.render([USER]), template.render([USER], prompt=True)
    except Refused as refused:
        if refused.reason == "template does too much":
            raise ValueError(f"the chat template does too much: {refused.detail}; use another template") from None
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
    asked = prompted.rfind(USER["content"]) + len(USER["content"])
    return prompted[max(asked, cut(common_prefix(plain, prompted), prompted, control)) :]


def _probe_role_marker(template: ChatTemplate, control: re.Pattern[str], prompt: str) -> str:
    """Return the prompt's beginning, as far as the template prints the beginning before answers.

    A prompt may open a thought, hold an empty one, or begin the answer. Without a prompt, but with
    a role's name printed at the end of every conversation, return the name.
    """
    answers = ([USER, ANSWER], [USER, ANSWER, USER, ANSWER], [USER, THOUGHT], [USER, CALLED])
    tail = _gap(template, [USER], prompt=True) or ""
    printed = [len(cut_prefix(gap, tail, control)) for answer in answers if (gap := _gap(template, answer)) is not None]
    if not prompt:
        others = [_gap(template, [USER, USER]), _gap(template, [USER, SYSTEM])]
        shared = [common_prefix(tail, other) for other in others if other is not None]
        begin = max((len(text[: cut(text, tail, control)]) for text in shared), default=len(tail))
        return tail[begin : min(printed)] if printed and begin < min(printed) else ""
    before = len(tail) - len(prompt)
    lengths = [length - before for length in printed if length > before]
    opened = len(re.split(r"<think|\[THINK", prompt)[0])
    return prompt[: min([opened, *lengths])]


def _gap(template: ChatTemplate, messages: Sequence[TemplateMessage], *, prompt: bool = False) -> str | None:
    """Return the text between the first payload and the next, or to the end; None if refused."""
    for tools in ((), (TOOL,)):
        try:
            text = template.render(messages, tools, prompt=prompt)
        except Refused:
            continue
        parts = text.split(USER["content"], 1)
        if len(parts) == 2:
            return parts[1].split("Zq ", 1)[0]
    return None


def _probe_openers(
    template: ChatTemplate, control: re.Pattern[str], role_marker: str, at_end: str | None
) -> frozenset[str]:
    """Return the tokens and tags that begin messages.

    Either the first of the role marker, or the first of the text that returns with each message.
    """
    token = token_or_tag(control)
    openers = [match[0]] if (match := token.match(role_marker.lstrip())) else []
    try:
        text = template.render([USER, ANSWER, USER, ANSWER])
    except Refused:
        text = ""
    head = text.split(USER["content"])[0]
    openers += [match[0] for match in token.finditer(head) if text.count(match[0]) > 1][:1]
    ends = token.match((at_end or "").lstrip())
    return frozenset(openers) - {ends[0] if ends else ""}


def _texts_between_calls(template: ChatTemplate, control: re.Pattern[str]) -> frozenset[str]:
    """Return the tokens and tags between two calls of one message; none of them ends a turn."""
    (call,) = CALLED["tool_calls"]
    try:
        text = template.render([USER, {**CALLED, "tool_calls": [call, {**call, "id": "bcdefghij"}]}], (TOOL,))
    except Refused:
        return frozenset()
    between = text.split(SAID)[1:-1]
    token = token_or_tag(control)
    return frozenset(match[0] for part in between for match in token.finditer(part))


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
    at_end: str | None,
    in_middle: str | None,
    control: re.Pattern[str],
    other: frozenset[str],
    turn_stops: Iterable[str] = (),
    *,
    by_next_role: bool = True,
) -> frozenset[str]:
    """Return the texts that end a turn.

    `at_end` and `in_middle` are the texts behind the turn's payload at a conversation's end and
    before another message. The result is the last special token of the common beginning, before
    any text of `other`; without special tokens, the common beginning; without a common beginning,
    the first special token of each text. `turn_stops` asks for additional stops of tool calls: none
    if a text already contains a turn stop. `by_next_role` allows the first token of the next
    message as a stop.

        at_end "<|im_end|>\\n", in_middle "<|im_end|>\\n<|im_start|>user\\n"    ->  {"<|im_end|>"}
    """
    texts = [text for text in (at_end, in_middle) if text is not None]
    if not texts or any(contains(text, turn_stops) for text in texts):
        return frozenset()
    common = common_prefix(*texts) if len(texts) == 2 else ""
    common = common[: cut(common, max(texts, key=len), control)] if common not in texts else common
    if not turn_stops:
        common = common[: min((at for at in map(common.find, other) if at >= 0), default=len(common))]
    if tokens := [match[0] for match in control.finditer(common) if match[0] not in other]:
        return frozenset([tokens[-1]])
    if common.strip() and not turn_stops:
        return frozenset([common.strip()])
    if len(texts) == 2 and not by_next_role:
        return frozenset()
    firsts = (_first_token(text, control, other if turn_stops else (), tags=not turn_stops) for text in texts)
    return frozenset(token for token in firsts if token)


def _first_token(text: str, control: re.Pattern[str], other: Iterable[str], *, tags: bool) -> str | None:
    """Return the first special token that is not in `other`, or else a tag that begins the text."""
    tokens = (match[0] for match in control.finditer(text) if match[0] not in other)
    tag = TAG.match(text) if tags else None
    return next(tokens, tag[0] if tag else None)
