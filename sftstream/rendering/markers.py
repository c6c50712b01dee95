"""Locate each message's own text in the rendered conversation, by markers.

Every payload (a content, a reasoning, the name and the strings of a tool call) is put between two
markers and the conversation is rendered again. The second text without markers must equal the first
text; then each pair of markers shows the place of a payload. A template that prints differently
because of the markers depends on the text itself, and the conversation is refused.

Example. Template `<{{ m.role }}>{{ m.content | trim }}</s>` for each message, a user's "hi ":

    text       <user>hi</s>
    marked     <user>ZqM0x1x0bZqhiZqM0x1x0eZq</s>     content "ZqM0x1x0bZqhiZqM0x1x0eZq "
    payload    Payload(start=6, end=8, message=0, kind="content", number=0)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sftstream.excerpt import excerpt
from sftstream.records import Refused
from sftstream.rendering.template import REASONING_KEYS, ChatTemplate, TemplateMessage

MARK = re.compile(r"ZqM(\d{1,9})x([012])x(\d{1,9})([be])Zq")
"""A marker: message, index of the kind, payload number, b(egin) or e(nd).

Letters and digits pass through JSON and `trim` unchanged.
"""

KINDS = ("reasoning", "content", "call")

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


class Payload(NamedTuple):
    """A message's own text at characters `[start, end)` of the rendered text."""

    start: int
    end: int
    message: int
    """Index of the message in the conversation."""
    kind: str
    """A member of `KINDS`."""
    number: int
    """Number of the payload in the conversation; two prints of a payload share the number."""


class Located(NamedTuple):
    """A rendered text, the printed payloads in order, and the dropped payloads."""

    text: str
    payloads: list[Payload]
    dropped: list[tuple[int, str, str]]
    """Unprinted payloads as (message, kind, text)."""


PayloadTexts = dict[tuple[int, int, int], str]
"""Payload texts by (message, index of the kind, number)."""


def locate(template: ChatTemplate, messages: Sequence[TemplateMessage], tools: Sequence[Any] = ()) -> Located:
    """Return the text and the payloads.

    Raises `Refused` if a render fails or the markers change the rest of the text.
    """
    text = template.render(messages, tools)
    unsplit = _locate(template, text, messages, tools, split_thoughts=False)
    if unsplit is not None and not unsplit.dropped:
        return unsplit
    # Some templates split `<think>...</think>` off the content: mark thought and rest separately.
    split = _locate(template, text, messages, tools, split_thoughts=True)
    best = split if split is not None and (unsplit is None or len(split.dropped) <= len(unsplit.dropped)) else unsplit
    if best is None:
        raise Refused(
            "template rewrites text", "with markers around the messages' text, the template prints other text"
        )
    return best


def _locate(
    template: ChatTemplate,
    text: str,
    messages: Sequence[TemplateMessage],
    tools: Sequence[Any],
    *,
    split_thoughts: bool,
) -> Located | None:
    """Render with markers; return None if the text without markers differs from `text`."""
    payload_texts: PayloadTexts = {}
    marked = [_mark_message(index, message, payload_texts, split_thoughts) for index, message in enumerate(messages)]
    unmarked, printed = _unmark(template.render(marked, tools))
    if unmarked != text:
        return None
    for payload, key in printed:
        _check_verbatim(text[payload.start : payload.end], payload_texts[key], payload)
    printed_keys = {key for _, key in printed}
    dropped = [
        (key[0], KINDS[key[1]], payload_text) for key, payload_text in payload_texts.items() if key not in printed_keys
    ]
    payloads = [_include_tag(payload, text, messages) if split_thoughts else payload for payload, _ in printed]
    return Located(text, payloads, dropped)


def _include_tag(payload: Payload, text: str, messages: Sequence[TemplateMessage]) -> Payload:
    """Extend a thought's payload over the content's `<think>` if printed unchanged."""
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
    """Return the messages with markers around every payload."""
    payload_texts: PayloadTexts = {}
    return [
        _mark_message(index, message, payload_texts, split_thoughts=False) for index, message in enumerate(messages)
    ]


def _mark_message(
    index: int, message: TemplateMessage, payload_texts: PayloadTexts, split_thoughts: bool
) -> TemplateMessage:
    """Return the message with markers around every payload; add the payloads to `payload_texts`."""
    new = dict(message)
    if "reasoning_content" in new:
        new |= dict.fromkeys(REASONING_KEYS, _mark(index, 0, new["reasoning_content"], payload_texts))
    thought = _THOUGHT.fullmatch(new["content"]) if split_thoughts and new["role"] == "assistant" else None
    if thought:
        inner, rest = _mark(index, 0, thought[1], payload_texts), _mark(index, 1, thought[2], payload_texts)
        new["content"] = f"{new['content'][: thought.start(1)]}{inner}</think>{rest}"
    else:
        new["content"] = _mark(index, 1, new["content"], payload_texts)
    if "tool_calls" in new:
        new["tool_calls"] = [
            {**call, "function": _mark(index, 2, call["function"], payload_texts)} for call in new["tool_calls"]
        ]
    return new


def _mark(index: int, kind: int, value: Any, payload_texts: PayloadTexts) -> Any:
    """Return the value with markers around every string in it, inside the outer white space.

    A template that trims thus removes equal white space with and without markers.
    """
    if isinstance(value, Mapping):
        return {key: _mark(index, kind, item, payload_texts) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_mark(index, kind, item, payload_texts) for item in value]
    if not isinstance(value, str) or not (stripped := value.strip()):
        return value
    number = len(payload_texts)
    payload_texts[index, kind, number] = stripped
    name = f"ZqM{index}x{kind}x{number}"
    at = value.index(stripped)
    return f"{value[:at]}{name}bZq{stripped}{name}eZq{value[at + len(stripped) :]}"


def names(message: TemplateMessage) -> Iterator[str]:
    """Yield the strings of a message outside payloads: role, name, ids, argument keys."""
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
    """Yield every string in a JSON-like value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from strings([*value.keys(), *value.values()])
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings(item)


def _unmark(marked: str) -> tuple[str, list[tuple[Payload, tuple[int, int, int]]]]:
    """Return the text without markers, and the payload and key of each pair of markers."""
    pieces: list[str] = []
    payloads: list[tuple[Payload, tuple[int, int, int]]] = []
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
            payloads.append((Payload(opened.pop(key), at, key[0], KINDS[key[1]], key[2]), key))
    return "".join(pieces), sorted(payloads)


def _pieces(marked: str) -> Iterator[tuple[str, re.Match[str] | None]]:
    """Yield the text before each marker with the marker, then the rest with None."""
    at = 0
    for mark in MARK.finditer(marked):
        yield marked[at : mark.start()], mark
        at = mark.end()
    yield marked[at:], None


def _check_verbatim(printed: str, stored: str, payload: Payload) -> None:
    """Raise Refused unless the payload is printed unchanged or JSON-escaped."""
    if printed not in (stored, json.dumps(stored, ensure_ascii=False)[1:-1], json.dumps(stored)[1:-1]):
        raise Refused(
            "template alters text", f"message {payload.message}: {excerpt(stored)} is printed as {excerpt(printed)}"
        )
