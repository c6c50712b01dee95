"""Conversation -> rendered text and the spans of it that the assistant said, verified.

The text that is trained comes from one render of the whole conversation by the model's own template. Where the spans lie is
shown by a second render in which every payload (a content, a reasoning, a tool call's name and strings) stands between two
markers: with the markers taken out it must equal the first, else the template treats this conversation in a way that cannot
be followed and the conversation is refused. A span goes from the end of the generation prompt, after which the model speaks
at inference, to the stop token after the payload, inclusive.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date as Date
from typing import Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template

from sftstream.records import Conversation, Message, Refused, Rendered, Span

TemplateMessage = dict[str, Any]

MARK = re.compile(r"ZqM(\d{1,9})x(\d{1,9})([be])Zq")
"""A marker: message, payload within the message, begin or end. Letters and digits pass through JSON and `trim` unchanged."""

_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
# A template is a program: it adds None to a string, splits by nothing, divides by a count, calls itself.


class Payload(NamedTuple):
    """Characters `[start, end)` where a message's own text stands in the render."""

    start: int
    end: int
    message: int
    part: int


class ChatTemplate:
    """A chat template that knows how its assistant turns begin and end.

    `special_tokens` are the template's variables (`bos_token`, ...), `control_tokens` every string that the tokenizer turns
    into one special token. `date` is what the template prints as today; by default the day of construction, frozen.
    Raises ValueError where the template cannot be used for training.
    """

    def __init__(
        self, text: str, special_tokens: Mapping[str, str], control_tokens: Iterable[str], date: Date | None = None
    ) -> None:
        self.text = text
        self.date = Date.today() if date is None and "strftime_now" in text else date
        self._variables = {**special_tokens, **self._date_variables()}
        self._control = re.compile("|".join(map(re.escape, sorted(control_tokens, key=len, reverse=True))) or r"(?!)")
        try:
            self._compiled = _compile_jinja_template(text)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from None
        self.header = self._find_header()
        self.stop_tokens = self._find_stop_tokens()

    def render(self, messages: Sequence[TemplateMessage], tools: Sequence[Any] = (), *, prompt: bool = False) -> str:
        """The text; with `prompt`, up to where the assistant begins to speak."""
        text: str = self._compiled.render(
            messages=messages,
            tools=list(tools) or None,
            documents=None,
            add_generation_prompt=prompt,
            **self._variables,
        )
        return text

    def rendered(self, conversation: Conversation) -> Rendered:
        """Text and verified spans; raises `Refused`."""
        messages = [_template_message(message) for message in conversation.messages]
        self._refuse_control_tokens(messages, conversation.tools)
        marked, payloads = _mark(messages)
        try:
            text = self.render(messages, conversation.tools)
            with_marks = self.render(marked, conversation.tools)
        except _ERRORS as error:
            raise Refused("template raises", str(error)) from None
        found = _locate(with_marks, text, payloads)
        return Rendered(text, tuple(self._spans(messages, conversation.tools, text, found)))

    def _spans(
        self, messages: list[TemplateMessage], tools: Sequence[Any], text: str, found: list[Payload]
    ) -> Iterable[Span]:
        previous = 0
        spans = []
        for index, message in enumerate(messages):
            own = [payload for payload in found if payload.message == index]
            if message["role"] == "assistant":
                hull = self._hull(index, own, previous)
                start = self._start(messages[:index], tools, text, previous, hull.start, index)
                following = min(
                    (p.start for p in found if p.start >= hull.end and p.message > index), default=len(text)
                )
                spans.append(Span(start, self._end(text, hull.end, following, index)))
                previous = spans[-1].end
            elif own:
                previous = max(payload.end for payload in own)
        _verify(spans, [message["role"] == "assistant" for message in messages], found)
        return spans

    def _hull(self, index: int, own: list[Payload], previous: int) -> Span:
        """From the first to the last payload of an assistant's message, each where it is printed first after `previous`."""
        if not own:
            raise Refused("empty assistant message", f"message {index} says nothing, so its place cannot be verified")
        first = {payload.part: payload for payload in reversed(own) if payload.start >= previous}
        if not first:
            raise Refused("messages out of order", f"message {index} is printed before the message it follows")
        return Span(min(p.start for p in first.values()), max(p.end for p in first.values()))

    def _start(
        self, before: list[TemplateMessage], tools: Sequence[Any], text: str, previous: int, payload: int, index: int
    ) -> int:
        if self.header:
            at = text.rfind(self.header, previous, payload)
            if at < 0:
                raise Refused("no header", f"{self.header!r} does not stand before message {index}")
            return at + len(self.header)
        # Without a generation prompt (Mistral) the model speaks right after what came before.
        try:
            prompt = self.render(before, tools, prompt=True) if before else ""
        except _ERRORS as error:
            raise Refused("template raises", f"on the messages before message {index}: {error}") from None
        if not text.startswith(prompt) or not previous <= len(prompt) <= payload:
            raise Refused("history rewritten", f"what is printed before message {index} changes when it follows")
        return len(prompt)

    def _end(self, text: str, payload: int, following: int, index: int) -> int:
        ends = [at + len(stop) for stop in self.stop_tokens if (at := text.find(stop, payload, following)) >= 0]
        if not ends:
            raise Refused("no stop token", f"none of {sorted(self.stop_tokens)} ends message {index}")
        return min(ends)

    def _find_header(self) -> str:
        user = [{"role": "user", "content": "u"}]
        without, with_prompt = self._probe(user), self._probe(user, prompt=True)
        if without is None or with_prompt is None or not with_prompt.startswith(without):
            raise ValueError(
                "the chat template's generation prompt is not added at the end, so where the assistant begins is unknown"
            )
        return with_prompt[len(without) :]

    def _find_stop_tokens(self) -> frozenset[str]:
        """The control token after an assistant's text: at the end, before another turn, after a tool call."""
        said = "Zq said Zq"
        user, answer = {"role": "user", "content": "u"}, {"role": "assistant", "content": said}
        call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {"a": said}}}
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "name": "f", "content": "r", "tool_call_id": "abcdefghi"}
        tool = {
            "type": "function",
            "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
        }
        stops = set()
        shapes: tuple[list[TemplateMessage], ...] = ([user, answer], [user, answer, user], [user, called, result])
        for messages in shapes:
            text = self._probe(messages, (tool,) if called in messages else ()) or ""
            at = text.rfind(said)
            if at >= 0 and (stop := self._control.search(text, at + len(said))):
                stops.add(stop[0])
        if not stops:
            raise ValueError(
                "no special token ends an assistant's turn in this chat template, so the model could not learn to stop"
            )
        return frozenset(stops)

    def _probe(self, messages: list[TemplateMessage], tools: Sequence[Any] = (), *, prompt: bool = False) -> str | None:
        try:
            return self.render(messages, tools, prompt=prompt)
        except _ERRORS:  # a shape that this template does not know
            return None

    def _refuse_control_tokens(self, messages: list[TemplateMessage], tools: Sequence[Any]) -> None:
        places = [*((f"message {index}", message) for index, message in enumerate(messages)), ("the tools", tools)]
        for place, value in places:
            for text in _strings(value):
                if found := self._control.search(text):
                    raise Refused("control token in text", f"{place} contains {found[0]!r} as text")

    def _date_variables(self) -> dict[str, Any]:
        if self.date is None:
            return {}
        day = self.date
        return {"strftime_now": day.strftime, "date_string": day.strftime("%d %b %Y")}


def _strings(value: Any) -> Iterator[str]:
    """Every string in lists and objects, keys among them: a template prints any of it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _template_message(message: Message) -> TemplateMessage:
    """The dictionary that chat templates expect. `content` is always text: many templates print None as 'None'."""
    result: TemplateMessage = {"role": message.role, "content": message.content or ""}
    if message.reasoning:
        result["reasoning_content"] = message.reasoning
    if message.tool_calls:
        result["tool_calls"] = [
            {
                "type": "function",
                "id": call.id or f"call{i:05d}",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for i, call in enumerate(message.tool_calls)
        ]
    for key in ("name", "tool_call_id"):
        if (value := getattr(message, key)) is not None:
            result[key] = value
    return result


def _mark(messages: list[TemplateMessage]) -> tuple[list[TemplateMessage], dict[tuple[int, int], str]]:
    """The messages with their payloads between markers, and the payloads by (message, part)."""
    payloads: dict[tuple[int, int], str] = {}

    def mark(index: int, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: mark(index, item) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [mark(index, item) for item in value]
        if not isinstance(value, str) or not (core := value.strip()):
            return value
        part = sum(1 for message, _ in payloads if message == index)
        payloads[index, part] = core
        # Inside the outer white space, so that a template that trims trims the same.
        at = value.index(core)
        return f"{value[:at]}ZqM{index}x{part}bZq{core}ZqM{index}x{part}eZq{value[at + len(core) :]}"

    marked = []
    for index, message in enumerate(messages):
        new = dict(message)
        for key in ("reasoning_content", "content"):
            if key in new:
                new[key] = mark(index, new[key])
        if "tool_calls" in new:
            new["tool_calls"] = [{**call, "function": mark(index, call["function"])} for call in new["tool_calls"]]
        marked.append(new)
    return marked, payloads


def _locate(with_marks: str, text: str, payloads: Mapping[tuple[int, int], str]) -> list[Payload]:
    """Where each payload stands in `text`, from the render with markers; every payload at least once."""
    pieces: list[str] = []
    found: list[Payload] = []
    opened: dict[tuple[int, int], int] = {}
    at = written = 0
    for mark in MARK.finditer(with_marks):
        pieces.append(with_marks[at : mark.start()])
        written += len(pieces[-1])
        at = mark.end()
        key = int(mark[1]), int(mark[2])
        if mark[3] == "b":
            opened[key] = written
        elif key in opened:
            found.append(Payload(opened.pop(key), written, *key))
    pieces.append(with_marks[at:])
    if "".join(pieces) != text:
        raise Refused("template rewrites text", "the render changes by more than markers when its payloads are marked")
    for message, part in sorted(payloads.keys() - {(p.message, p.part) for p in found}):
        raise Refused("template drops text", f"message {message}: {_excerpt(payloads[message, part])} is not printed")
    for payload in found:
        _check_verbatim(text[payload.start : payload.end], payloads[payload.message, payload.part], payload.message)
    return found


def _check_verbatim(printed: str, payload: str, message: int) -> None:
    """A payload stands in the text as it is, or as JSON escapes it (in tool calls and results)."""
    if printed not in (payload, json.dumps(payload, ensure_ascii=False)[1:-1], json.dumps(payload)[1:-1]):
        raise Refused(
            "template alters text", f"message {message}: {_excerpt(payload)} is printed as {_excerpt(printed)}"
        )


def _verify(spans: list[Span], is_assistant: list[bool], found: list[Payload]) -> None:
    """Spans are ordered and disjoint, and nobody else's text lies in one."""
    for before, after in itertools.pairwise(spans):
        if after.start < before.end:
            raise Refused("messages out of order", f"spans {before} and {after} overlap")
    for payload in found:
        if not is_assistant[payload.message] and any(s.start < payload.end and payload.start < s.end for s in spans):
            raise Refused("foreign text in span", f"message {payload.message} is printed inside an assistant's turn")


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
