"""Read items of OpenAI's Responses API among the turns of a conversation.

An item is a turn with a `type` instead of a `role`. The items of one answer become one message:

    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "add them"}]}
    {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{\\"a\\": 1}"}

    Message("assistant", None, "add them", (ToolCall("add", {"a": 1}, "c1"),))

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from sftstream.formats.exclusions import MARKS, parse_train
from sftstream.formats.fields import optional_id, require_text
from sftstream.formats.keys import ARGUMENTS, only_value, require_read
from sftstream.formats.parts import parse_parts
from sftstream.formats.tools import parse_calls
from sftstream.records import Message, Refused, ToolCalls

_WORDS = {"function_call": ARGUMENTS, "function_call_output": ("output",), "reasoning": ("content", "summary")}
"""Type of an item -> keys of its words."""
ITEMS = frozenset({"message", *_WORDS})
"""Types of items. An item of the type "message" has a role and a content like any other turn."""
ITEM_KEYS = frozenset(
    {"type", "id", "status", "role", "content", "summary", "call_id", "name", "output", *ARGUMENTS, *MARKS}
)
"""Keys of items that are read, or that tell nothing about the words."""


def parse_item(item: Mapping[str, Any], path: str, ignored: Collection[str]) -> Iterator[Message]:
    """Yield the message of an item that is a call, a result or reasoning.

    An item of empty reasoning yields no message. Keys of parts are `ignored`, those of the item are
    not. Raises Refused if words of the item would be lost.
    """
    kind = item["type"]
    require_read(item, _WORDS[kind], path)
    train = parse_train(item, path)
    if kind == "function_call":
        call = {key: value for key, value in item.items() if key not in MARKS}
        yield Message("assistant", None, tool_calls=parse_calls(call, path, ignored), train=train)
    elif kind == "function_call_output":
        output = "" if "output" in item and item["output"] is None else item.get("output")  # a tool may return nothing
        text = output if isinstance(output, str) else parse_parts(output, f"{path}.output", ignored)[0]
        call_id = optional_id(item, path, "call_id")
        yield Message("tool", require_text(text, f"{path}.output"), tool_call_id=call_id, train=train)
    else:
        _, reasoning, _ = parse_parts(only_value(item, _WORDS[kind], path), path, ignored)
        if reasoning:
            yield Message("assistant", None, reasoning, train=train)


def join_items(messages: Iterable[Message]) -> list[Message]:
    """Return the messages after joining the items of each answer: reasoning, then text, then calls.

    Raises Refused if an item of reasoning is followed by neither a text nor a call, or if its mark
    contradicts that of the text or call.
    """
    result: list[Message] = []
    for message in messages:
        if result and (joined := _joined(result[-1], message)):
            result[-1] = joined
        else:
            result.append(message)
    if any(message.content is None and not message.tool_calls for message in result):
        raise Refused("message without content", "an item of reasoning is followed by neither a text nor a call")
    return result


def _joined(first: Message, second: Message) -> Message | None:
    """Return one message of two neighbouring items; None if the items are not of one answer."""
    if not first.role == second.role == "assistant":
        return None
    train = first.train
    if first.content is None and not first.tool_calls:  # reasoning, a part of the next item's message
        train = second.train if train is None else train
        if second.train not in (None, train):
            raise Refused(
                "bad weight", "an item of reasoning and the item after it have different marks; mark both alike"
            )
    elif train != second.train:
        return None
    if second.content is not None and (first.content is not None or first.tool_calls):
        return None
    if second.reasoning and (first.reasoning or first.content is not None or first.tool_calls):
        return None
    return msgspec.structs.replace(
        first,
        content=first.content if first.content is not None else second.content,
        reasoning=first.reasoning or second.reasoning,
        tool_calls=ToolCalls((*first.tool_calls, *second.tool_calls)),
        train=train,
    )
