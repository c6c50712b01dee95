"""What a chat template does to conversations, found by probing it on a dozen shapes: milliseconds, once, at the start."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from sftstream.records import REASONING_KEYS, Refused
from sftstream.rendering.markers import locate
from sftstream.rendering.template import ChatTemplate, TemplateMessage, bounded_memory
from sftstream.rendering.turns import ANSWER, CALLED, RESULT, TOOL, USER, TurnFormat, probe_turn_format

SYSTEM: TemplateMessage = {"role": "system", "content": "Zq told Zq"}
THOUGHT: TemplateMessage = {"role": "assistant", "content": "Zq said Zq"} | dict.fromkeys(
    REASONING_KEYS, "Zq thought Zq"
)
INLINE: TemplateMessage = {"role": "assistant", "content": "<think>\nZq thought Zq\n</think>\n\nZq said Zq"}
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
"""What a template is probed on, by name."""


class TemplateReport(msgspec.Struct, frozen=True, kw_only=True):
    """How turns look in a template, and what it does to each of `SHAPES`: "whole", "drops ...", or why it refuses."""

    turn_format: TurnFormat
    shapes: dict[str, str]
    rewrites_history: bool
    """A turn is printed otherwise once the conversation has gone on."""
    prints_reasoning: bool
    """It knows messages' `reasoning_content`."""
    prints_thoughts: bool
    """It leaves `<think>...</think>` in the last answer's text."""
    date: str | None
    """What it prints as today, where it prints that."""
    has_generation_tags: bool


def probe(template: ChatTemplate, control: re.Pattern[str]) -> TemplateReport:
    """Raises ValueError where no conversation could be trained on."""
    with bounded_memory():
        turn_format = probe_turn_format(template, control)
        shapes = {name: _judge(template, *shape) for name, shape in SHAPES.items()}
        rewrites_history = any(_rewrites(template, answer) for answer in (ANSWER, THOUGHT, INLINE))
    return TemplateReport(
        turn_format=turn_format,
        shapes=shapes,
        rewrites_history=rewrites_history,
        prints_reasoning=shapes["reasoning"] == "whole",
        prints_thoughts=shapes["thoughts in the text"] == "whole",
        date=template.date.isoformat() if template.date else None,
        has_generation_tags=template.has_generation_tags,
    )


def _judge(template: ChatTemplate, messages: Sequence[TemplateMessage], tools: Sequence[Any]) -> str:
    try:
        located = locate(template, messages, tools)
    except Refused as refused:
        return str(refused)
    dropped = dict.fromkeys(f"{messages[message]['role']} {kind}" for message, kind, _ in located.dropped)
    return f"drops {', '.join(dropped)}" if dropped else "whole"


def _rewrites(template: ChatTemplate, answer: TemplateMessage) -> bool:
    """Whether a conversation's beginning, up to the end of the answer's words, changes when it goes on."""
    try:
        short, long = (template.render([USER, answer][:2] + more) for more in ([], [USER, answer]))
    except Refused:
        return False
    end = short.rfind("Zq said Zq") + len("Zq said Zq")
    return not long.startswith(short[:end])
