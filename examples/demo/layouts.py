"""Write conversations as rows of four dataset layouts, in three kinds of files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sftstream.records import Conversation, Message

Row = dict[str, Any]

SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}

TURN = pa.struct({"role": pa.string(), "content": pa.string()})
PAIRS = pa.schema({"prompt": pa.list_(TURN), "completion": pa.list_(TURN)})


def openai(conversation: Conversation) -> Row:
    """Return a row with `messages` of role and content, `tool_calls` as JSON text, `tools`."""
    row: Row = {"messages": [_openai_message(message) for message in conversation.messages]}
    return row | ({"tools": list(conversation.tools)} if conversation.tools else {})


def _openai_message(message: Message) -> Row:
    if not message.tool_calls:
        turn: Row = {"role": message.role, "content": message.content}
        return turn | ({"tool_call_id": message.tool_call_id} if message.tool_call_id else {})
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": json.dumps(call.arguments)}}
        for call in message.tool_calls
    ]
    return {"role": message.role, "content": None, "tool_calls": calls}


def sharegpt(conversation: Conversation) -> Row:
    """Return a row with `conversations` of from and value, calls and results as turns, `tools` as
    JSON."""
    row: Row = {"conversations": [_sharegpt_turn(message) for message in conversation.messages]}
    functions = [tool["function"] for tool in conversation.tools]
    return row | ({"tools": json.dumps(functions)} if functions else {})


def _sharegpt_turn(message: Message) -> Row:
    if message.tool_calls:
        (call,) = message.tool_calls
        return {"from": "function_call", "value": json.dumps({"name": call.name, "arguments": call.arguments})}
    return {"from": SHAREGPT[message.role], "value": message.content}


def alpaca(conversation: Conversation) -> Row:
    """Return a row with `instruction` and `output`, earlier turns as `history`, `system`."""
    system = [message.content for message in conversation.messages if message.role == "system"]
    texts = [message.content for message in conversation.messages[len(system) :]]
    *history, (instruction, output) = zip(texts[::2], texts[1::2], strict=True)
    row: Row = {"instruction": instruction, "input": "", "output": output}
    return row | ({"system": system[0]} if system else {}) | ({"history": history} if history else {})


def pair(conversation: Conversation) -> Row:
    """Return a row with all messages but the last as `prompt`, the last as `completion`."""
    turns = [{"role": message.role, "content": message.content} for message in conversation.messages]
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: Iterable[Row]) -> None:
    """Write a JSON array, one row per line."""
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


def write_parquet(path: Path, rows: Iterable[Row]) -> None:
    """Write prompts and completions."""
    pq.write_table(pa.Table.from_pylist(list(rows), schema=PAIRS), path, compression="zstd")
