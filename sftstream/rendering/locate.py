"""Locate each message's own text in the rendered conversation.

A payload is a text of the conversation itself: a content, a reasoning, the name of a called tool,
or a string in the arguments of a call. The conversation is rendered twice: once as stored, once
with every payload between two markers (`markers.py`). After removal of the markers, the second text
must equal the first. Each pair of markers then shows the place of a payload. If the two texts
differ, the template's output depends on the words of the messages, and the conversation is refused.
So is a conversation whose messages are printed in another order.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

from sftstream.excerpt import excerpt
from sftstream.records import Refused, Span
from sftstream.rendering.markers import BLANKS, Marked, mark, thought_in
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

    Raises `Refused` if a render fails, if markers change the text outside the payloads, if the
    template alters a payload (the escapes of a JSON string are allowed, except in what an assistant
    says), or if messages are printed in another order.
    """
    text, tags = template.render_with_tags(messages, tools)
    located = _located(template, text, messages, tools)
    _require_order(located, messages)
    return replace(located, tags=tags) if tags else located


def _located(template: ChatTemplate, text: str, messages: Sequence[TemplateMessage], tools: Sequence[Any]) -> Located:
    try:
        unsplit = _locate(template, text, messages, tools, split_thoughts=False)
    except Refused:
        # Perhaps the template alters nothing but the white space around the tag of a thought.
        split = _locate(template, text, messages, tools, split_thoughts=True) if "</think>" in text else None
        if split is None:
            raise
        return split
    if unsplit is not None and not unsplit.dropped:
        if "</think>" not in text:
            return unsplit
        return replace(unsplit, payloads=[part for p in unsplit.payloads for part in _part_thought(p, text, messages)])
    # Some templates move `<think>...</think>` out of the content and would tear the two markers of
    # the content apart. The second try puts markers around the thought and around the rest.
    split = _locate(template, text, messages, tools, split_thoughts=True)
    best = split if split is not None and (unsplit is None or len(split.dropped) <= len(unsplit.dropped)) else unsplit
    if best is None:
        _refuse_rewritten(text, messages)
    return best


def _refuse_rewritten(text: str, messages: Sequence[TemplateMessage]) -> NoReturn:
    """Raise `Refused` for a text that markers change, and name a content that the text lacks."""
    marked = mark(messages, text, split_thoughts=True)
    for index, kind, stored in zip(marked.owners, marked.kinds, marked.texts, strict=True):
        if kind == "content" and not any(form in text for form in (stored, *_json_escaped(stored))):
            raise Refused(
                "template alters text",
                f"message {index}: {excerpt(stored)} is printed in another form; use a template that prints texts "
                "unchanged",
            )
    raise Refused(
        "template rewrites text",
        "the template prints different text if markers surround the messages' texts; use another template",
    )


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
                _require_json_escapes(found, stored, payload, messages)
        numbers = {payload.number for payload in payloads}
        texts = enumerate(zip(marked.owners, marked.kinds, marked.texts, strict=True))
        dropped = [payload for number, payload in texts if number not in numbers and payload[2]]
        if any(kind == "call" for _, kind, _ in dropped):
            named = _called_by_id(
                template, text, messages, tools, {index for index, kind, _ in dropped if kind == "call"}
            )
            dropped = [payload for payload in dropped if payload not in named]
    if split_thoughts:
        payloads = [_include_tag(payload, text, messages) for payload in payloads]
    return Located(text, payloads, dropped, marked)


def _called_by_id(
    template: ChatTemplate, text: str, messages: Sequence[TemplateMessage], tools: Sequence[Any], indices: Iterable[int]
) -> set[tuple[int, str, str]]:
    """Return the payloads that are names of called tools, printed inside the ids of the calls.

    Kimi K2 prints `functions.look_up:0`, the id of a call of `look_up`, and not the name itself.
    Another id for each call of the messages `indices` shows which ids the template prints.
    """
    changed = list(messages)
    others: dict[tuple[int, int], str] = {}
    for index in indices:
        calls = messages[index]["tool_calls"]
        ids = [f"{call['id']}ZqI{index}n{number}Zq" for number, call in enumerate(calls)]
        others |= {(index, number): other for number, other in enumerate(ids)}
        renamed = [{**call, "id": other} for call, other in zip(calls, ids, strict=True)]
        changed[index] = {**messages[index], "tool_calls": renamed}
    printed = template.render(changed, tools)
    if "ZqI" in text or re.sub(r"ZqI\d+n\d+Zq", "", printed) != text:
        return set()
    names: dict[tuple[int, str, str], bool] = {}
    for (index, number), other in others.items():
        call = messages[index]["tool_calls"][number]
        name = call["function"]["name"]
        found = other in printed and name in re.split(r"[.:/]", call["id"])
        names[index, "call", name] = found and names.get((index, "call", name), True)
    return {name for name, found in names.items() if found}


def _part_thought(payload: Payload, text: str, messages: Sequence[TemplateMessage]) -> list[Payload]:
    """Split a payload into thought and rest if it is an assistant's content with a thought.

    Any other payload is returned alone and unchanged. Example of a split:

    "<think>\\nhm\\n</think>\\n\\nseven"   ->  reasoning "<think>\\nhm\\n</think>", content "seven"
    """
    if payload.kind != "content" or messages[payload.message]["role"] != "assistant":
        return [payload]
    printed = text[payload.start : payload.end]
    thought = thought_in(printed)
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
    thought = thought_in(content) if payload.kind == "reasoning" else None
    if thought and text[: payload.start].endswith(
        opening := content[: thought.start(1)].lstrip() + _indent(thought[1])
    ):
        return payload._replace(start=payload.start - len(opening))
    return payload


def _indent(text: str) -> str:
    """Return the white space at the beginning of the text."""
    return text[: len(text) - len(text.lstrip())]


def _require_json_escapes(printed: str, stored: str, payload: Payload, messages: Sequence[TemplateMessage]) -> None:
    """Raise `Refused` unless `printed` is `stored` with the escapes of a JSON string.

    An assistant's content and reasoning may not be escaped: a model would learn to say the escapes.
    """
    said = payload.kind != "call" and messages[payload.message]["role"] == "assistant"
    if said or printed not in _json_escaped(stored):
        raise Refused(
            "template alters text",
            f"message {payload.message}: {excerpt(stored)} is printed as {excerpt(printed)}; use a template that prints "
            "texts unchanged",
        )


def _json_escaped(text: str) -> tuple[str, str]:
    """Return the text as printed inside a JSON string, other scripts unchanged or escaped."""
    return json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


def _require_order(located: Located, messages: Sequence[TemplateMessage]) -> None:
    """Raise `Refused` if a message begins before an earlier message.

    Messages of the system may be printed anywhere: some templates move them to the beginning or
    into the last question. Results of tools in a row may be in the order of their calls. A text may
    be printed again after its first print.
    """
    if located.index.in_order:
        return
    places = list(_places(messages))
    spoken = (payload.message for payload in located.payloads if messages[payload.message]["role"] != "system")
    begun = list(dict.fromkeys(spoken))
    for before, after in itertools.pairwise(begun):
        if places[after] < places[before]:
            raise Refused(
                "messages out of order",
                f"message {after} is printed after message {before}; use a template that prints messages in order",
            )


def _places(messages: Sequence[TemplateMessage]) -> Iterator[int]:
    """Yield the place of each message in the conversation; results of tools in a row share a place.

    The places are 0, 1, 2, 2, 3 for a question, two calls, their two results and an answer.
    """
    place = 0
    for before, message in itertools.pairwise(messages):
        yield place
        place += not before["role"] == message["role"] == "tool"
    yield place


def require_once(located: Located, message: int, span: Span) -> None:
    """Raise `Refused` if a span of an assistant's message holds one of its texts twice.

    The name of a call may be printed twice.
    """
    if located.index.in_order:
        return
    texts = [p.number for p in located.index.of(message) if p.kind != "call" and span.start <= p.start < span.end]
    if len(set(texts)) < len(texts):
        raise Refused(
            "text printed twice",
            f"message {message} is printed twice in the same turn; use a template that prints each answer once",
        )
