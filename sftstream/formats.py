"""A row of any known dataset layout -> Conversation. The layout is recognised row by row, since mixtures differ."""

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
"""Every name of a role that datasets use -> the one that chat templates know."""

_SCALARS = frozenset({str, int, float, bool, type(None)})

NESTING = 64
"""Levels of lists and objects in a row. A fixed number, since how deep Python itself can follow depends on who calls."""


def parse_row(row: RawRow, columns: Mapping[str, str] | None = None) -> Conversation:
    """Return the conversation that a stored row holds.

    `columns` renames a source's own columns: {"instruction": "q"} reads column `q` as `instruction`.
    Raises BrokenRow if the row is not JSON or has none of the columns, and Refused, naming the
    field, if the layout is not understood.
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
    """A row under the names that `Message` has, of which `_any` would say the same in ten times the time."""

    messages: tuple[Message, ...]
    system: None = None
    system_prompt: None = None


class _TypedJson(_Typed, forbid_unknown_fields=True, gc=False):
    """One that has no other columns, in which anything could be nested."""

    tools: msgspec.Raw = msgspec.Raw()


def _tool_calls(_type: type, value: Any) -> ToolCalls:
    _refuse_deep([[[value]]])  # as deep as it lies in the row
    return _calls(value, "tool_calls")


_TYPED = msgspec.json.Decoder(_TypedJson, dec_hook=_tool_calls)
_BEGINNING = b'{"messages"'


def _typed(row: Row) -> tuple[Message, ...] | None:
    """The messages of such a row; None of another."""
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
    """All say or do something, and one of them is the assistant's."""
    answered = False
    for message in messages:
        if message.content is None and not message.tool_calls:
            return False
        answered = answered or message.role == "assistant"
    return answered


@lru_cache(maxsize=128)
def _known_tools(text: bytes) -> tuple[dict[str, Any], ...]:
    """Tools of their JSON text, which many conversations share."""
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
    """`messages`: role/content, as the OpenAI API has them. Some sets keep from/value under this name."""
    return _turns(row, "messages")


def _sharegpt(row: Row) -> Iterable[Message]:
    """`conversations`: from/value, the system prompt sometimes in a column of its own. Some keep role/content under this name."""
    return _turns(row, "conversations")


def _rounds(row: Row) -> Iterable[Message]:
    """`conversation`: a list of input and output, the first with a system prompt if any; some keep messages under this name."""
    rounds = _decoded(row["conversation"])
    if not _is_list(rounds) or not all(isinstance(one, Mapping) and "input" in one for one in rounds):
        yield from _turns(row, "conversation")
        return
    yield from _system(row)
    for index, one in enumerate(rounds):
        yield from _system(one)
        yield Message("user", _text(one["input"], f"conversation[{index}].input"))
        yield Message("assistant", _text(one.get("output"), f"conversation[{index}].output"))


def _by_turns(row: Row) -> Iterable[Message]:
    """`data`: texts, the user's and the assistant's by turns (UltraChat as it was first published)."""
    texts = _decoded(row["data"])
    if not _is_list(texts):
        raise Refused("bad messages", f"data is a {type(texts).__name__}, not a list of texts")
    yield from _system(row)
    for index, text in enumerate(texts):
        yield Message(("user", "assistant")[index % 2], _text(text, f"data[{index}]"))


def _alpaca(row: Row) -> Iterable[Message]:
    """instruction, optional input, output or response, optional system and history of [question, answer] pairs."""
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
    """Two columns of text, or of messages."""

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
"""Columns that must be there -> how to read the row; the first that matches."""


def _turns(row: Row, column: str) -> Iterable[Message]:
    turns = _decoded(row[column])
    if not _is_list(turns):
        raise Refused("bad messages", f"{column} is a {type(turns).__name__}, not a list of messages")
    yield from _system(row)
    for index, turn in enumerate(turns):
        yield _plain(turn) or _message(turn, f"{column}[{index}]")


def _plain(turn: Any) -> Message | None:
    """A turn that is a role and a text and no more, as most are; `_message` would say the same of it, in ten times the time."""
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
        text, reasoning, said = None, None, _calls(content, path)
    else:
        text, reasoning, said = _parts(content, role, path)
    more = [_calls(turn.get(field), f"{path}.{field}") for field in ("tool_calls", "function_call")]
    calls = ToolCalls(chain(said, *more))
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
    """What the data says of training a message: `train` as a boolean, or `weight` as 0 or 1."""
    flag = _first(turn, "train", "weight")
    if flag is not None and flag not in (0, 1):
        raise Refused(
            "bad weight", f"{path} is to be trained {excerpt(flag)} times; train and weight say no or yes, 0 or 1"
        )
    return None if flag is None else bool(flag)


def _parts(content: Any, role: str, path: str) -> tuple[str | None, str | None, ToolCalls]:
    """Text, reasoning and tool calls of a content that is text or a list of typed parts."""
    if content is None or isinstance(content, str):
        return content, None, ToolCalls()
    if role == "tool" and isinstance(content, Mapping):
        # Tool results are stored as objects here and there; a template prints text.
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
    """Tool calls in any spelling: one or a list, encoded as JSON or not, wrapped in `function` or not."""
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
    """A system prompt in a column of its own."""
    prompt = row.get("system") or row.get("system_prompt")
    if prompt:
        yield Message("system", _text(prompt, "system"))


def _decoded(value: Any) -> Any:
    """Lists and objects that a dataset keeps as JSON text, decoded; any other text as it is."""
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
        raise Refused("nested too deep", f"it has lists and objects in more than {NESTING} levels")


def _nested_within(levels: int, value: Any) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [inner for outer in layer for inner in _items(outer) if type(inner) not in _SCALARS]
        if not layer:
            return True
    return False


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, (dict, Mapping)):  # a dict is told at once, any other mapping slowly
        return value.values()
    return value if _is_list(value) else ()


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Sequence) and not isinstance(value, str | bytes))


def _first(fields: Mapping[str, Any], *names: str) -> Any:
    """The first of the fields that holds something: tables store a field that a row lacks as None."""
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
