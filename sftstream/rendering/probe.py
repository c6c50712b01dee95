"""Probe a chat template at the start of a run: render 15 short conversations and judge each one.

Each probe has a shape of its own: a question and an answer, a tool call, reasoning, and so on. The
report tells for each shape whether the template prints all payloads, and which kinds of payloads
the template leaves out. All probes of a template together take 10 to 200 ms.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from sftstream.records import Refused
from sftstream.rendering.limits import bounded_memory
from sftstream.rendering.locate import locate
from sftstream.rendering.probe_messages import ANSWER, CALLED, RESULT, SAID, SYSTEM, THOUGHT, TOOL, USER
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
    prints_reasoning: bool
    """True if the template prints the `reasoning_content` of the last message."""
    prints_thoughts: bool
    """True if the template prints `<think>...</think>` in the content of the last message."""
    date: str | None
    """The date that the template gets as today's, YYYY-MM-DD; None if it asks for no date."""
    has_generation_tags: bool
    """True if the template contains `{% generation %}` blocks."""


def probe(template: ChatTemplate, control: re.Pattern[str]) -> TemplateReport:
    """Return the report on a template.

    `control` matches the text of any special token. Raises ValueError if the template is unfit for
    training: it prints no stop, cannot print a user's message, or does too much work.
    """
    with bounded_memory():
        turn_format = probe_turn_format(template, control)
        shapes = {name: _judge(template, turn_format, control, *shape) for name, shape in SHAPES.items()}
        rewrites_history = any(_rewrites(template, answer) for answer in (ANSWER, THOUGHT, INLINE))
    return TemplateReport(
        turn_format=turn_format,
        shapes=shapes,
        rewrites_history=rewrites_history,
        prints_reasoning=shapes["reasoning"].startswith("whole"),
        prints_thoughts=shapes["thoughts in the text"].startswith("whole"),
        date=template.date.isoformat() if template.date else None,
        has_generation_tags=template.has_generation_tags,
    )


def prints_last_reasoning(
    template: ChatTemplate, turn_format: TurnFormat, control: re.Pattern[str]
) -> tuple[bool, bool]:
    """Return whether the template prints the reasoning of the last message.

    The first answer is for `reasoning_content`, the second for `<think>...</think>` in the content.
    """
    field, inline = (
        _judge(template, turn_format, control, *SHAPES[name]) for name in ("reasoning", "thoughts in the text")
    )
    return field.startswith("whole"), inline.startswith("whole")


def reading_content(template: ChatTemplate) -> ChatTemplate:
    """Return the template if it prints contents given as texts, else a copy that gets lists.

    Some templates read a content only as `[{"type": "text", "text": "hi"}]`, not as "hi". If a
    template prints neither form, it is returned unchanged.
    """
    with bounded_memory():
        for candidate in (template, template.with_content_as_parts()):
            for tools in ((), (TOOL,)):
                try:
                    text = candidate.render([USER, ANSWER], tools)
                except Refused as refused:
                    if refused.reason == "template does too much":
                        return template
                    continue
                if SAID in text and USER["content"] in text:
                    return candidate
    return template


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
        find_turns(template, turn_format, control, messages, tools, located)
    except Refused as refused:
        return f"whole, but {refused}"
    return "whole"


def _rewrites(template: ChatTemplate, answer: TemplateMessage) -> bool:
    """Return True if a second turn changes the text up to the end of the first answer."""
    try:
        short, long = (template.render([USER, answer][:2] + more) for more in ([], [USER, answer]))
    except Refused:
        return False
    end = short.rfind(SAID) + len(SAID)
    return not long.startswith(short[:end])
