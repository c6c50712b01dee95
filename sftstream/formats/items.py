"""Read items of OpenAI's Responses API among the turns of a conversation.

An item is a turn with a `type` instead of a `role`. The items of one answer become one message:

    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "add them"}]}
    {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{\\"a\\": 1}"}

    Message("assistant", None, "add them", (ToolCall("add", {"a": 1}, "c1"),))

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from sftstream.excerpt import excerpt
from sftstream.formats.exclusions import MARKS, parse_train
from sftstream.formats.fields import optional_id, require_text
from sftstream.formats.keys import ARGUMENTS, only_value, require_read
from sftstream.formats.parts import parse_parts
from sftstream.formats.thoughts import without_thought
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
        text, reasoning, calls = parse_parts(output, f"{path}.output", ignored)
        if reasoning or calls:
            raise Refused("unknown content part", f"{path}.output is {excerpt(output)}; only text can be read")
        call_id = optional_id(item, path, "call_id")
        yield Message("tool", require_text(text, f"{path}.output"), tool_call_id=call_id, train=train)
    else:
        text, reasoning, calls = parse_parts(only_value(item, _WORDS[kind], path), path, ignored)
        if calls:
            raise Refused(
                "unknown content part", f"{path} is reasoning with a call; write the call as an item after it"
            )
        if thought := (reasoning or "") + (text or ""):  # a text in an item of reasoning is reasoning
            yield Message("assistant", None, thought, train=train)


def join_parts(messages: Sequence[Message], parts: Collection[int]) -> list[Message]:
    """Return the messages after joining the parts of each turn: reasoning, then text, then calls.

    `parts` are the indices of items, calls and the like. Such a message belongs to the assistant's
    message before it, and any message to the reasoning before it. Raises Refused if reasoning is
    followed by neither a text nor a call, or if the parts of a turn have different marks.
    """
    result: list[Message] = []
    for index, message in enumerate(messages):
        joins = result and (index in parts or _is_reasoning(result[-1]))
        if joins and (joined := _joined(result[-1], message)):
            result[-1] = joined
        else:
            result.append(message)
    if any(map(_is_reasoning, result)):
        raise Refused("message without content", "reasoning is followed by neither a text nor a call")
    return result


def _joined(first: Message, second: Message) -> Message | None:
    """Return one message of two neighbouring parts; None if the parts are not of a single turn.

    Two different thoughts are joined by an empty line. A thought without a mark has the mark of the
    part after it. Raises Refused if the marks differ otherwise: a mark of the thought alone would
    train or exclude the answer without a word.
    """
    if not first.role == second.role == "assistant":
        return None
    thought = _is_reasoning(first)
    if not thought and (second.content is not None or second.reasoning):
        return None
    train = second.train if thought and first.train is None else first.train
    if second.train != train:
        raise Refused(
            "bad weight",
            f"two parts of one turn, such as its text and its call, have the marks {first.train} and {second.train}, where "
            "None is no mark; mark both alike",
        )
    content = second.content if thought else first.content
    reasoning = "\n\n".join(dict.fromkeys(filter(None, (first.reasoning, second.reasoning)))) or None
    if content and thought and reasoning:
        content = without_thought(content, reasoning, "an answer", None)
    return msgspec.structs.replace(
        first,
        content=content,
        reasoning=reasoning,
        tool_calls=ToolCalls((*first.tool_calls, *second.tool_calls)),
        train=train,
    )


def _is_reasoning(message: Message) -> bool:
    """Return True for a part without text and calls, which belongs to the next part."""
    return message.content is None and not message.tool_calls
