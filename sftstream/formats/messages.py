"""Turns of a conversation -> messages: read role, content, tool calls, reasoning and marks."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from sftstream.config import RowSettings
from sftstream.excerpt import excerpt
from sftstream.formats.exclusions import MARKS, parse_train
from sftstream.formats.fields import (
    SYSTEM,
    Row,
    carries_words,
    decoded,
    first,
    in_turns,
    is_list,
    optional_id,
    optional_text,
    require_text,
    without_ignored,
)
from sftstream.formats.harmony import HARMONY, by_channel, function_in, has_channel
from sftstream.formats.items import ITEM_KEYS, ITEMS, join_parts, parse_item
from sftstream.formats.keys import CONTENT, only_value, require_read, respelled
from sftstream.formats.parts import parse_parts, parts_in, split_results
from sftstream.formats.roles import CALLING, find_role, known_roles
from sftstream.formats.spelled import require_words
from sftstream.formats.thoughts import without_thought
from sftstream.formats.tools import parse_calls
from sftstream.records import REASONING_KEYS, Message, Refused, Role, ToolCalls

_READ = frozenset(
    {"role", "from", "type", *CONTENT, *MARKS, *REASONING_KEYS, "name", "tool_call_id", "tool_calls", "function_call"}
    | HARMONY
)
"""Keys of a turn that are read."""
_HOLDING = _READ | ITEM_KEYS - {"id", "status"} | {*SYSTEM}
"""Keys by which turns, items and rounds are read, of which a column may have the name."""


def system_message(row: Row, settings: RowSettings) -> Iterable[Message]:
    """Yield a message for the column of the system prompt, if the row has such a column."""
    for column in SYSTEM:
        if prompt := row.get(column):
            yield Message("system", _prompt(prompt, column, ignored_keys(settings.ignore)))
            return


def _prompt(prompt: Any, column: str, ignored: Collection[str]) -> str:
    """Return a system prompt: a text, or the text parts of Anthropic's Messages API.

    The parts may be JSON text, as in the content of a message.
    """
    if isinstance(prompt, str):
        prompt = parts_in(prompt) or prompt
    if not is_list(prompt):
        return require_words(prompt, "system")
    text, reasoning, calls = parse_parts(prompt, column, ignored)
    if reasoning or calls:
        raise Refused("unknown content part", f"{column} has parts {excerpt(prompt)}; only text can be read")
    return text or ""


@lru_cache(maxsize=256)
def ignored_keys(ignore: tuple[str, ...]) -> frozenset[str]:
    """Return the keys of turns that the setting `ignore` leaves out.

    "messages[].reasoning" names a key of turns. "reasoning" names a column, since turns are read by
    a key of the same name; "refusal" names a column, and a key that is never read.
    """
    names = (name.rpartition("[].") for name in ignore)
    return frozenset(key for _, of_turns, key in names if of_turns or key not in _HOLDING)


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
    parts: set[int] = set()
    for index, turn in enumerate(turns):
        if message := _plain(turn, roles):
            messages.append(message)
            continue
        path = f"{column}[{index}]"
        fields = _fields(decoded(turn), path, ignored_keys(settings.ignore))
        for message in _messages(fields, path, roles, settings):
            if message.content is None and _is_part(fields, roles, settings):
                parts.add(len(messages))
            messages.append(message)
    return join_parts(messages, parts) if parts else messages


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
    other_system = system and own and not (len(system) == len(own) and all(map(same_words, system, own)))
    if len(whole) < len(question) or not all(map(same_words, question, whole)) or other_system:
        raise Refused(
            "two questions",
            f"the answer begins with {excerpt(answered[0].content)}, and the question with {excerpt(asked[0].content)}; "
            'read the answer alone by columns = {messages = "..."} with the name of its column',
        )
    return (own or system) + whole


def _system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(itertools.takewhile(lambda message: message.role == "system", messages))


def same_words(first: Message, second: Message) -> bool:
    """Return True for messages of a role that differ at most in white space around the words."""
    return first.role == second.role and (first.content or "").strip() == (second.content or "").strip()


def unread_keys(turns: Any, settings: RowSettings, known: frozenset[str] | None = None) -> set[str]:
    """Return the keys in a list of turns that are neither read nor ignored by the settings.

    `known` are the keys that are read; None for those of turns and items.
    """
    ignored = ignored_keys(settings.ignore)
    messages = [turn for turn in map(decoded, turns if is_list(turns) else ()) if isinstance(turn, Mapping)]
    return {
        key
        for turn in messages
        for key, value in (without_ignored(turn, ignored) if known else _fields(turn, "a message", ignored)).items()
        if value is not None and key not in (known or (ITEM_KEYS if _is_item(turn) else _READ))
    }


def _plain(turn: Any, roles: Mapping[str, Role]) -> Message | None:
    """Return the message of a plain turn, which has only a role and a text; otherwise None.

    Most turns are plain. `_messages` returns the same message but needs ten times as long.
    """
    if type(turn) is not dict or len(turn) != 2:
        return None
    role, content = turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")
    if type(role) is str and type(content) is str and role in roles and role not in CALLING and content[:2] != "[{":
        return Message(roles[role], content)
    return None


def _fields(turn: Any, path: str, ignored: Collection[str]) -> Mapping[str, Any]:
    """Return the keys of a turn that are not ignored, under the names that are read."""
    if not isinstance(turn, Mapping):
        raise Refused("bad messages", f"{path} is a {type(turn).__name__}, not an object")
    turn = without_ignored(turn, ignored)
    return respelled(turn, _READ | ITEM_KEYS if _is_item(turn) else _READ, path)


def _messages(
    turn: Mapping[str, Any], path: str, roles: Mapping[str, Role], settings: RowSettings
) -> Iterator[Message]:
    """Yield the messages of a turn.

    A turn gives one message, except a turn with results of tools: each result is a message of its
    own, followed by a message for the rest of the content.
    """
    ignored = ignored_keys(settings.ignore)
    if _is_item(turn) and turn["type"] != "message":
        yield from parse_item(turn, path, ignored)
        return
    named, role = _role(turn, path, roles, settings)
    require_read(turn, _READ, path)
    content = _content(turn, named, role, path)
    results: list[Message] = []
    if is_list(content) and role in ("user", "tool"):
        results, content = split_results(content, path, ignored)
    yield from results
    if results and not content:
        return
    called = role == "assistant" and function_in(turn.get("recipient")) is not None
    text, reasoning, calls = _read_content(content, named, role, path, ignored, called)
    if channeled := role == "assistant" and has_channel(turn):
        text, reasoning, calls = by_channel(turn, (text, reasoning, calls), path)
    calls = _only_calls(calls, turn, path, ignored)
    _require_type(turn, role, calls, path)
    if text is None and role == "tool" and _says_nothing(turn):
        text = ""
    reasoning = _reasoning(turn, reasoning, path)
    if text and reasoning:
        key = next(filter(turn.get, REASONING_KEYS), None)  # without a key, the reasoning is in the content
        text = without_thought(text, reasoning, path, key and in_turns(path, key))
    if text is None and not calls and not (channeled and reasoning is not None):
        raise Refused("message without content", f"{path} ({role}) has neither content nor tool calls")
    name = optional_text(turn, path, "name")
    if role == "tool":  # "functions.add", as name or as role, is Harmony's name of the tool "add"
        name = function_in(name) or name or function_in(first(turn, "role", "from"))
    yield Message(
        role=role,
        content=text,
        reasoning=reasoning,
        tool_calls=calls,
        name=name,
        tool_call_id=optional_id(turn, path, "tool_call_id"),
        train=parse_train(turn, path),
    )


def _says_nothing(turn: Mapping[str, Any]) -> bool:
    """Return True for the turn of a tool that returned null: no other key may hold its result."""
    others = (value for key, value in turn.items() if key not in _READ)
    return any(name in turn for name in CONTENT) and not any(map(carries_words, others))


def _role(turn: Mapping[str, Any], path: str, roles: Mapping[str, Role], settings: RowSettings) -> tuple[str, Role]:
    """Return the name of the turn's role, as in `ROLES`, and the role; raises Refused."""
    given = first(turn, "role", "from", "type")
    if found := find_role(given, roles, settings):
        return found
    if function_in(given):
        return "tool", "tool"
    raise Refused(
        "unknown role",
        f"{path} has role {given!r}; known are {', '.join(roles)}; roles = {{...}} adds names, 'tool_call' for calls",
    )


def _reasoning(turn: Mapping[str, Any], inside: str | None, path: str) -> str | None:
    """Return the reasoning of a turn; `inside` is the reasoning in the parts of its content.

    Raises Refused if the turn has two different reasonings.
    """
    if not any([turn.get(key) is not None for key in REASONING_KEYS]):
        return inside
    reasoning = only_value({**turn, "content": inside}, (*REASONING_KEYS, "content"), path)
    return None if reasoning is None else require_text(reasoning, f"{path}.{REASONING_KEYS[0]}")


def _only_calls(inside: ToolCalls, turn: Mapping[str, Any], path: str, ignored: Collection[str]) -> ToolCalls:
    """Return the tool calls of a turn; `inside` are the calls in its content.

    Raises Refused if two places hold different calls.
    """
    fields = (parse_calls(turn.get(field), f"{path}.{field}", ignored) for field in ("tool_calls", "function_call"))
    found = [calls for calls in (inside, *fields) if calls]
    named = [[(call.name, call.arguments) for call in calls] for calls in found]
    if any(calls != named[0] for calls in named[1:]):
        raise Refused(
            "two contents",
            f"{path} has different tool calls in two of content, tool_calls and function_call; leave out the wrong keys by "
            f"ignore = [{in_turns(path, 'tool_calls')}], for example",
        )
    return found[0] if found else ToolCalls()


def _require_type(turn: Mapping[str, Any], role: Role, calls: ToolCalls, path: str) -> None:
    """Raise Refused if a turn with a role has the type of another item than it is read as."""
    kind = turn.get("type") if first(turn, "role", "from") else None
    fitting = {"reasoning": False, "function_call": bool(calls), "function_call_output": role == "tool"}
    if isinstance(kind, str) and not fitting.get(kind, True):
        raise Refused(
            "bad messages",
            f"{path} has the type {kind!r}, but would be read as words of the role {role!r}; write an item without a "
            f"role, or read the words by ignore = [{in_turns(path, 'type')}]",
        )


def _content(turn: Mapping[str, Any], named: str, role: Role, path: str) -> Any:
    """Return the content of a turn; a list of typed parts may also be JSON text.

    A result of a tool is always words, since the model reads what the tool has written. Raises
    Refused for a list in the assistant's text: the text may be an answer.
    """
    content = only_value(turn, CONTENT, path)
    if not isinstance(content, str) or role == "tool" or named in CALLING or (parts := parts_in(content)) is None:
        return content
    if role == "assistant":
        raise Refused(
            "bad messages",
            f"{path} holds a list of typed parts as text: {excerpt(content)}; write the list itself, or, if the text is "
            "the answer, write it as the text of a single part",
        )
    return parts


def _read_content(
    content: Any, named: str, role: Role, path: str, ignored: Collection[str], called: bool
) -> tuple[str | None, str | None, ToolCalls]:
    """Return the text, the reasoning and the tool calls in the content of a turn.

    `called` says that the content is the arguments of a call.
    """
    if named in CALLING:
        return None, None, parse_calls(content, path, ignored)
    if isinstance(content, Mapping) and (role == "tool" or called):
        # Some datasets store tool results as objects, but a template prints text. The arguments of
        # a call in Harmony's format are read from text.
        return msgspec.json.encode(content).decode(), None, ToolCalls()
    return parse_parts(content, path, ignored)


def _is_part(turn: Mapping[str, Any], roles: Mapping[str, Role], settings: RowSettings) -> bool:
    """Return True for a turn that may be a part of the assistant's turn before (`items.py`)."""
    if _is_item(turn) or has_channel(turn):
        return True
    found = find_role(first(turn, "role", "from", "type"), roles, settings)
    return found is not None and found[0] in CALLING


def _is_item(turn: Any) -> bool:
    """Return True for an item of the Responses API (`items.py`)."""
    if not isinstance(turn, Mapping) or not isinstance(kind := turn.get("type"), str):
        return False
    return kind == "message" or (kind in ITEMS and not first(turn, "role", "from"))


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
