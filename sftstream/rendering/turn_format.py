"""Learn the template's texts around an assistant turn: the generation prompt and the stops.

The texts are learned once per run, from renders of short conversations (`probe_messages.py`).

Example. Two conversations are rendered with ChatML: a question and an answer, and the same with a
second question. After the answer the template prints

    at the conversation's end      "<|im_end|>\\n"
    before another message         "<|im_end|>\\n<|im_start|>user\\n"

The common beginning is "<|im_end|>\\n"; its last special token, "<|im_end|>", is the stop. With
`add_generation_prompt` the template adds "<|im_start|>assistant\\n" to the question; the template
prints the same text before every answer, so the text is both generation prompt and role marker:

    TurnFormat(
        prompt="<|im_start|>assistant\\n", role_marker="<|im_start|>assistant\\n",
        stops=("<|im_end|>",), call_stops=(), open_end=False,
    )
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sftstream.records import Refused
from sftstream.rendering.overlap import TAG, common_prefix, contains, cut, cut_prefix, opens_thought, token_or_tag
from sftstream.rendering.probe_messages import ANSWER, CALLED, RESULT, SAID, SYSTEM, THOUGHT, TOOL, USER
from sftstream.rendering.template import ChatTemplate, TemplateMessage


class TurnFormat(NamedTuple):
    """The template's texts around an assistant turn.

    The saved data state stores the fields as an array, so their order must not change.
    """

    prompt: str
    """The generation prompt after a user's message; empty if there is no prompt (Mistral)."""
    role_marker: str
    """The longest beginning of the prompt that the template also prints before every answer.

    `<|im_start|>assistant\\n` if the prompt is `<|im_start|>assistant\\n<think>\\n` and the
    template prints answers without a thought. Without a prompt, the text that opens an answer.
    """
    stops: tuple[str, ...]
    """Texts that end a turn, for example `("<|im_end|>",)`."""
    call_stops: tuple[str, ...]
    """Texts that end only turns with tool calls: `("<|call|>",)` for gpt-oss.

    Empty if turns with tool calls end with a member of `stops`.
    """
    open_end: bool
    """True if the last turn of a conversation has no stop (GLM).

    With such a template, the beginning of the next message ends a turn: `<|user|>`, for example.
    """


def probe_turn_format(template: ChatTemplate, control: re.Pattern[str]) -> TurnFormat:
    """Return the turn format, learned from renders of short conversations.

    `control` matches the text of any special token. Raises ValueError if the template cannot print
    a user's message, does too much work, or prints no text that ends an assistant turn, and
    RuntimeError if a render exceeds the time limit.
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
        openers | _texts_between_calls(template, control, role_marker),
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
    """Return the text that `add_generation_prompt` adds after a user's message."""
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
    # Phi prints an end-of-text token after the last message, but only without a prompt. The prompt
    # then begins at the first difference of the two texts.
    asked = prompted.rfind(USER["content"]) + len(USER["content"])
    return prompted[max(asked, cut(common_prefix(plain, prompted), prompted, control)) :]


def _probe_role_marker(template: ChatTemplate, control: re.Pattern[str], prompt: str) -> str:
    """Return the longest beginning of the prompt that is also printed before every answer.

    The rest of a prompt may be an opened thought (`<think>`), an empty thought (`<think></think>`),
    or the first words of the answer. A template without a prompt may print the assistant's header
    after the last user message even if no answer follows; then return this header. For all other
    templates without a prompt, return the header that is printed before an answer.
    """
    answers = ([USER, ANSWER], [USER, ANSWER, USER, ANSWER], [USER, THOUGHT], [USER, CALLED])
    tail = _gap(template, [USER], prompt=True) or ""
    printed = [len(cut_prefix(gap, tail, control)) for answer in answers if (gap := _gap(template, answer)) is not None]
    if not prompt:
        others = [_gap(template, [USER, USER]), _gap(template, [USER, SYSTEM])]
        shared = [common_prefix(tail, other) for other in others if other is not None]
        begin = max((len(text[: cut(text, tail, control)]) for text in shared), default=len(tail))
        if printed and begin < min(printed):
            return tail[begin : min(printed)]
        return _header_without_prompt(template, tail)
    before = len(tail) - len(prompt)
    lengths = [length - before for length in printed if length > before]
    opened = len(re.split(r"<think|\[THINK", prompt)[0])
    return prompt[: min([opened, *lengths])]


def _header_without_prompt(template: ChatTemplate, tail: str) -> str:
    """Return the header of an answer, for a template without a generation prompt.

    `tail` is the text after a user's message at the end of a conversation. The gap before an answer
    is the tail and the header: tail "</s>", gap "</s><assistant>", header "<assistant>". The header
    is not trained, even though at inference the model has to write it. White space or an opened
    thought does not count as a header.
    """
    gap = _gap(template, [USER, ANSWER]) or ""
    header = gap[len(tail) :] if gap.startswith(tail) else ""
    return "" if opens_thought(header) else header.strip()


def _gap(template: ChatTemplate, messages: Sequence[TemplateMessage], *, prompt: bool = False) -> str | None:
    """Return the text from the first user's content to the next payload, or to the text's end.

    Return None if the template refuses the messages, both with and without a tool definition.
    """
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
    """Return the special tokens and tags that begin a message, `<|im_start|>` for example.

    The result has up to two entries. The first is the token or tag at the start of the role marker.
    The second is a token or tag before the first user's content: the first that occurs more than
    once in the render. The token or tag at the start of `at_end`, the text after a last answer,
    ends a turn and is left out.
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


def _texts_between_calls(template: ChatTemplate, control: re.Pattern[str], role_marker: str) -> frozenset[str]:
    """Return the special tokens and tags printed between two calls of one message.

    They are not stops, since the turn continues after them. Tokens before a role marker are left
    out: the template ends the first call like a turn, and opens another turn for the second call.
    """
    (call,) = CALLED["tool_calls"]
    try:
        text = template.render([USER, {**CALLED, "tool_calls": [call, {**call, "id": "bcdefghij"}]}], (TOOL,))
    except Refused:
        return frozenset()
    between = text.split(SAID)[1:-1]
    token = token_or_tag(control)
    starts = (max(0, part.find(role_marker)) if role_marker else 0 for part in between)
    return frozenset(
        match[0] for part, start in zip(between, starts, strict=True) for match in token.finditer(part, start)
    )


def _text_after(template: ChatTemplate, messages: list[TemplateMessage]) -> str | None:
    """Return the text from the assistant's last payload to the next payload or the text's end.

    Return None if the template does not print the assistant's payload.
    """
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

    `at_end` is the text after the turn's payload at the end of a conversation, `in_middle` the text
    after the same payload before another message; None if the template refuses the conversation.
    `other` are tokens and tags that do not end a turn. The common beginning of `at_end` and
    `in_middle` is cut after its last whole token, tag or line end. Three rules are tried in order:

    1. the last special token of the common beginning that is not in `other`; without `turn_stops`,
       only the text before the first of `other` is searched:

           at_end "<|im_end|>\\n", in_middle "<|im_end|>\\n<|im_start|>user\\n"  ->  {"<|im_end|>"}

    2. the common beginning itself:

           at_end "[/A]\\n", in_middle "[/A]\\n[U]"  ->  {"[/A]"}

    3. the first special token of each text, or a tag that begins the text (GLM):

           at_end "", in_middle "<|user|>\\n"  ->  {"<|user|>"}

    `turn_stops` are the known stops of turns without calls, if the texts are from turns with calls.
    With `turn_stops`, rule 2 is never applied, and the result is empty if `at_end` or `in_middle`
    contains a member of `turn_stops`. Without `by_next_role`, rule 3 is not applied if both texts
    exist.
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
    """Return the first special token of the text that is not in `other`.

    Without such a token, and with `tags`, return the tag that begins the text, if any.
    """
    tokens = (match[0] for match in control.finditer(text) if match[0] not in other)
    tag = TAG.match(text) if tags else None
    return next(tokens, tag[0] if tag else None)
