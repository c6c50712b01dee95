"""Read items of OpenAI's Responses API among the turns of a conversation.

An item is a turn with a `type` instead of a `role`. The items of one answer become one message:

    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "add them"}]}
    {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{\\"a\\": 1}"}

    Message("assistant", None, "add them", (ToolCall("add", {"a": 1}, "c1"),))

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from sftstream.formats.fields import optional_text, require_text
from sftstream.formats.parts import parse_parts
from sftstream.formats.tools import parse_calls
from sftstream.records import Message, Refused, ToolCalls

ITEMS = frozenset({"message", "function_call", "function_call_output", "reasoning"})
"""Types of items. An item of the type "message" has a role and a content like any other turn."""


def parse_item(item: Mapping[str, Any], path: str) -> Iterator[Message]:
    """Yield the message of an item that is a call, a result or reasoning.

    An item of empty reasoning yields no message.
    """
    if item["type"] == "function_call":
        yield Message("assistant", None, tool_calls=parse_calls(item, path))
    elif item["type"] == "function_call_output":
        output = item.get("output")
        text = output if isinstance(output, str) else parse_parts(output, f"{path}.output")[0]
        yield Message("tool", require_text(text, f"{path}.output"), tool_call_id=optional_text(item, path, "call_id"))
    else:
        _, reasoning, _ = parse_parts(item.get("content") or item.get("summary"), path)
        if reasoning:
            yield Message("assistant", None, reasoning)


def join_items(messages: Iterable[Message]) -> list[Message]:
    """Return the messages after joining the items of each answer: reasoning, then text, then calls.

    Raises Refused if an item of reasoning is followed by neither a text nor a call.
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
    if not first.role == second.role == "assistant" or first.train != second.train:
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
    )
