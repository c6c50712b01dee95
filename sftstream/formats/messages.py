"""Turns of a conversation -> messages: read role, content, tool calls, reasoning and marks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import msgspec

from sftstream.config import RowSettings
from sftstream.excerpt import excerpt
from sftstream.formats.exclusions import MARKS, parse_train
from sftstream.formats.fields import Row, carries_words, decoded, first, is_list, optional_text
from sftstream.formats.items import ITEMS, join_items, parse_item
from sftstream.formats.parts import parse_parts, split_results
from sftstream.formats.roles import CALLING, known_roles
from sftstream.formats.spelled import require_words
from sftstream.formats.tools import parse_calls
from sftstream.records import REASONING_KEYS, Message, Refused, Role, ToolCalls

SYSTEM = ("system", "system_prompt", "system_message")
"""Names of a column with the system prompt; the first with a value is read."""

_CONTENT = ("content", "value", "text")
"""Keys of a turn's content."""
_READ = frozenset(
    {"role", "from", "type", *_CONTENT, *MARKS, *REASONING_KEYS, "name", "tool_call_id", "tool_calls", "function_call"}
)
"""Keys of a turn that are read."""
_WORDS = frozenset(
    {"tools", "functions", "tool_defs", "context", "documents", "system", "input", "output", "thought", "thoughts"}
    | {"reasoning_text", "refusal", "image", "images", "image_url", "audio", "audios", "video", "videos", "response"}
    | {"arguments"}
)
"""Keys of a turn that are known to hold words of a conversation but are not read; refused."""


def system_message(row: Row) -> Iterable[Message]:
    """Yield a message for the column of the system prompt, if the row has such a column."""
    for column in SYSTEM:
        if prompt := row.get(column):
            yield Message("system", require_words(prompt, "system"))
            return


def parse_turns(turns: Any, column: str, settings: RowSettings) -> list[Message]:
    """Return the messages of a column of turns.

    The column is a list of turns, or an object of lists, `{"role": ["user"], "content": ["hi"]}`.
    The whole column, or each turn, may be JSON text. Raises Refused if the turns cannot be read.
    """
    turns = decoded(turns)
    if isinstance(turns, Mapping):
        turns = _turned(turns, column)
    if not is_list(turns):
        raise Refused("bad messages", f"{column} is a {type(turns).__name__}, not a list of messages")
    roles = known_roles(settings)
    messages: list[Message] = []
    has_items = False
    for index, turn in enumerate(turns):
        if message := _plain(turn, roles):
            messages.append(message)
            continue
        parsed = decoded(turn)
        has_items = has_items or _is_item(parsed)
        messages += _messages(parsed, f"{column}[{index}]", roles, settings)
    return join_items(messages) if has_items else messages


def parse_texts(texts: Sequence[Any], path: str, settings: RowSettings) -> Iterator[Message]:
    """Yield the messages of a list of texts, which belong to user and assistant in turn."""
    for index, text in enumerate(texts):
        yield Message(("user", "assistant")[index % 2], require_words(text, f"{path}[{index}]", known_roles(settings)))


def question_and_answer(asked: tuple[Message, ...], answered: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the conversation of a question's messages and an answer's messages.

    The answer may be the whole conversation, as in preference data; the question is then read once.
    Raises Refused if an answer to a user begins with another question.
    """
    if answered[: len(asked)] == asked:
        return answered
    if not answered or answered[0].role not in ("system", "user") or asked[-1].role != "user":
        return asked + answered
    system, own = _system(asked), _system(answered)
    question, whole = asked[len(system) :], answered[len(own) :]
    if len(whole) < len(question) or not all(map(_same_words, question, whole)) or (system and own and system != own):
        raise Refused(
            "two questions",
            f"the answer begins with {excerpt(answered[0].content)}, and the question with {excerpt(asked[0].content)}; "
            'read the answer alone by columns = {messages = "..."} with the name of its column',
        )
    return (own or system) + whole


def _system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(itertools.takewhile(lambda message: message.role == "system", messages))


def _same_words(first: Message, second: Message) -> bool:
    return first.role == second.role and (first.content or "").strip() == (second.content or "").strip()


def unread_keys(turns: Any, settings: RowSettings) -> set[str]:
    """Return the keys in a list of turns that are neither read nor ignored by the settings."""
    turns = decoded(turns)
    messages = [turn for turn in map(decoded, turns if is_list(turns) else ()) if isinstance(turn, Mapping)]
    return {
        key
        for turn in messages
        if turn.get("type") not in ITEMS
        for key, value in turn.items()
        if value is not None and key not in _READ and key not in settings.ignore
    }


def _plain(turn: Any, roles: Mapping[str, Role]) -> Message | None:
    """Return the message of a plain turn, which has only a role and a text; otherwise None.

    Most turns are plain. `_messages` returns the same message but needs ten times as long.
    """
    if type(turn) is not dict or len(turn) != 2:
        return None
    role, content = turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")
    if type(role) is str and type(content) is str and role in roles and role not in CALLING:
        return Message(roles[role], content)
    return None


def _messages(turn: Any, path: str, roles: Mapping[str, Role], settings: RowSettings) -> Iterator[Message]:
    """Yield the messages of a turn.

    A turn gives one message, except a turn with results of tools: each result is a message of its
    own, followed by a message for the rest of the content.
    """
    if not isinstance(turn, Mapping):
        raise Refused("bad messages", f"{path} is a {type(turn).__name__}, not an object")
    if settings.ignore:
        turn = {key: value for key, value in turn.items() if key not in settings.ignore}
    if _is_item(turn) and turn["type"] != "message":
        yield from parse_item(turn, path)
        return
    named, role = _role(turn, path, roles)
    _require_read(turn, path)
    content = _content(turn, path)
    results: list[Message] = []
    if is_list(content) and role in ("user", "tool"):
        results, content = split_results(content, path)
    yield from results
    if results and not content:
        return
    text, reasoning, calls = _read_content(content, named, role, path)
    fields = [parse_calls(turn.get(field), f"{path}.{field}") for field in ("tool_calls", "function_call")]
    calls = ToolCalls(chain(calls, *fields))
    if text is None and not calls:
        raise Refused("message without content", f"{path} ({role}) has neither content nor tool calls")
    yield Message(
        role=role,
        content=text,
        reasoning=reasoning or optional_text(turn, path, *REASONING_KEYS),
        tool_calls=calls,
        name=optional_text(turn, path, "name"),
        tool_call_id=optional_text(turn, path, "tool_call_id"),
        train=parse_train(turn, path),
    )


def _role(turn: Mapping[str, Any], path: str, roles: Mapping[str, Role]) -> tuple[str, Role]:
    """Return the name of the turn's role, as in `ROLES`, and the role; raises Refused."""
    named = first(turn, "role", "from", "type")
    if isinstance(named, str):
        for name in (named, named.lower()):
            if role := roles.get(name):
                return name, role
    raise Refused(
        "unknown role", f"{path} has role {named!r}; known are {', '.join(roles)}; roles = {{...}} adds names"
    )


def _content(turn: Mapping[str, Any], path: str) -> Any:
    """Return the content of a turn; raises Refused if two keys hold different contents."""
    contents = [turn[key] for key in _CONTENT if turn.get(key) is not None]
    if any(content != contents[0] for content in contents[1:]):
        raise Refused(
            "two contents",
            f"{path} has different contents in {[key for key in _CONTENT if turn.get(key)]}; leave out the wrong keys "
            "by ignore = [...]",
        )
    return contents[0] if contents else None


def _read_content(content: Any, named: str, role: Role, path: str) -> tuple[str | None, str | None, ToolCalls]:
    """Return the text, the reasoning and the tool calls in the content of a turn."""
    if named in CALLING:
        return None, None, parse_calls(content, path)
    if role == "tool" and isinstance(content, Mapping):
        # Some datasets store tool results as objects, but a template prints text.
        return msgspec.json.encode(content).decode(), None, ToolCalls()
    return parse_parts(content, path)


def _require_read(turn: Mapping[str, Any], path: str) -> None:
    """Raise Refused if a key of the turn holds words that are not read."""
    if unread := sorted(key for key in _WORDS.intersection(turn) if carries_words(turn[key])):
        raise Refused(
            "unread words",
            f"{path}.{unread[0]} holds words that no layout reads: {excerpt(turn[unread[0]])}; move them to content "
            f"or a column, or leave them out by ignore = [{unread[0]!r}]",
        )


def _is_item(turn: Any) -> bool:
    """Return True for an item of the Responses API (`items.py`)."""
    return (
        isinstance(turn, Mapping) and turn.get("type") in ITEMS and (turn["type"] == "message" or not turn.get("role"))
    )


def _turned(columns: Mapping[str, Any], path: str) -> Any:
    """Return the turns of an object of lists, the form in which `datasets` stores lists of objects.

    `{"role": ["user", "assistant"], "content": ["hi", "hello"]}` gives
    `[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]`.
    """
    lists = {key: value for key, value in columns.items() if value is not None}
    if not lists.keys() & {"role", "from"} or not all(is_list(value) for value in lists.values()):
        return columns
    if len(set(map(len, lists.values()))) > 1:
        lengths = {key: len(value) for key, value in lists.items()}
        raise Refused("bad messages", f"{path} is an object of lists of different lengths: {lengths}")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
