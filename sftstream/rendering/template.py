"""Render messages with the model's chat template, compiled once, with a fixed date and bounded
work."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date as Date
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import meta, nodes

from sftstream.records import REASONING_KEYS, Message, Refused, Span
from sftstream.rendering.environment import compiled, rendered_with_tags
from sftstream.rendering.limits import Bounded

TemplateMessage = dict[str, Any]

LONGEST = 1 << 20
"""Largest number of characters of a template; published templates have up to 40,000."""

SET_BY_RENDERER = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "strftime_now", "date_string"}
    | {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
)
"""Names of template variables that only the renderer may set.

`ChatTemplate.set_by_renderer` also has the names of the tokenizer's further special tokens.
"""

_ADDRESS = re.compile(r"<?[^<>]{1,80} at (0x[0-9a-f]{6,16})>?")


class ChatTemplate:
    """A chat template, with the variables that every render gets.

    `variables` come from the tokenizer: `{"bos_token": "<s>"}`. A template that prints today's date
    (with `strftime_now` or `date_string`) prints `date` instead; the default is the day on which
    the object is made. Raises ValueError if `text` is too long. The text is compiled at first use;
    a text that is not valid Jinja then raises ValueError.
    """

    def __init__(self, text: str, variables: Mapping[str, str], date: Date | None = None) -> None:
        self.text = text
        asks_for_date = "strftime_now" in text or "date_string" in text
        self.date = (date or Date.today()) if asks_for_date else None
        self._variables: dict[str, Any] = dict(variables)
        self.set_by_renderer = SET_BY_RENDERER | variables.keys()
        """Names of variables that `with_variables` refuses."""
        if len(text) > LONGEST:
            raise ValueError(f"the chat template has more than {LONGEST:,} characters; use another template")
        self.variables: Mapping[str, Any] = {}
        """Variables from the config or a row, which every render gets too."""
        self.content_as_parts = False
        """True if a render passes the content "hi" as `[{"type": "text", "text": "hi"}]`."""
        self.has_generation_tags = bool(re.search(r"{%-?\s*generation\s*-?%}", text))

    @cached_property
    def compiled(self) -> jinja2.Template:
        """The compiled text; raises ValueError if the text is not valid Jinja."""
        return compiled(self.text)

    def on(self, date: Date) -> ChatTemplate:
        """Return a copy of the template that prints `date`, if it prints a date at all."""
        result = copy.copy(self)
        result.date = self.date and date
        return result

    def with_content_as_parts(self) -> ChatTemplate:
        """Return a copy of the template whose renders pass each content as a list.

        The content "hi" is passed as `[{"type": "text", "text": "hi"}]`.
        """
        result = copy.copy(self)
        result.content_as_parts = True
        return result

    def with_variables(self, variables: Mapping[str, Any]) -> ChatTemplate:
        """Return a copy of the template with further variables: `{"enable_thinking": False}`.

        Raises ValueError if only the renderer may set a variable, or if a value has no JSON form.
        """
        if not variables:
            return self
        for name, value in variables.items():
            if name in self.set_by_renderer:
                remedy = "set data.tokenizer.date" if name in ("date_string", "strftime_now") else "remove the variable"
                raise ValueError(f"the variable {name!r} is set by every render of a chat template; {remedy}")
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                raise ValueError(
                    f"the variable {name!r} = {value!r} is not a text, number, boolean, list or table; write it as a text"
                ) from None
        result = copy.copy(self)
        result.variables = {**self.variables, **variables}
        return result

    @property
    def unset_variables(self) -> tuple[str, ...]:
        """Names of the variables that the template reads, and that nothing sets, in sorted order.

        A variable that the template itself assigns is listed only if the template reads it before:
        `{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}`.
        """
        tree = self.environment.parse(self.text)
        first_use: dict[str, str] = {}
        for name in _names(tree):
            first_use.setdefault(name.name, name.ctx)
        read = {name for name in meta.find_undeclared_variables(tree) if first_use[name] == "load"}
        return tuple(sorted(read - self.set_by_renderer - self.variables.keys()))

    def render(self, messages: Sequence[TemplateMessage], tools: Sequence[Any] = (), *, prompt: bool = False) -> str:
        """Return the rendered text; with `prompt`, the text ends with the generation prompt.

        Raises `Refused` if the template raises an error or does too much work, and RuntimeError if
        the render exceeds the time limit.
        """
        with Bounded():
            text: str = self.compiled.render(**self.context(messages, tools, prompt))
        self._refuse_addresses(text, messages, tools)
        return text

    def render_with_tags(
        self, messages: Sequence[TemplateMessage], tools: Sequence[Any] = ()
    ) -> tuple[str, Sequence[Span]]:
        """Return the text as `render` does, and the spans printed inside `{% generation %}` blocks.

        Raises as `render` does.
        """
        if not self.has_generation_tags:
            return self.render(messages, tools), ()
        with Bounded():
            text, spans = rendered_with_tags(self.compiled, self.context(messages, tools, False))
        self._refuse_addresses(text, messages, tools)
        return text, [Span(start, end) for start, end in spans]

    def _refuse_addresses(self, text: str, messages: Sequence[TemplateMessage], tools: Sequence[Any]) -> None:
        """Raise `Refused` if the text holds the address of an object in memory.

        `<function f at 0x7f3a...>` differs in each process, so a resumed run would train another
        text. An address that the conversation or the template itself holds is text like any other.
        """
        if " at 0x" not in text:
            return
        given = None
        for address in _ADDRESS.finditer(text):
            given = given or repr((messages, tools, self.variables, self.text))
            if address[1] not in given:
                raise Refused(
                    "template prints an address",
                    f"{address[0].strip()!r} differs in each process; use another template",
                )

    @property
    def environment(self) -> jinja2.Environment:
        """The sandboxed Jinja environment of the template."""
        return self.compiled.environment

    def context(self, messages: Sequence[TemplateMessage], tools: Sequence[Any], prompt: bool) -> dict[str, Any]:
        """Return all variables that the template gets for a render."""
        if self.content_as_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        return {
            "messages": list(messages),
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": prompt,
            **self._variables,
            **date_variables(self.date),
            **self.variables,
        }


def _names(node: nodes.Node) -> Iterator[nodes.Name]:
    """Yield the names in a part of a template in the order of their use.

    The names of a value come before the name that the value is assigned to.
    """
    if isinstance(node, nodes.Name):
        yield node
    children = list(node.iter_child_nodes())
    if isinstance(node, nodes.Assign | nodes.AssignBlock):
        children = [*(child for child in children if child is not node.target), node.target]
    elif isinstance(node, nodes.For):
        children = [node.iter, *(child for child in children if child is not node.iter)]
    for child in children:
        yield from _names(child)


def date_variables(date: Date | None) -> dict[str, Any]:
    """Return the variables with which a template prints a date."""
    return {} if date is None else {"strftime_now": date.strftime, "date_string": date.strftime("%d %b %Y")}


def template_message(message: Message) -> TemplateMessage:
    """Return the message as the dictionary that chat templates expect.

    `content` is always a string: many templates print None as 'None'.
    """
    result: TemplateMessage = {"role": message.role, "content": message.content or ""}
    if message.reasoning:
        result |= dict.fromkeys(REASONING_KEYS, message.reasoning)
    if message.tool_calls:
        # Mistral requires an id of nine letters and digits. A call without an id gets a new id.
        result["tool_calls"] = [
            {
                "type": "function",
                "id": call.id or f"call{i:05d}",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for i, call in enumerate(message.tool_calls)
        ]
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    return result
