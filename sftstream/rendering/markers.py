"""Put markers around the payloads of a conversation, and find the markers in a rendered text.

Example. The template prints `<{{ m.role }}>{{ m.content | trim }}</s>` for each message; the
message of the user has the content "hi ":

    marked content     "ZqM0bZqhiZqM0eZq "
    render             <user>ZqM0bZqhiZqM0eZq</s>
    without markers    <user>hi</s>
    payload            Payload(start=6, end=8, message=0, kind="content", number=0)

The marker `ZqM0bZq` reads: prefix `ZqM`, payload number 0, `b` for the beginning. `ZqM0eZq` marks
the end of the same payload. Markers consist of letters and digits, so JSON encoding and `trim` do
not change a marker.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from sftstream.records import REASONING_KEYS, Refused
from sftstream.rendering.payloads import Payload
from sftstream.rendering.template import TemplateMessage

PREFIXES = ("ZqM", *(f"Zq{first}{second}" for first in "NPRSTVWX" for second in "BCDFGHJK"))
"""Possible prefixes of markers. A conversation gets the first prefix absent from its texts."""

BLANKS = ("alone", "beside")
"""Kinds of blank texts that may get markers.

    "alone"    the blank content of a user, a tool or the system
    "beside"   of an assistant's reasoning and content, the blank one beside the other
"""

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_UNOPENED = re.compile(r"(.*)</think>([ \t]*\n.*)", re.DOTALL)


class Marked:
    """A conversation with markers around its payloads.

    `split_thoughts` marks `<think>...</think>` separately from the rest of a content. `fill` names
    the blank texts that get a pair of markers too, members of `BLANKS`.
    """

    def __init__(
        self, messages: Sequence[TemplateMessage], prefix: str, *, split_thoughts: bool, fill: Collection[str]
    ) -> None:
        self.prefix = prefix
        self.split_thoughts = split_thoughts
        self._fill = fill
        self.filled: set[str] = set()
        """The members of `fill` whose blank texts occur and got markers."""
        self.texts: list[str] = []
        """Text of each payload, by number; "" for a blank text."""
        self.owners: list[int] = []
        """Index of the message of each payload."""
        self.kinds: list[str] = []
        """Kind of each payload."""
        self._labels: list[str] = []
        self._unmarked: list[str] = []
        self.messages = [self._mark_message(index, message) for index, message in enumerate(messages)]
        """Copies of the messages with markers around every payload."""

    def holds(self, text: str) -> bool:
        """Return True if a string of the conversation that a template may print contains `text`."""
        return text in "\0".join((*self.texts, *self._unmarked))

    def _mark_message(self, index: int, message: TemplateMessage) -> TemplateMessage:
        new = dict(message)
        content, said = new["content"], new["role"] == "assistant"
        # Beside a call, an empty text is usual, and most templates print nothing for it.
        fill = said and "tool_calls" not in new
        if "reasoning_content" in new:
            reasoning = self._mark(index, "reasoning", new["reasoning_content"], fill="beside" if fill else None)
            new |= dict.fromkeys(REASONING_KEYS, reasoning)
        if self.split_thoughts and said and (thought := thought_in(content)):
            inner = self._mark(index, "reasoning", thought[1])
            rest = self._mark(index, "content", thought[2], fill="beside" if fill else None)
            new["content"] = f"{content[: thought.start(1)]}{inner}</think>{rest}"
        else:
            beside = fill and "reasoning_content" in new
            new["content"] = self._mark(
                index, "content", content, fill="beside" if beside else None if said else "alone"
            )
        if "tool_calls" in new:
            new["tool_calls"] = [self._mark_call(index, call) for call in new["tool_calls"]]
        return new

    def _mark_call(self, index: int, call: Mapping[str, Any]) -> dict[str, Any]:
        self._unmarked.append(call["id"])
        return {**call, "function": self._mark_all(index, call["function"])}

    def _mark_all(self, index: int, value: Any) -> Any:
        """Return a copy of a JSON-like value of a call with markers around every string."""
        if isinstance(value, str):
            return self._mark(index, "call", value)
        if isinstance(value, (dict, Mapping)):  # `dict` first: isinstance is slow for an abstract class
            self._unmarked += value
            return {key: self._mark_all(index, item) for key, item in value.items()}
        return [self._mark_all(index, item) for item in value] if isinstance(value, (list, Sequence)) else value

    def _mark(self, index: int, kind: str, text: str, fill: str | None = None) -> str:
        """Return the text between markers.

        A blank text is returned unchanged, or with markers at its end if `fill` is chosen.
        White space at both ends stays outside of the markers: " hi" becomes " ZqM...hiZqM...". A
        template that trims therefore removes the same white space with and without markers.
        """
        stripped = text.strip()
        if not stripped:
            if fill not in self._fill:
                return text
            self.filled.add(str(fill))
            return text + self._wrap(index, kind, "")
        wrapped = self._wrap(index, kind, stripped)
        if len(stripped) == len(text):
            return wrapped
        at = text.index(stripped)
        return text[:at] + wrapped + text[at + len(stripped) :]

    def _wrap(self, index: int, kind: str, text: str) -> str:
        begin, end = f"{len(self.texts)}bZq", f"{len(self.texts)}eZq"
        self.texts.append(text)
        self.owners.append(index)
        self.kinds.append(kind)
        self._labels += (begin, end)
        return f"{self.prefix}{begin}{text}{self.prefix}{end}"

    def remove(self, marked: str) -> tuple[str, list[Payload]]:
        """Return a rendered text without markers, and the payload of each pair of markers."""
        first, *pieces = marked.split(self.prefix)
        if len(pieces) != len(self._labels) or not all(map(str.startswith, pieces, self._labels)):
            return self._remove_by_pattern(marked)
        # Each payload is printed once, and all are in order: the pieces after the beginning of a
        # payload and after its end take turns.
        texts = [first, *map(str.removeprefix, pieces, self._labels)]
        ends = list(accumulate(map(len, texts)))
        payloads = map(Payload, ends[:-1:2], ends[1::2], self.owners, self.kinds, range(len(self.texts)))
        return "".join(texts), list(payloads)

    def _remove_by_pattern(self, marked: str) -> tuple[str, list[Payload]]:
        pieces = _marker_pattern(self.prefix).split(marked)
        payloads: list[Payload] = []
        opened: dict[int, int] = {}
        at = 0
        # `split` puts the two groups of each marker between two pieces of text.
        for piece, digits, side in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=False):
            at += len(piece)
            number = int(digits)
            if side == "b":
                opened[number] = at
            elif number in opened and number < len(self.texts):
                payloads.append(Payload(opened.pop(number), at, self.owners[number], self.kinds[number], number))
        return "".join(pieces[::3]), sorted(payloads)

    def tail(self, marked: str) -> str:
        """Return the part of a rendered text after the last marker."""
        last = marked.rfind(self.prefix)
        while last >= 0:
            if marker := _marker_pattern(self.prefix).match(marked, last):
                return marked[marker.end() :]
            last = marked.rfind(self.prefix, 0, last)
        return marked


def thought_in(content: str) -> re.Match[str] | None:
    """Return the thought at the beginning of a content; the groups are the thought and the rest.

    The opening tag may be missing, as in answers to prompts ending with the tag. In the middle of a
    line such a `</think>` is a word about the tag.
    """
    if "</think>" not in content:
        return None
    if "<think>" in content or content.count("</think>") > 1:
        return _THOUGHT.fullmatch(content)
    return _UNOPENED.fullmatch(content)


def mark(
    messages: Sequence[TemplateMessage], text: str, *, split_thoughts: bool = False, fill: Collection[str] = ()
) -> Marked:
    """Return the conversation with markers, as described in `Marked`.

    The prefix of the markers occurs neither in `text`, the render without markers, nor in the
    messages. Raises `Refused` if every prefix occurs.
    """
    marked = Marked(messages, PREFIXES[0], split_thoughts=split_thoughts, fill=fill)
    if "Zq" not in text and not marked.holds("Zq"):
        return marked
    prefix = _absent_prefix([text, *strings(messages)])
    if prefix == PREFIXES[0]:
        return marked
    return Marked(messages, prefix, split_thoughts=split_thoughts, fill=fill)


@cache
def _marker_pattern(prefix: str) -> re.Pattern[str]:
    return re.compile(prefix + r"(\d{1,9})([be])Zq", re.ASCII)


def _absent_prefix(texts: Iterable[str]) -> str:
    """Return the first member of `PREFIXES` that occurs in no text; raises `Refused` if there is
    none."""
    held = list(texts)
    for prefix in PREFIXES:
        if not any(prefix in text for text in held):
            return prefix
    raise Refused(
        "markers typed",
        f"the conversation contains all {len(PREFIXES)} prefixes of the markers that locate messages "
        f"({PREFIXES[0]}, {PREFIXES[1]}, ...); remove one of the prefixes from the conversation",
    )


def names(message: TemplateMessage) -> Iterator[str]:
    """Yield the strings of a message that get no markers: name, ids, argument keys.

    The role gets no markers either, but can only be one of `Role`.
    """
    for key in ("name", "tool_call_id"):
        if key in message:
            yield message[key]
    for call in message.get("tool_calls", ()):
        yield call["id"]
        yield from _keys(call["function"]["arguments"])


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, (dict, Mapping)):  # `dict` first: isinstance is slow for an abstract class
        yield from value
        value = list(value.values())
    if isinstance(value, (list, Sequence)) and not isinstance(value, str):
        for item in value:
            yield from _keys(item)


def strings(value: Any) -> Iterator[str]:
    """Yield every string in a JSON-like value, including the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, Mapping)):  # `dict` first: isinstance is slow for an abstract class
        yield from strings([*value.keys(), *value.values()])
    elif isinstance(value, (list, Sequence)):
        for item in value:
            yield from strings(item)
