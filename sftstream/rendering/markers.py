"""Locate each message's own text in the rendered conversation.

A payload is a text of the conversation itself: a content, a reasoning, the name of a called tool,
or a string in the arguments of a call. The conversation is rendered twice: once as stored, once
with every payload between two markers. After removal of the markers, the second text must equal
the first. Each pair of markers then shows the place of a payload. If the two texts differ, the
template's output depends on the words of the messages, and the conversation is refused.

Example. The template prints `<{{ m.role }}>{{ m.content | trim }}</s>` for each message. The user's
message has the content "hi ":

    first render    <user>hi</s>
    marked content  "ZqM0x1x0bZqhiZqM0x1x0eZq "
    second render   <user>ZqM0x1x0bZqhiZqM0x1x0eZq</s>
    payload         Payload(start=6, end=8, message=0, kind="content", number=0)

The marker `ZqM0x1x0bZq` reads: prefix `ZqM`, message 0, kind 1 (`KINDS[1]` is "content"), payload
number 0, `b` for the beginning. `ZqM0x1x0eZq` marks the end of the same payload. Markers
consist of letters and digits, so JSON encoding and `trim` do not change a marker.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate, islice
from typing import Any, NamedTuple

from sftstream.excerpt import excerpt
from sftstream.records import REASONING_KEYS, Refused, Span
from sftstream.rendering.template import ChatTemplate, TemplateMessage

PREFIXES = ("ZqM", *(f"Zq{first}{second}" for first in "NPRSTVWX" for second in "BCDFGHJK"))
"""Possible prefixes of markers. A conversation gets the first prefix absent from its texts."""

KINDS = ("reasoning", "content", "call")
"""Kinds of payloads. A marker contains the index of the payload's kind."""

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


class Payload(NamedTuple):
    """A printed payload, at the characters `[start, end)` of the rendered text."""

    start: int
    end: int
    message: int
    """Index of the message in the conversation."""
    kind: str
    """A member of `KINDS`."""
    number: int
    """Number of the payload in the conversation.

    If a template prints a text twice, the text has two `Payload` records with the same number. A
    thought that was split off a content has a negative number.
    """


class PayloadIndex:
    """Payloads of a rendered text, for searches by message and by offset without a full scan."""

    def __init__(self, payloads: Sequence[Payload]) -> None:
        self._by_start = sorted(payloads)
        self._starts = [payload.start for payload in self._by_start]
        self._by_end = sorted((payload.end, payload.message) for payload in payloads)
        self._latest_end = list(accumulate((payload.end for payload in self._by_start), max))
        self._of: dict[int, list[Payload]] = {}
        for payload in self._by_start:
            self._of.setdefault(payload.message, []).append(payload)

    def of(self, message: int) -> Sequence[Payload]:
        """Return the payloads of a message, in the order of the printed text."""
        return self._of.get(message, ())

    def last_end(self, message: int, offset: int) -> int:
        """Among the payloads of earlier messages, return the last end at or before `offset`; or
        0."""
        found = bisect_right(self._by_end, (offset, len(self._by_end) + message)) - 1
        while found >= 0 and self._by_end[found][1] >= message:
            found -= 1
        return self._by_end[found][0] if found >= 0 else 0

    def next_start(self, message: int, offset: int) -> int | None:
        """Return the smallest payload start from `offset` on, of the messages after `message`.

        Return None if there is no such payload.
        """
        for payload in islice(self._by_start, bisect_left(self._starts, offset), None):
            if payload.message > message:
                return payload.start
        return None

    def overlapping(self, span: Span) -> list[Payload]:
        """Return the payloads that share a character with the span."""
        first, last = bisect_right(self._latest_end, span.start), bisect_left(self._starts, span.end)
        return [p for p in self._by_start[first:last] if span.start < p.end]


@dataclass(frozen=True)
class Located:
    """A rendered text, the payloads in text order, and the payloads that are not printed."""

    text: str
    payloads: list[Payload]
    dropped: list[tuple[int, str, str]]
    """Payloads that the template leaves out, as (message, kind, text)."""
    fill_blanks: bool = False
    """True if `payloads` also lists blank messages, each as an empty range."""

    @cached_property
    def index(self) -> PayloadIndex:
        """The payloads by message and by offset."""
        return PayloadIndex(self.payloads)


Key = tuple[int, int, int]
"""Identity of a payload: index of the message, index into `KINDS`, number of the payload."""


def locate(template: ChatTemplate, messages: Sequence[TemplateMessage], tools: Sequence[Any] = ()) -> Located:
    """Render the conversation and return the text with its payloads.

    Raises `Refused` if a render fails, if markers change the text outside the payloads, or if the
    template alters a payload by more than the escapes of a JSON string.
    """
    text = template.render(messages, tools)
    unsplit = _locate(template, text, messages, tools, split_thoughts=False)
    if unsplit is not None and not unsplit.dropped:
        if "</think>" not in text:
            return unsplit
        return replace(unsplit, payloads=[part for p in unsplit.payloads for part in _part_thought(p, text, messages)])
    # Some templates move `<think>...</think>` out of the content and would tear the two markers of
    # the content apart. The second try puts markers around the thought and around the rest.
    split = _locate(template, text, messages, tools, split_thoughts=True)
    best = split if split is not None and (unsplit is None or len(split.dropped) <= len(unsplit.dropped)) else unsplit
    if best is None:
        raise Refused(
            "template rewrites text",
            "the template prints different text if markers surround the messages' texts; use another template",
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
    """Render with markers and return the payloads.

    Return None if the marked render, after removal of the markers, differs from `text`. With
    `split_thoughts`, the text inside `<think>...</think>` and the rest of a content are two
    payloads. Raises `Refused` as `locate` does.
    """
    # The first try also marks blank messages, to find their places. But a template may ask whether
    # a content is blank, and print other text because of the marker. The second try leaves blank
    # messages unmarked.
    for fill_blanks in (True, False) if any(map(_is_blank, messages)) else (False,):
        marking = Marking(messages, text, split_thoughts=split_thoughts, fill_blanks=fill_blanks)
        unmarked, printed = marking.remove(template.render(marking.mark(messages), tools))
        if unmarked == text:
            break
    else:
        return None
    for payload, key in printed:
        if text[payload.start : payload.end] != (stored := marking.texts[key]):
            _require_json_escapes(text[payload.start : payload.end], stored, payload)
    printed_keys = {key for _, key in printed}
    dropped = [
        (key[0], KINDS[key[1]], payload_text)
        for key, payload_text in marking.texts.items()
        if key not in printed_keys and payload_text
    ]
    payloads = [_include_tag(payload, text, messages) if split_thoughts else payload for payload, _ in printed]
    return Located(text, payloads, dropped, fill_blanks)


def _is_blank(message: TemplateMessage) -> bool:
    """Return True for a message of a user, system or tool that is empty or only white space."""
    return message["role"] != "assistant" and not message["content"].strip()


def _part_thought(payload: Payload, text: str, messages: Sequence[TemplateMessage]) -> list[Payload]:
    """Split a payload into thought and rest if it is an assistant's content with a thought.

    Any other payload is returned alone and unchanged. Example of a split:

    "<think>\\nhm\\n</think>\\n\\nseven"   ->  reasoning "<think>\\nhm\\n</think>", content "seven"
    """
    printed = text[payload.start : payload.end]
    thought = _THOUGHT.fullmatch(printed) if payload.kind == "content" and "</think>" in printed else None
    if not thought or messages[payload.message]["role"] != "assistant":
        return [payload]
    reasoning = payload._replace(end=payload.start + thought.start(2), kind="reasoning", number=-1 - payload.number)
    start = payload.end - len(thought[2].lstrip())
    return [reasoning, payload._replace(start=start)] if start < payload.end else [reasoning]


def _include_tag(payload: Payload, text: str, messages: Sequence[TemplateMessage]) -> Payload:
    """Return the payload, extended to the left by the `<think>` tag if it is a thought.

    The tag is included only if the text shows the tag, and the white space after it, exactly as in
    the content.
    """
    content = messages[payload.message]["content"]
    thought = _THOUGHT.fullmatch(content) if payload.kind == "reasoning" else None
    if thought and text[: payload.start].endswith(
        opening := content[: thought.start(1)].lstrip() + _indent(thought[1])
    ):
        return payload._replace(start=payload.start - len(opening))
    return payload


def _indent(text: str) -> str:
    """Return the white space at the beginning of the text."""
    return text[: len(text) - len(text.lstrip())]


class Marking:
    """The markers of one conversation.

    `mark` puts markers around the payloads of messages, `remove` finds the markers in a render.
    """

    def __init__(
        self,
        messages: Sequence[TemplateMessage],
        text: str,
        *,
        split_thoughts: bool = False,
        fill_blanks: bool = False,
    ) -> None:
        """Choose a prefix that occurs neither in `text` (the render without markers) nor in the
        messages.

        `split_thoughts` marks `<think>...</think>` separately from the rest of a content;
        `fill_blanks` puts a pair of markers into blank messages too.
        """
        self._prefix = _absent_prefix(messages, text)
        self._split_thoughts = split_thoughts
        self._fill_blanks = fill_blanks
        self.texts: dict[Key, str] = {}
        """Text of each payload marked so far; "" for a blank message."""
        self._keys: dict[str, Key] = {}

    def mark(self, messages: Sequence[TemplateMessage]) -> list[TemplateMessage]:
        """Return copies of the messages with markers around every payload."""
        return [self._mark_message(index, message) for index, message in enumerate(messages)]

    def _mark_message(self, index: int, message: TemplateMessage) -> TemplateMessage:
        new = dict(message)
        if "reasoning_content" in new:
            new |= dict.fromkeys(REASONING_KEYS, self._mark(index, 0, new["reasoning_content"]))
        thought = _THOUGHT.fullmatch(new["content"]) if self._split_thoughts and new["role"] == "assistant" else None
        if thought:
            inner, rest = self._mark(index, 0, thought[1]), self._mark(index, 1, thought[2])
            new["content"] = f"{new['content'][: thought.start(1)]}{inner}</think>{rest}"
        elif self._fill_blanks and _is_blank(new):
            new["content"] += self._wrap(index, 1, "")
        else:
            new["content"] = self._mark(index, 1, new["content"])
        if "tool_calls" in new:
            new["tool_calls"] = [
                {**call, "function": self._mark(index, 2, call["function"])} for call in new["tool_calls"]
            ]
        return new

    def _mark(self, index: int, kind: int, value: Any) -> Any:
        """Return a copy of the value with markers around every string that is not blank.

        White space at both ends stays outside of the markers: " hi" becomes " ZqM...hiZqM...". A
        template that trims therefore removes the same white space with and without markers.
        """
        if not isinstance(value, str):
            if isinstance(value, Mapping):
                return {key: self._mark(index, kind, item) for key, item in value.items()}
            return [self._mark(index, kind, item) for item in value] if isinstance(value, Sequence) else value
        if not (stripped := value.strip()):
            return value
        wrapped = self._wrap(index, kind, stripped)
        if len(stripped) == len(value):
            return wrapped
        at = value.index(stripped)
        return value[:at] + wrapped + value[at + len(stripped) :]

    def _wrap(self, index: int, kind: int, text: str) -> str:
        number = len(self.texts)
        key = index, kind, number
        name = f"{index}x{kind}x{number}"
        self.texts[key] = text
        self._keys[name] = key
        return f"{self._prefix}{name}bZq{text}{self._prefix}{name}eZq"

    def remove(self, marked: str) -> tuple[str, list[tuple[Payload, Key]]]:
        """Return the text without markers, and the payload and key of each pair of markers."""
        pieces = _marker_pattern(self._prefix).split(marked)
        payloads: list[tuple[Payload, Key]] = []
        opened: dict[str, int] = {}
        at = 0
        # `split` puts the two groups of each marker between two pieces of text.
        for piece, name, side in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=False):
            at += len(piece)
            if side == "b":
                opened[name] = at
            elif name in opened and (key := self._keys.get(name)):
                payloads.append((Payload(opened.pop(name), at, key[0], KINDS[key[1]], key[2]), key))
        return "".join(pieces[::3]), sorted(payloads)

    def tail(self, marked: str) -> str:
        """Return the text after the last marker."""
        last = marked.rfind(self._prefix)
        while last >= 0:
            if marker := _marker_pattern(self._prefix).match(marked, last):
                return marked[marker.end() :]
            last = marked.rfind(self._prefix, 0, last)
        return marked


@cache
def _marker_pattern(prefix: str) -> re.Pattern[str]:
    return re.compile(prefix + r"(\d{1,9}x[012]x\d{1,9})([be])Zq")


def _absent_prefix(messages: Sequence[TemplateMessage], text: str) -> str:
    """Return the first member of `PREFIXES` that occurs neither in the text nor in the messages.

    Raises `Refused` if every prefix occurs.
    """
    unprinted = [text for message in messages for text in _unprinted(message)]
    if "Zq" not in text and "Zq" not in "\0".join(unprinted):
        return PREFIXES[0]
    held = [text, *strings(messages)]
    for prefix in PREFIXES:
        if not any(prefix in string for string in held):
            return prefix
    raise Refused(
        "markers typed",
        f"the conversation contains all {len(PREFIXES)} prefixes of the markers that locate messages "
        f"({PREFIXES[0]}, {PREFIXES[1]}, ...); remove one of the prefixes from the conversation",
    )


def _unprinted(message: TemplateMessage) -> Iterator[str]:
    """Yield the strings of a message that the plain render may leave out.

    A render with markers may print such a string, so the prefix must not occur in it either.
    """
    yield message["content"]
    if "reasoning_content" in message:
        yield message["reasoning_content"]
    if "tool_calls" in message:
        yield from strings(message["tool_calls"])


def names(message: TemplateMessage) -> Iterator[str]:
    """Yield the strings of a message that get no markers: role, name, ids, argument keys."""
    yield message["role"]
    for key in ("name", "tool_call_id"):
        if key in message:
            yield message[key]
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
    """Yield every string in a JSON-like value, including the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from strings([*value.keys(), *value.values()])
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings(item)


def _require_json_escapes(printed: str, stored: str, payload: Payload) -> None:
    """Raise `Refused` unless `printed` is `stored` with the escapes of a JSON string."""
    if printed not in (json.dumps(stored, ensure_ascii=False)[1:-1], json.dumps(stored)[1:-1]):
        raise Refused(
            "template alters text",
            f"message {payload.message}: {excerpt(stored)} is printed as {excerpt(printed)}; use a template that prints "
            "texts unchanged",
        )
