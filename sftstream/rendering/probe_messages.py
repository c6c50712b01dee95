"""Messages of the probes. Each text of a message begins and ends with "Zq", a word of no known
template."""

from __future__ import annotations

from typing import Any

from sftstream.records import REASONING_KEYS
from sftstream.rendering.template import TemplateMessage

SAID = "Zq said Zq"
"""The assistant's text in all probes."""
USER: TemplateMessage = {"role": "user", "content": "Zq asked Zq"}
_LONG = "Zq %s \"Jackdaws\" LOVE my\nbig sphinx \\ of 'quartz' é" + ", and so on" * 40 + " Zq"
LONG_USER: TemplateMessage = {"role": "user", "content": _LONG % "asked"}
LONG_ANSWER: TemplateMessage = {"role": "assistant", "content": _LONG % "said"}
"""A question and an answer with all letters, and with characters that JSON and Python escape.

They are longer than most templates that shorten texts allow. They hold no markup, which a template
may replace in a few conversations.
"""
ANSWER: TemplateMessage = {"role": "assistant", "content": SAID}
CALLED: TemplateMessage = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "abcdefghi", "function": {"name": "look_up", "arguments": {"key": SAID}}}
    ],
}
THOUGHT: TemplateMessage = {"role": "assistant", "content": SAID} | dict.fromkeys(REASONING_KEYS, "Zq thought Zq")
SYSTEM: TemplateMessage = {"role": "system", "content": "Zq told Zq"}
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
