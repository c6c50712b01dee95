"""The fast path: decode rows of the usual layouts, without further columns, with msgspec.

`{"messages": [{"role": "user", "content": "hi"}, ...]}` is such a row. `layouts.parse_layout` reads
all other rows; for a usual row it returns the same messages in three to ten times the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from sftstream.formats.fields import Row, refuse_deep
from sftstream.formats.harmony import function_in
from sftstream.formats.items import join_parts
from sftstream.formats.messages import question_and_answer
from sftstream.formats.parts import parts_in
from sftstream.formats.roles import CALLING, ROLES
from sftstream.formats.spelled import require_words
from sftstream.formats.thoughts import may_hold_thought
from sftstream.formats.tools import parse_calls, parse_tools
from sftstream.records import UNDECODABLE, Conversation, Message, Refused, ToolCalls


def typed_json(text: bytes) -> Conversation | None:
    """Return the conversation of JSON text in a usual layout; None of any other text."""
    if (usual := _BY_BEGINNING.get(text[:_BEGINNING])) is None:
        return None
    try:
        row = usual.json.decode(text)
        tools = _known_tools(bytes(row.tools)) if row.tools else ()
        messages = usual.messages(row)
    except (*UNDECODABLE, Refused, KeyError):
        return None
    return Conversation(messages, tools) if _answered(messages) else None


def typed_row(row: Row, max_size: int) -> Conversation | None:
    """Return the conversation of a decoded row in a usual layout; None of any other row.

    Also None of a row whose texts have more than `max_size` characters, and of a row with tools or
    tool calls.
    """
    if (usual := _USUAL.get(next(iter(row), ""))) is None:
        return None
    try:
        messages = usual.messages(msgspec.convert(row, usual.without_tools, dec_hook=_tool_calls))
    except (msgspec.ValidationError, Refused, KeyError):
        return None
    if not _answered(messages):
        return None
    size = 0
    for message in messages:
        if message.tool_calls:
            return None
        size += len(message.content or "") + len(message.reasoning or "")
    return Conversation(messages) if size <= max_size else None


def typed_messages(row: Row) -> tuple[Message, ...] | None:
    """Return the messages of a row of `messages` and any further columns; None of any other row."""
    try:
        messages = msgspec.convert(row, _Messages, dec_hook=_tool_calls).messages
    except msgspec.ValidationError:
        return None
    if not _answered(messages):
        return None
    if len(row) > 1:
        refuse_deep([value for column, value in row.items() if column != "messages"])
    return messages


MESSAGE_KEYS = frozenset({*Message.__struct_fields__, "from", "value"})
"""Keys of messages that the fast path reads."""


class _Messages(msgspec.Struct, gc=False):
    """A row of `messages` in the field names of `Message`."""

    messages: tuple[Message, ...]
    system: None = None
    system_prompt: None = None


class _MessagesAlone(_Messages, forbid_unknown_fields=True, gc=False):
    """A row of `messages` without further columns, since msgspec would not check their nesting."""


class _Turn(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A turn of a ShareGPT row."""

    role: str = msgspec.field(name="from")
    content: str = msgspec.field(name="value")


class _Conversations(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A ShareGPT row."""

    conversations: list[_Turn]


class _Instruction(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """An Alpaca row."""

    instruction: str
    output: str
    input: str | None = None
    system: str | None = None
    history: list[tuple[str, str]] | None = None


class _Pair(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A row of question and answer, each a text or messages."""

    prompt: str | tuple[Message, ...]
    completion: str | tuple[Message, ...]


def _turns(row: _Conversations) -> tuple[Message, ...]:
    messages = [_turn(turn.role, turn.content) for turn in row.conversations]
    calls = [index for index, message in enumerate(messages) if message.tool_calls]
    return tuple(join_parts(messages, calls) if calls and _answered(messages) else messages)


def _turn(role: str, content: str) -> Message:
    if role in CALLING:
        return Message("assistant", None, tool_calls=parse_calls(content, role))
    return Message(ROLES[role], content)


def _instructed(row: _Instruction) -> tuple[Message, ...]:
    question = require_words(row.instruction, "instruction")
    if row.input:
        question += "\n\n" + require_words(row.input, "input")
    answer = Message("assistant", require_words(row.output, "output"))
    return *_before(row), Message("user", question), answer


def _before(row: _Instruction) -> Iterator[Message]:
    if row.system:
        yield Message("system", require_words(row.system, "system"))
    for question, answer in row.history or ():
        yield Message("user", require_words(question, "history"))
        yield Message("assistant", require_words(answer, "history"))


def _paired(row: _Pair) -> tuple[Message, ...]:
    asked, answered = row.prompt, row.completion
    if isinstance(asked, str):
        asked = (Message("user", require_words(asked, "prompt")),)
    if isinstance(answered, str):
        answered = (Message("assistant", require_words(answered, "completion")),)
    return question_and_answer(asked, answered)


def _tool_calls(_type: type, value: Any) -> ToolCalls:
    refuse_deep([[[value]]])  # wrapped as deep as in the row
    return parse_calls(value, "tool_calls")


class _Usual(NamedTuple):
    """A usual layout: the decoder of JSON rows, the type of other rows, the reader of messages."""

    json: msgspec.json.Decoder[Any]
    """Decodes the columns of `without_tools` and `tools`, the JSON text of tool definitions."""
    without_tools: type
    messages: Callable[[Any], tuple[Message, ...]]


def _usual(columns: type, messages: Callable[[Any], tuple[Message, ...]]) -> _Usual:
    tools = ("tools", msgspec.Raw, msgspec.Raw())
    with_tools = msgspec.defstruct(columns.__name__, [tools], bases=(columns,), gc=False, forbid_unknown_fields=True)
    return _Usual(msgspec.json.Decoder(with_tools, dec_hook=_tool_calls), columns, messages)


_LAYOUTS = (
    ("messages", _usual(_MessagesAlone, lambda row: row.messages)),
    ("conversations", _usual(_Conversations, _turns)),
    ("instruction", _usual(_Instruction, _instructed)),
    ("prompt", _usual(_Pair, _paired)),
)
_USUAL = dict(_LAYOUTS)
"""First column of a row -> the only layout that is tried."""
_BEGINNING = len('{"prompt":')
_BY_BEGINNING = {f'{{"{name}":'.encode()[:_BEGINNING]: usual for name, usual in _LAYOUTS}
"""Beginning of JSON text -> the only layout that is tried; found faster than the first column."""


def _answered(messages: Sequence[Message]) -> bool:
    """Return True if each message is read as stored, and a message is from the assistant.

    Such a message has content or tool calls, no list of parts and no thought in the content, and no
    name like "functions.add".
    """
    answered = False
    for message in messages:
        content = message.content
        if content is None:
            if not message.tool_calls:
                return False
        elif "[{" <= content < "[|" and parts_in(content):  # compares in a third of the time of `startswith`
            return False
        if message.name is not None and message.role == "tool" and function_in(message.name):
            return False
        if message.reasoning and content and may_hold_thought(content):
            return False
        answered = answered or message.role == "assistant"
    return answered


@lru_cache(maxsize=128)
def _known_tools(text: bytes) -> tuple[dict[str, Any], ...]:
    """Return the tool definitions of JSON text. Cached, since many conversations share tools."""
    tools = msgspec.json.decode(text)
    refuse_deep([tools])
    return parse_tools(tools)
