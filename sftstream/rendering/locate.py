"""Locate each message's own text in the rendered conversation.

A payload is a text of the conversation itself: a content, a reasoning, the name of a called tool,
or a string in the arguments of a call. The conversation is rendered twice: once as stored, once
with every payload between two markers (`markers.py`). After removal of the markers, the second text
must equal the first. Each pair of markers then shows the place of a payload. If the two texts
differ, the template's output depends on the words of the messages, and the conversation is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sftstream.excerpt import excerpt
from sftstream.records import Refused, Span
from sftstream.rendering.markers import BLANKS, THOUGHT, Marked, mark
from sftstream.rendering.payloads import Payload, PayloadIndex
from sftstream.rendering.template import ChatTemplate, TemplateMessage


@dataclass(frozen=True)
class Located:
    """A rendered text, the payloads in text order, and the payloads that are not printed."""

    text: str
    payloads: list[Payload]
    dropped: list[tuple[int, str, str]]
    """Payloads that the template leaves out, as (message, kind, text)."""
    marked: Marked
    """The conversation with the markers by which the payloads were found.

    If blank texts have markers, `payloads` also lists these texts, each as an empty range.
    """
    tags: Sequence[Span] = ()
    """Spans printed inside `{% generation %}` blocks."""

    @cached_property
    def index(self) -> PayloadIndex:
        """The payloads by message and by offset."""
        return PayloadIndex(self.payloads)


def locate(template: ChatTemplate, messages: Sequence[TemplateMessage], tools: Sequence[Any] = ()) -> Located:
    """Render the conversation and return the text with its payloads.

    Raises `Refused` if a render fails, if markers change the text outside the payloads, or if the
    template alters a payload by more than the escapes of a JSON string.
    """
    text, tags = template.render_with_tags(messages, tools)
    located = _located(template, text, messages, tools)
    return replace(located, tags=tags) if tags else located


def _located(template: ChatTemplate, text: str, messages: Sequence[TemplateMessage], tools: Sequence[Any]) -> Located:
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
    # The first try also marks blank texts, to find their places. But a template may ask whether a
    # text is blank, and print other text because of the marker. Further tries leave blanks
    # unmarked.
    fill: tuple[str, ...] = BLANKS
    while True:
        marked = mark(messages, text, split_thoughts=split_thoughts, fill=fill)
        unmarked, payloads = marked.remove(template.render(marked.messages, tools))
        if unmarked == text:
            break
        if not marked.filled:
            return None
        fill = ("alone",) if len(marked.filled) == 2 else ()
    printed = [text[payload.start : payload.end] for payload in payloads]
    dropped = []
    if printed != marked.texts:
        for payload, found in zip(payloads, printed, strict=True):
            if found != (stored := marked.texts[payload.number]):
                _require_json_escapes(found, stored, payload)
        numbers = {payload.number for payload in payloads}
        texts = enumerate(zip(marked.owners, marked.kinds, marked.texts, strict=True))
        dropped = [payload for number, payload in texts if number not in numbers and payload[2]]
    if split_thoughts:
        payloads = [_include_tag(payload, text, messages) for payload in payloads]
    return Located(text, payloads, dropped, marked)


def _part_thought(payload: Payload, text: str, messages: Sequence[TemplateMessage]) -> list[Payload]:
    """Split a payload into thought and rest if it is an assistant's content with a thought.

    Any other payload is returned alone and unchanged. Example of a split:

    "<think>\\nhm\\n</think>\\n\\nseven"   ->  reasoning "<think>\\nhm\\n</think>", content "seven"
    """
    if payload.kind != "content" or messages[payload.message]["role"] != "assistant":
        return [payload]
    printed = text[payload.start : payload.end]
    thought = THOUGHT.fullmatch(printed) if "</think>" in printed else None
    if not thought:
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
    thought = THOUGHT.fullmatch(content) if payload.kind == "reasoning" else None
    if thought and text[: payload.start].endswith(
        opening := content[: thought.start(1)].lstrip() + _indent(thought[1])
    ):
        return payload._replace(start=payload.start - len(opening))
    return payload


def _indent(text: str) -> str:
    """Return the white space at the beginning of the text."""
    return text[: len(text) - len(text.lstrip())]


def _require_json_escapes(printed: str, stored: str, payload: Payload) -> None:
    """Raise `Refused` unless `printed` is `stored` with the escapes of a JSON string."""
    if printed not in (json.dumps(stored, ensure_ascii=False)[1:-1], json.dumps(stored)[1:-1]):
        raise Refused(
            "template alters text",
            f"message {payload.message}: {excerpt(stored)} is printed as {excerpt(printed)}; use a template that prints "
            "texts unchanged",
        )
