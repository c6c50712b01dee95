"""A stored row of any known dataset layout -> Conversation.

The layout is recognised for each row, since rows of one file may differ. All of these rows become
Conversation((Message("user", "hi"), Message("assistant", "hello"))):

    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    {"instruction": "hi", "output": "hello"}
    {"prompt": "hi", "completion": "hello"}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import msgspec

from sftstream.excerpt import excerpt
from sftstream.records import (
    REASONING_KEYS,
    UNDECODABLE,
    BrokenRow,
    Conversation,
    Message,
    RawRow,
    Refused,
    Role,
    ToolCall,
    ToolCalls,
)

Row = Mapping[str, Any]
"""A decoded row: column -> value."""

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Name of a role in datasets -> role in chat templates."""

_SCALARS = frozenset({str, int, float, bool, type(None)})

NESTING = 64
"""Largest depth of nested lists and objects in a row.

A fixed limit: Python's own recursion limit would depend on the depth of the caller.
"""


def parse_row(row: RawRow, columns: Mapping[str, str] | None = None) -> Conversation:
    """Return the conversation that a stored row holds.

    `columns` renames a source's own columns: {"instruction": "q"} reads column `q` as
    `instruction`. Raises BrokenRow if the row is not JSON or has none of the columns, and Refused,
    naming the field, if the layout is not understood.
    """
    if columns is None and isinstance(row, bytes) and (conversation := _typed_json(row)):
        return conversation
    decoded = decode_row(row)
    if not isinstance(decoded, Mapping):
        raise Refused("unknown layout", f"the row is a {type(decoded).__name__}, not an object with columns")
    fields = decoded if columns is None else _renamed(decoded, columns)
    messages = _typed(fields) or _any(fields)
    if not messages:
        raise Refused("empty conversation", "it has no messages")
    if not any(message.role == "assistant" for message in messages):
        raise Refused("no assistant message", f"its roles are {[message.role for message in messages]}")
    return Conversation(messages, _tools(fields.get("tools")))


def decode_row(row: RawRow) -> Any:
    """Return the value of a row's JSON text, or a table's row unchanged.

    Raises BrokenRow if the text is not JSON.
    """
    if not isinstance(row, bytes):
        return row
    try:
        return msgspec.json.decode(row)
    except UNDECODABLE as error:
        raise BrokenRow(f"is not JSON: {error}") from None


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the columns that `columns` names, under the names that a layout knows."""
    result = {name: row[column] for name, column in columns.items() if column in row}
    if not result:
        raise BrokenRow(f"has none of the columns {sorted(columns.values())}; it has {sorted(map(str, row))}")
    return result


def _typed_json(text: bytes) -> Conversation | None:
    """Return the conversation of JSON text that is a `_TypedJson`; None of any other text."""
    if not text.startswith(_BEGINNING):
        return None
    try:
        typed = _TYPED.decode(text)
        tools = _known_tools(bytes(typed.tools)) if typed.tools else ()
    except (*UNDECODABLE, Refused):
        return None
    return Conversation(typed.messages, tools) if _answered(typed.messages) else None


class _Typed(msgspec.Struct, gc=False):
    """A row in the field names of `Message`; msgspec takes a tenth of the time of `_any`."""

    messages: tuple[Message, ...]
    system: None = None
    system_prompt: None = None


class _TypedJson(_Typed, forbid_unknown_fields=True, gc=False):
    """A `_Typed` row without further columns, since msgspec would not check their nesting."""

    tools: msgspec.Raw = msgspec.Raw()


def _tool_calls(_type: type, value: Any) -> ToolCalls:
    _refuse_deep([[[value]]])  # wrapped as deep as in the row
    return _calls(value, "tool_calls")


_TYPED = msgspec.json.Decoder(_TypedJson, dec_hook=_tool_calls)
_BEGINNING = b'{"messages"'
"""First bytes of most JSON rows that `_TYPED` decodes; other rows skip the attempt."""


def _typed(row: Row) -> tuple[Message, ...] | None:
    """Return the messages of a `_Typed` row; None of any other row."""
    try:
        messages = msgspec.convert(row, _Typed, dec_hook=_tool_calls).messages
    except msgspec.ValidationError:
        return None
    if not _answered(messages):
        return None
    if len(row) > 1:
        _refuse_deep([value for column, value in row.items() if column != "messages"])
    return messages


def _answered(messages: Sequence[Message]) -> bool:
    """Return True if each message has content or tool calls and the assistant has a message."""
    answered = False
    for message in messages:
        if message.content is None and not message.tool_calls:
            return False
        answered = answered or message.role == "assistant"
    return answered


@lru_cache(maxsize=128)
def _known_tools(text: bytes) -> tuple[dict[str, Any], ...]:
    """Return the tools of JSON text; cached, since many conversations share tools."""
    tools = msgspec.json.decode(text)
    _refuse_deep([tools])
    return _tools(tools)


def _any(row: Row) -> tuple[Message, ...]:
    _refuse_deep(row)
    layout = _layout(tuple(key for key, value in row.items() if value is not None))
    if layout is None:
        known = " | ".join("+".join(keys) for keys, _ in LAYOUTS)
        raise Refused("unknown layout", f"columns {sorted(map(str, row))} match none of {known}")
    return tuple(layout(row))


@lru_cache(maxsize=4096)
def _layout(columns: tuple[Any, ...]) -> Callable[[Row], Iterable[Message]] | None:
    return next((layout for keys, layout in LAYOUTS if all(key in columns for key in keys)), None)


def _present(row: Row, key: str) -> bool:
    return row.get(key) is not None


def _openai(row: Row) -> Iterable[Message]:
    """Read `messages`: role/content as in the OpenAI API, or from/value."""
    return _turns(row, "messages")


def _sharegpt(row: Row) -> Iterable[Message]:
    """Read `conversations`: from/value, or role/content; the system prompt may have a column."""
    return _turns(row, "conversations")


def _rounds(row: Row) -> Iterable[Message]:
    """Read `conversation`: pairs of input and output with optional system prompts, or messages."""
    rounds = _decoded(row["conversation"])
    if not _is_list(rounds) or not all(isinstance(pair, Mapping) and "input" in pair for pair in rounds):
        yield from _turns(row, "conversation")
        return
    yield from _system(row)
    for index, pair in enumerate(rounds):
        yield from _system(pair)
        yield Message("user", _text(pair["input"], f"conversation[{index}].input"))
        yield Message("assistant", _text(pair.get("output"), f"conversation[{index}].output"))


def _by_turns(row: Row) -> Iterable[Message]:
    """Read `data`: texts of the user and the assistant in turn, as first published by UltraChat."""
    texts = _decoded(row["data"])
    if not _is_list(texts):
        raise Refused("bad messages", f"data is a {type(texts).__name__}, not a list of texts")
    yield from _system(row)
    for index, text in enumerate(texts):
        yield Message(("user", "assistant")[index % 2], _text(text, f"data[{index}]"))


def _alpaca(row: Row) -> Iterable[Message]:
    """Read `instruction` with `output` or `response`, and optional `input`, `system`, `history`.

    `history` holds [question, answer] pairs from before the instruction.
    """
    yield from _system(row)
    history = row.get("history") or []
    for pair in history if _is_list(history) else [history]:
        if not _is_list(pair) or len(pair) != 2:
            raise Refused("bad history", f"{excerpt(pair)} is not a pair of question and answer")
        yield Message("user", _text(pair[0], "history"))
        yield Message("assistant", _text(pair[1], "history"))
    question = _text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n\n" + _text(row["input"], "input")
    yield Message("user", question)
    answer = "output" if _present(row, "output") else "response"
    yield Message("assistant", _text(row[answer], answer))


def _pair(question: str, answer: str) -> Callable[[Row], Iterable[Message]]:
    """Return a layout of two columns, each of text or of messages."""

    columns: tuple[tuple[str, Role], ...] = ((question, "user"), (answer, "assistant"))

    def layout(row: Row) -> Iterable[Message]:
        yield from _system(row)
        for column, role in columns:
            if isinstance(row[column], str):
                yield Message(role, row[column])
            else:
                yield from _turns({column: row[column]}, column)

    return layout


LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[Row], Iterable[Message]]], ...] = (
    (("messages",), _openai),
    (("conversations",), _sharegpt),
    (("conversation",), _rounds),
    (("instruction", "output"), _alpaca),
    (("instruction", "response"), _alpaca),
    (("prompt", "completion"), _pair("prompt", "completion")),
    (("prompt", "response"), _pair("prompt", "response")),
    (("question", "answer"), _pair("question", "answer")),
    (("data",), _by_turns),
)
"""Required columns -> reader of the row; the first match counts."""


def _turns(row: Row, column: str) -> Iterable[Message]:
    turns = _decoded(row[column])
    if not _is_list(turns):
        raise Refused("bad messages", f"{column} is a {type(turns).__name__}, not a list of messages")
    yield from _system(row)
    for index, turn in enumerate(turns):
        yield _plain(turn) or _message(turn, f"{column}[{index}]")


def _plain(turn: Any) -> Message | None:
    """Return the message of a turn with just a role and a text; None of any other turn.

    Most turns are plain; `_message` would give the same message in ten times the time.
    """
    if type(turn) is not dict or len(turn) != 2:
        return None
    role, content = turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")
    if type(role) is str and type(content) is str and role in ROLES and role != "function_call":
        return Message(ROLES[role], content)
    return None


def _message(turn: Any, path: str) -> Message:
    if not isinstance(turn, Mapping):
        raise Refused("bad messages", f"{path} is a {type(turn).__name__}, not an object")
    named = _first(turn, "role", "from")
    role = ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise Refused("unknown role", f"{path} has role {named!r}; known are {', '.join(ROLES)}")
    content = _first(turn, "content", "value")
    if named == "function_call":
        text, reasoning, calls = None, None, _calls(content, path)
    else:
        text, reasoning, calls = _parts(content, role, path)
    fields = [_calls(turn.get(field), f"{path}.{field}") for field in ("tool_calls", "function_call")]
    calls = ToolCalls(chain(calls, *fields))
    if text is None and not calls:
        raise Refused("message without content", f"{path} ({role}) has neither content nor tool calls")
    return Message(
        role=role,
        content=text,
        reasoning=reasoning or _optional_text(turn, path, *REASONING_KEYS),
        tool_calls=calls,
        name=_optional_text(turn, path, "name"),
        tool_call_id=_optional_text(turn, path, "tool_call_id"),
        train=_train(turn, path),
    )


def _train(turn: Mapping[str, Any], path: str) -> bool | None:
    """Return a turn's `train` (a boolean) or `weight` (0 or 1) as a boolean, or None."""
    flag = _first(turn, "train", "weight")
    if flag is not None and flag not in (0, 1):
        raise Refused("bad weight", f"{path} has train or weight {excerpt(flag)}; use true or false, 1 or 0")
    return None if flag is None else bool(flag)


def _parts(content: Any, role: str, path: str) -> tuple[str | None, str | None, ToolCalls]:
    """Return text, reasoning and tool calls of content: a text, or a list of typed parts."""
    if content is None or isinstance(content, str):
        return content, None, ToolCalls()
    if role == "tool" and isinstance(content, Mapping):
        # Some datasets store tool results as objects, but a template prints text.
        return msgspec.json.encode(content).decode(), None, ToolCalls()
    if not _is_list(content):
        raise Refused("not text", f"{path} has content {excerpt(content)}, neither text nor a list of parts")
    texts, reasonings = [], []
    calls: list[ToolCall] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "tool_call":
            calls += _calls(part.get("value"), path)
        elif kind in ("text", "output_text", "input_text"):
            texts.append(_text(_first(part, "text", "value"), path))
        elif kind in ("reasoning", "thinking"):
            reasonings.append(_text(_first(part, kind, "text", "value"), path))
        else:
            raise Refused(
                "unknown content part", f"{path} has a part {excerpt(part)}; text, reasoning, tool_call are known"
            )
    return "".join(texts) if texts else None, "".join(reasonings) or None, ToolCalls(calls)


def _calls(value: Any, path: str) -> ToolCalls:
    """Return tool calls of any spelling.

    Accepts a single call or a list, JSON text or objects, with or without a `function` wrapper.
    """
    value = _decoded(value)
    if not value:
        return ToolCalls()
    calls = value if _is_list(value) else [value]
    return ToolCalls(_call(_decoded(call), path) for call in calls)


def _call(call: Any, path: str) -> ToolCall:
    if isinstance(call, Mapping):
        function = call.get("function") or call
        named = isinstance(function, Mapping) and isinstance(function.get("name"), str)
        if named and ("arguments" in function or "parameters" in function):
            arguments = _decoded(_first(function, "arguments", "parameters") or {})
            if isinstance(arguments, Mapping):
                return ToolCall(function["name"], dict(arguments), _optional_text(call, path, "id"))
    raise Refused("bad tool call", f"{path}: {excerpt(call)} has no name and arguments")


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    if not value or not (value := _decoded(value)):
        return ()
    tools = [_decoded(tool) for tool in (value if _is_list(value) else [value])]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise Refused("bad tools", f"{excerpt(value)} is not a list of tool definitions")
    return tuple(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools)


def _system(row: Row) -> Iterable[Message]:
    """Yield the message of a system prompt in a separate column, if any."""
    prompt = row.get("system") or row.get("system_prompt")
    if prompt:
        yield Message("system", _text(prompt, "system"))


def _decoded(value: Any) -> Any:
    """Return the list or object that JSON text holds; any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            decoded = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            return value
        _refuse_deep(decoded)
        return decoded
    return value


def _refuse_deep(value: Any) -> None:
    if not isinstance(value, str) and not _nested_within(NESTING, value):
        raise Refused("nested too deep", f"the row nests lists and objects more than {NESTING} levels deep; flatten it")


def _nested_within(levels: int, value: Any) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [inner for outer in layer for inner in _items(outer) if type(inner) not in _SCALARS]
        if not layer:
            return True
    return False


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, (dict, Mapping)):  # the check for dict is fast, the check for Mapping slow
        return value.values()
    return value if _is_list(value) else ()


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Sequence) and not isinstance(value, str | bytes))


def _first(fields: Mapping[str, Any], *names: str) -> Any:
    """Return the first named field that is not None: tables store missing fields as None."""
    for name in names:
        if (value := fields.get(name)) is not None:
            return value
    return None


def _optional_text(fields: Mapping[str, Any], path: str, *names: str) -> str | None:
    value = _first(fields, *names)
    return None if value is None else _text(value, f"{path}.{names[0]}")


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise Refused("not text", f"{path} is a {type(value).__name__}: {excerpt(value)}")
    return value
