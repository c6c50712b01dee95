"""Split a conversation into its shape and its values.

The values are the texts, tool definitions and call arguments of the conversation, in a fixed order.
The shape is everything else that can change the printed text or the trained spans: roles, train
flags, present fields, which texts are blank, and template variables. Conversations of the same
shape share render plans.

    Conversation((Message("user", "hi"), Message("assistant", "seven")))
    shape   (0, "user", None, True, "assistant", None, True)
    values  ["hi", "seven"]

The shape reads: 0 tool definitions; a message of the user, `train` is None, the content is not
blank; a message of the assistant, `train` is None, the content is not blank. For a message with
reasoning, tool calls, a name or a tool call id, a nested tuple follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from sftstream.records import REASONING_KEYS, Conversation, Message
from sftstream.rendering.fast.symbolic import (
    Recorder,
    SymbolicAnswer,
    SymbolicJson,
    SymbolicStr,
    TracedTemplate,
    ValueRef,
)
from sftstream.rendering.json_cache import exact_key
from sftstream.rendering.probe_messages import CALLED, SAID, TOOL, USER
from sftstream.rendering.template import TemplateMessage, template_message

Shape = tuple[Any, ...]


class ReadsInside(NamedTuple):
    """Flags that tell whether a template reads single fields of tool definitions and arguments.

    If the template prints a definition whole, as JSON, the definition is a value. If the template
    reads single fields of the definition, the definition belongs to the shape. The same holds for
    the arguments of a call.
    """

    tools: bool
    """True for `{{ tool.function.name }}`, False for `{{ tool | tojson }}`."""
    arguments: bool
    """True for `{% for key, text in call.function.arguments.items() %}`, False for `tojson`.

    If True, a string directly in the arguments is still a value: "x" of `{"key": "x"}`.
    """


def probe_reads_inside(traced: TracedTemplate) -> ReadsInside:
    """Find out how the template reads tool definitions and call arguments.

    A conversation with a tool call is traced twice: with the definition (or the arguments) as a
    plain dictionary, and as one symbolic object that can only be printed whole. The template reads
    single fields if only the first trace succeeds.
    """
    recorder = Recorder()

    def can_trace(tool: Any, *messages: TemplateMessage) -> bool:
        return traced.trace(recorder, [USER, *messages], [tool]) is not None

    def calling(arguments: Any) -> TemplateMessage:
        (call,) = CALLED["tool_calls"]
        return {**CALLED, "tool_calls": [{**call, "function": {**call["function"], "arguments": arguments}}]}

    fields = {"key": SymbolicStr(recorder, ValueRef(0), SAID)}
    whole = SymbolicJson(recorder, ValueRef(0), {"key": SAID})
    return ReadsInside(
        tools=can_trace(TOOL) and not can_trace(SymbolicJson(recorder, ValueRef(0), TOOL)),
        arguments=can_trace(TOOL, calling(fields)) and not can_trace(TOOL, calling(whole)),
    )


def split_conversation(conversation: Conversation, reads_inside: ReadsInside) -> tuple[Shape, list[Any]]:
    """Return the shape and the values of a conversation.

    Raises ValueError if tools, arguments or variables that belong to the shape contain a type
    unknown to JSON, for example a date.
    """
    tools = conversation.tools
    shape: list[Any] = [sha256(exact_key(tools)).digest() if tools and reads_inside.tools else len(tools)]
    values: list[Any] = [] if reads_inside.tools else list(tools)
    for message in conversation.messages:
        content = message.content or ""
        values.append(content)
        shape += (message.role, message.train, bool(content) and not content.isspace())
        if message.reasoning or message.tool_calls or message.name is not None or message.tool_call_id is not None:
            shape.append(_optional_fields(message, values, reads_inside))
    if conversation.variables:
        shape.append(sha256(exact_key(conversation.variables)).digest())
    return tuple(shape), values


def _optional_fields(message: Message, values: list[Any], reads_inside: ReadsInside) -> Shape:
    """Return the shape of a message's rarer fields, and append the fields' values to `values`.

    For each text the shape tells whether the text is blank: blank texts get no markers, and a
    template may leave a blank text out.
    """
    optional = (message.reasoning or "", message.name or "", message.tool_call_id or "")
    values += optional
    shape: list[Any] = [not text.isspace() if text else None for text in optional]
    shape += (message.name is None, message.tool_call_id is None)
    for call in message.tool_calls:
        shape += (bool(call.id), _has_text(call.name))
        values += (call.id or "", call.name)
        if reads_inside.arguments:
            values += [argument for argument in call.arguments.values() if isinstance(argument, str)]
            kinds = {k: _has_text(v) if isinstance(v, str) else [v] for k, v in call.arguments.items()}
            shape.append(exact_key(kinds))
        else:
            values.append(call.arguments)
            shape.append(_has_text(call.arguments))
    return tuple(shape)


def _has_text(value: Any) -> bool:
    """Return True if a string in the value, at any depth, is not blank."""
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    if isinstance(value, (dict, Mapping)):  # `dict` first: isinstance is slow for an abstract class
        return any(map(_has_text, value.values()))
    return isinstance(value, (list, Sequence)) and any(map(_has_text, value))


def symbolic_conversation(
    recorder: Recorder, conversation: Conversation, values: Sequence[Any], reads_inside: ReadsInside
) -> tuple[list[TemplateMessage], list[Any]]:
    """Return the template's messages and tools with a symbolic object in place of each value.

    `values` are the values of the conversation as returned by `split_conversation`. A text becomes
    `SymbolicStr(recorder, ValueRef(0), "hi")`, a definition or arguments a `SymbolicJson`.
    """
    numbers = iter(range(len(values)))

    def symbolic(kind: type[SymbolicStr] | type[SymbolicJson]) -> Any:
        number = next(numbers)
        return kind(recorder, ValueRef(number), values[number])

    tools = list(conversation.tools) if reads_inside.tools else [symbolic(SymbolicJson) for _ in conversation.tools]
    messages = []
    for message in conversation.messages:
        result = template_message(message)
        said = SymbolicAnswer if message.role == "assistant" else SymbolicStr
        result["content"] = symbolic(said)
        if message.reasoning or message.tool_calls or message.name is not None or message.tool_call_id is not None:
            reasoning, name, call_id = symbolic(said), symbolic(SymbolicStr), symbolic(SymbolicStr)
            result |= {key: reasoning for key in result if key in REASONING_KEYS}
            result |= {key: value for key, value in (("name", name), ("tool_call_id", call_id)) if key in result}
            for printed_call, call in zip(result.get("tool_calls", ()), message.tool_calls, strict=True):
                given_id, function_name = symbolic(SymbolicStr), symbolic(SymbolicStr)
                printed_call["id"] = given_id if call.id else printed_call["id"]
                arguments: Any = (
                    {k: symbolic(SymbolicStr) if isinstance(v, str) else v for k, v in call.arguments.items()}
                    if reads_inside.arguments
                    else symbolic(SymbolicJson)
                )
                printed_call["function"] = {"name": function_name, "arguments": arguments}
        messages.append(result)
    return messages, tools
