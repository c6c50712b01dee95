"""Probe a chat template at the start of a run: render 15 short conversations and judge each one.

Each probe has a shape of its own: a question and an answer, a tool call, reasoning, and so on. The
report tells for each shape whether the template prints all payloads, and which kinds of payloads
the template leaves out. All probes of a template together take 10 to 200 ms. A template that alters
or moves plain questions and answers is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from sftstream.excerpt import excerpt
from sftstream.records import Refused
from sftstream.rendering.limits import bounded_memory
from sftstream.rendering.locate import Located, locate, require_once
from sftstream.rendering.probe_messages import (
    ANSWER,
    CALLED,
    LONG_ANSWER,
    LONG_USER,
    RESULT,
    SAID,
    SYSTEM,
    THOUGHT,
    TOOL,
    USER,
)
from sftstream.rendering.template import ChatTemplate, TemplateMessage
from sftstream.rendering.turn_format import TurnFormat, probe_turn_format
from sftstream.rendering.turns import find_turns

INLINE: TemplateMessage = {"role": "assistant", "content": "<think>\nZq thought Zq\n</think>\n\n" + SAID}
SPACED: TemplateMessage = {"role": "user", "content": "  Zq asked Zq\n"}

SHAPES: dict[str, tuple[list[TemplateMessage], tuple[Any, ...]]] = {
    "question, answer": ([USER, ANSWER], ()),
    "several turns": ([USER, ANSWER, USER, ANSWER], ()),
    "system prompt": ([SYSTEM, USER, ANSWER], ()),
    "system prompt, several turns": ([SYSTEM, USER, ANSWER, USER, ANSWER], ()),
    "tool call": ([USER, CALLED, RESULT, ANSWER], (TOOL,)),
    "tool call with text": ([USER, {**CALLED, "content": "Zq looks Zq"}, RESULT, ANSWER], (TOOL,)),
    "two tool calls": ([USER, {**CALLED, "tool_calls": CALLED["tool_calls"] * 2}, RESULT, RESULT, ANSWER], (TOOL,)),
    "ends with a tool call": ([USER, CALLED], (TOOL,)),
    "reasoning": ([USER, THOUGHT], ()),
    "reasoning in earlier turns": ([USER, THOUGHT, USER, THOUGHT], ()),
    "thoughts in the text": ([USER, INLINE], ()),
    "thoughts in earlier texts": ([USER, INLINE, USER, INLINE], ()),
    "assistant first": ([ANSWER, USER, ANSWER], ()),
    "two answers in a row": ([USER, ANSWER, ANSWER], ()),
    "white space": ([SPACED, ANSWER], ()),
}
"""The probes: name of the shape -> (messages, tool definitions)."""

_PLAIN: dict[str, list[TemplateMessage]] = {
    "long texts": [LONG_USER, LONG_ANSWER],
    "question, answer": [USER, ANSWER],
    "several turns": [USER, ANSWER, USER, ANSWER],
}
"""Conversations that a template must print exactly, if it prints them at all."""

_ASKING = ("question, answer", "system prompt", "tool call")
"""Shapes with which a template may print tool definitions."""

_UNFIT = ("template alters text", "template drops text", "messages out of order")
"""Reasons of a refusal of `_PLAIN` for which a template is refused at start."""


class TemplateReport(msgspec.Struct, frozen=True, kw_only=True):
    """The turn format of a template, and how the template prints the probes."""

    turn_format: TurnFormat
    shapes: dict[str, str]
    """Name of each of `SHAPES` -> verdict.

        "whole"                         all payloads are printed, all turns found
        "whole, but no stop token: ..." all payloads are printed, but the end of a turn is not found
        "drops user content"            the template leaves out the user's content
        "template raises: ..."          the template raises an error for the messages

    Any other refusal is written as "whole, but REASON: ..." if all payloads are printed, else as
    "REASON: ...".
    """
    rewrites_history: bool
    """True if the template prints a turn differently once further messages follow (Qwen3)."""
    prints_tools: bool
    """True if the template prints tool definitions."""
    date: str | None
    """The date that the template gets as today's, YYYY-MM-DD; None if it asks for no date."""
    has_generation_tags: bool
    """True if the template contains `{% generation %}` blocks."""


def probe(template: ChatTemplate, control: re.Pattern[str]) -> TemplateReport:
    """Return the report on a template.

    `control` matches the text of any special token. Raises ValueError if the template is unfit for
    training: it alters or moves texts, prints no stop, cannot print a user's message, or does too
    much work.
    """
    with bounded_memory():
        _require_exact(template)
        turn_format = probe_turn_format(template, control)
        shapes = {name: _judge(template, turn_format, control, *shape) for name, shape in SHAPES.items()}
        rewrites_history = any(_rewrites(template, answer) for answer in (ANSWER, THOUGHT, INLINE))
    return TemplateReport(
        turn_format=turn_format,
        shapes=shapes,
        rewrites_history=rewrites_history,
        prints_tools=any(_prints_tool(template, SHAPES[name][0]) for name in _ASKING),
        date=template.date.isoformat() if template.date else None,
        has_generation_tags=template.has_generation_tags,
    )


def reading_content(template: ChatTemplate) -> ChatTemplate:
    """Return the template, or a copy that gets contents as lists if it prints them only then.

    Some templates read a content only as `[{"type": "text", "text": "hi"}]`, not as "hi". Another
    template may print a list as Python or JSON writes it, with quotes. So a template gets lists
    only if it prints nothing that depends on the words of a question or an answer given as texts,
    and prints a text in a list exactly, without any addition.
    """
    with bounded_memory():
        if _reads_texts(template) or not _prints_parts_exactly(template):
            return template
    return template.with_content_as_parts()


def _reads_texts(template: ChatTemplate) -> bool:
    """Return True if the words of a question, and of an answer, change what the template prints."""
    conversations = ([USER, ANSWER], [_reworded(USER), ANSWER], [USER, _reworded(ANSWER)])
    whole, *others = (_render(template, messages) for messages in conversations)
    return whole is not None and whole not in others


def _reworded(message: TemplateMessage) -> TemplateMessage:
    """Return the message with a content of the same length and other characters."""
    return {**message, "content": "".join(chr(ord(character) + 1) for character in message["content"])}


def _prints_parts_exactly(template: ChatTemplate) -> bool:
    """Return True if the template prints the text of a list as it is, and an empty part not at all.

    A mark before each part, such as "[text]", shows in the print of the empty part. White space
    between two parts is allowed.
    """
    messages = [LONG_USER, LONG_ANSWER]
    try:
        located = _located(template.with_content_as_parts(), messages)
    except Refused:
        return False
    printed = [located.text[payload.start : payload.end] for payload in located.payloads]
    parts = [[{"type": "text", "text": text} for text in (message["content"], "")] for message in messages]
    longer = _render(template, [{**m, "content": part} for m, part in zip(messages, parts, strict=True)])
    return printed == located.marked.texts and longer is not None and longer.split() == located.text.split()


def _located(template: ChatTemplate, messages: Sequence[TemplateMessage]) -> Located:
    """Return the printed texts, rendered with a tool if need be; raises `Refused`."""
    try:
        return locate(template, messages)
    except Refused as refused:
        if refused.reason != "template raises":
            raise
        return locate(template, messages, (TOOL,))


def _render(template: ChatTemplate, messages: Sequence[TemplateMessage]) -> str | None:
    """Return the text, rendered with a tool if need be; None if the template refuses both."""
    for tools in ((), (TOOL,)):
        try:
            return template.render(messages, tools)
        except Refused:
            continue
    return None


def _require_exact(template: ChatTemplate) -> None:
    """Raise ValueError if the template alters or moves a question or an answer.

    Other refusals are no reason for an error: a template may print other conversations. A question
    that is left out is no reason either, since a conversation may have none.
    """
    for name, messages in _PLAIN.items():
        try:
            located = _located(template, messages)
            _require_read(template, messages, located)
            _require_end(messages, located)
        except Refused as refused:
            if refused.reason in _UNFIT:
                cause, _, remedy = str(refused).rpartition("; ")
                raise ValueError(f"the chat template fails on the probe {name!r}: {cause}; {remedy}") from None


def _require_read(template: ChatTemplate, messages: Sequence[TemplateMessage], located: Located) -> None:
    """Raise `Refused` if a text is printed in part, or if the only answer is not printed.

    The markers of a text that is printed in part are missing, as of a text that is left out. But
    its words change what the template prints.
    """
    for index, _, text in located.dropped:
        others = [*messages[:index], _reworded(messages[index]), *messages[index + 1 :]]
        if _render(template, others) != located.text:
            raise Refused(
                "template alters text",
                f"message {index}: {excerpt(text)} is printed in another form; use a template that prints texts unchanged",
            )
        if index == 1 and len(messages) == 2:
            raise Refused(
                "template drops text",
                f"message {index}: {excerpt(text)} is not printed; use a template that prints what an assistant says",
            )


def _require_end(messages: Sequence[TemplateMessage], located: Located) -> None:
    """Raise `Refused` if a question is printed again after its answer.

    The end of an answer could not be told from a text that introduces the question.
    """
    if len(messages) == 2 and located.index.of(1) and located.payloads[-1].message == 0:
        raise Refused(
            "messages out of order",
            "message 0 is printed again after message 1; use a template that prints messages in order",
        )


def _judge(
    template: ChatTemplate,
    turn_format: TurnFormat,
    control: re.Pattern[str],
    messages: Sequence[TemplateMessage],
    tools: Sequence[Any],
) -> str:
    """Return the verdict on a probe, as in `TemplateReport.shapes`."""
    try:
        located = locate(template, messages, tools)
    except Refused as refused:
        return str(refused)
    if located.dropped:
        dropped = dict.fromkeys(f"{messages[message]['role']} {kind}" for message, kind, _ in located.dropped)
        return f"drops {', '.join(dropped)}"
    try:
        for turn in find_turns(template, turn_format, control, messages, tools, located):
            require_once(located, turn.message, turn.span)
    except Refused as refused:
        return f"whole, but {refused}"
    return "whole"


def _prints_tool(template: ChatTemplate, messages: Sequence[TemplateMessage]) -> bool:
    """Return True if a tool definition changes the text; a template may refuse messages without."""
    try:
        printed = template.render(messages, (TOOL,))
    except Refused:
        return False
    try:
        return printed != template.render(messages)
    except Refused:
        return True


def _rewrites(template: ChatTemplate, answer: TemplateMessage) -> bool:
    """Return True if a second turn changes the text up to the end of the first answer."""
    try:
        short, long = (template.render([USER, answer][:2] + more) for more in ([], [USER, answer]))
    except Refused:
        return False
    end = short.rfind(SAID) + len(SAID)
    return not long.startswith(short[:end])
