"""Where each message's own words stand in the text that the template prints.

Every payload (a content, a reasoning, the name and the strings of a tool call) is put between two markers and the
conversation is rendered again. With the markers taken out the text must be the first one to the last character; then
each pair of markers shows where its payload is. A template that follows the words themselves, not just their place,
prints something else, and the conversation is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sftstream.excerpt import excerpt
from sftstream.records import REASONING_KEYS, Refused
from sftstream.rendering.template import ChatTemplate, TemplateMessage

MARK = re.compile(r"ZqM(\d{1,9})x([012])x(\d{1,9})([be])Zq")
"""A marker: message, kind, number, begin or end. Letters and digits pass through JSON and `trim` unchanged."""

KINDS = ("reasoning", "content", "call")

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


class Payload(NamedTuple):
    """Characters `[start, end)` of the text that are a message's own words, of one of `KINDS`."""

    start: int
    end: int
    message: int
    kind: str
    number: int
    """Counts the payloads of a conversation, so that words printed twice are known to be the same."""


class Located(NamedTuple):
    """The text of a conversation, its payloads in order of place, and those that the template did not print."""

    text: str
    payloads: list[Payload]
    dropped: list[tuple[int, str, str]]
    """(message, kind, words)"""


Words = dict[tuple[int, int, int], str]
"""The marked words by (message, kind, number)."""


def locate(template: ChatTemplate, messages: Sequence[TemplateMessage], tools: Sequence[Any] = ()) -> Located:
    """Raises `Refused` where the payloads cannot be followed."""
    text = template.render(messages, tools)
    whole = _located(template, text, messages, tools, split_thoughts=False)
    if whole is not None and not whole.dropped:
        return whole
    # Templates that know thoughts take `<think>...</think>` apart: mark the two halves each.
    halves = _located(template, text, messages, tools, split_thoughts=True)
    best = halves if halves is not None and (whole is None or len(halves.dropped) <= len(whole.dropped)) else whole
    if best is None:
        raise Refused("template rewrites text", "the render changes by more than the markers when its words are marked")
    return best


def _located(
    template: ChatTemplate,
    text: str,
    messages: Sequence[TemplateMessage],
    tools: Sequence[Any],
    *,
    split_thoughts: bool,
) -> Located | None:
    words: Words = {}
    marked = [_marked(index, message, words, split_thoughts) for index, message in enumerate(messages)]
    plain, found = _unmark(template.render(marked, tools))
    if plain != text:
        return None
    for payload, key in found:
        _check_verbatim(text[payload.start : payload.end], words[key], payload)
    seen = {key for _, key in found}
    dropped = [(key[0], KINDS[key[1]], word) for key, word in words.items() if key not in seen]
    payloads = [_with_tag(payload, text, messages) if split_thoughts else payload for payload, _ in found]
    return Located(text, payloads, dropped)


def _with_tag(payload: Payload, text: str, messages: Sequence[TemplateMessage]) -> Payload:
    """A thought that the message's own content opens begins with the tag, where the template prints it as it stands."""
    content = messages[payload.message]["content"]
    thought = _THOUGHT.fullmatch(content) if payload.kind == "reasoning" else None
    if thought and text[: payload.start].endswith(
        opening := content[: thought.start(1)].lstrip() + _indent(thought[1])
    ):
        return payload._replace(start=payload.start - len(opening))
    return payload


def _indent(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def mark_all(messages: Sequence[TemplateMessage]) -> list[TemplateMessage]:
    """The messages with their words between markers."""
    words: Words = {}
    return [_marked(index, message, words, split_thoughts=False) for index, message in enumerate(messages)]


def _marked(index: int, message: TemplateMessage, words: Words, split_thoughts: bool) -> TemplateMessage:
    new = dict(message)
    if "reasoning_content" in new:
        new |= dict.fromkeys(REASONING_KEYS, _mark(index, 0, new["reasoning_content"], words))
    thought = _THOUGHT.fullmatch(new["content"]) if split_thoughts and new["role"] == "assistant" else None
    if thought:
        inner, rest = _mark(index, 0, thought[1], words), _mark(index, 1, thought[2], words)
        new["content"] = f"{new['content'][: thought.start(1)]}{inner}</think>{rest}"
    else:
        new["content"] = _mark(index, 1, new["content"], words)
    if "tool_calls" in new:
        new["tool_calls"] = [
            {**call, "function": _mark(index, 2, call["function"], words)} for call in new["tool_calls"]
        ]
    return new


def _mark(index: int, kind: int, value: Any, words: Words) -> Any:
    """The value with every string in it between markers, inside its outer white space: a template that trims trims the same."""
    if isinstance(value, Mapping):
        return {key: _mark(index, kind, item, words) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_mark(index, kind, item, words) for item in value]
    if not isinstance(value, str) or not (core := value.strip()):
        return value
    number = len(words)
    words[index, kind, number] = core
    name = f"ZqM{index}x{kind}x{number}"
    at = value.index(core)
    return f"{value[:at]}{name}bZq{core}{name}eZq{value[at + len(core) :]}"


def names(message: TemplateMessage) -> Iterator[str]:
    """What a message holds besides words: names, ids, keys."""
    yield from (message.get(key, "") for key in ("role", "name", "tool_call_id"))
    for call in message.get("tool_calls", ()):
        yield call["id"]
        yield from _keys(call["function"]["arguments"])


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from value
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _keys(item)


def strings(value: Any) -> Iterator[str]:
    """Every string in lists and objects, keys among them: a template prints any of it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from strings([*value.keys(), *value.values()])
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings(item)


def _unmark(marked: str) -> tuple[str, list[tuple[Payload, tuple[int, int, int]]]]:
    """The text without markers, and what stood between each pair."""
    pieces: list[str] = []
    found: list[tuple[Payload, tuple[int, int, int]]] = []
    opened: dict[tuple[int, int, int], int] = {}
    at = 0
    for piece, mark in _pieces(marked):
        pieces.append(piece)
        at += len(piece)
        if mark is None:
            break
        key = int(mark[1]), int(mark[2]), int(mark[3])
        if mark[4] == "b":
            opened[key] = at
        elif key in opened:
            found.append((Payload(opened.pop(key), at, key[0], KINDS[key[1]], key[2]), key))
    return "".join(pieces), sorted(found)


def _pieces(marked: str) -> Iterator[tuple[str, re.Match[str] | None]]:
    at = 0
    for mark in MARK.finditer(marked):
        yield marked[at : mark.start()], mark
        at = mark.end()
    yield marked[at:], None


def _check_verbatim(printed: str, words: str, payload: Payload) -> None:
    """Words stand in the text as they are, or as JSON escapes them (in tool calls and results)."""
    if printed not in (words, json.dumps(words, ensure_ascii=False)[1:-1], json.dumps(words)[1:-1]):
        raise Refused(
            "template alters text", f"message {payload.message}: {excerpt(words)} is printed as {excerpt(printed)}"
        )
