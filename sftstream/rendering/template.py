"""Render messages by the model's chat template: compiled once, date fixed, work bounded."""

from __future__ import annotations

import copy
import marshal
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date as Date
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices

from sftstream.door import Door
from sftstream.records import REASONING_KEYS, Message, Refused, Span
from sftstream.rendering.bounds import bound, compiled_names, metered

TemplateMessage = dict[str, Any]

SECONDS = 60.0
"""Time limit for one render, in seconds; a long conversation takes a few milliseconds.

Ends the run: a row refused by a clock would be refused on some machines only.
"""
_LONGEST = 1 << 20
"""Characters of a template; published templates have up to 40,000."""

MEMORY = 256 << 20
"""Bytes that a template may allocate during the probe: 256 MiB."""

REMEMBERED = 2048
"""Results in one generation of the JSON cache; two generations are kept."""

# A template is a program and may add None to a string, split by "", divide by 0 or never return.
_RUNNING = Door("", error=lambda line: Refused("template raises", line.removeprefix(": ")))


class ChatTemplate:
    """A compiled chat template with the variables of every render.

    `variables` are the tokenizer's (`bos_token`, ...). A template that prints the date, by
    `strftime_now` or `date_string`, prints `date`, by default the day of construction. Raises
    ValueError if `text` is not valid Jinja.
    """

    def __init__(self, text: str, variables: Mapping[str, str], date: Date | None = None) -> None:
        self.text = text
        asks_for_date = "strftime_now" in text or "date_string" in text
        self.date = (date or Date.today()) if asks_for_date else None
        self._variables: dict[str, Any] = dict(variables)
        if self.date is not None:
            self._variables |= {"strftime_now": self.date.strftime, "date_string": self.date.strftime("%d %b %Y")}
        if len(text) > _LONGEST:
            raise ValueError(
                f"the chat template has {len(text):,} characters, above {_LONGEST:,}; use another template"
            )
        with Door("the chat template is not valid Jinja"):
            self._compiled = _compiled(text)
        self.content_as_parts = False
        """True for a template that reads a content as `[{"type": "text", "text": ...}]` only."""
        self.has_generation_tags = bool(re.search(r"{%-?\s*generation\s*-?%}", text))

    def with_content_as_parts(self) -> ChatTemplate:
        """Return a copy that gives the template each content as a list of one text part."""
        result = copy.copy(self)
        result.content_as_parts = True
        return result

    def render(self, messages: Sequence[TemplateMessage], tools: Sequence[Any] = (), *, prompt: bool = False) -> str:
        """Return the text, with `prompt` ending in the generation prompt.

        Raises `Refused` if the template raises or does too much work.
        """
        with bounded():
            text: str = self._compiled.render(**self.context(messages, tools, prompt))
        return text

    def tagged_spans(self, messages: Sequence[TemplateMessage], tools: Sequence[Any] = ()) -> list[Span]:
        """Return the spans of `{% generation %}` tags. Raises `Refused` like `render`."""
        with bounded():
            _, spans = _render_with_assistant_indices(self._compiled, **self.context(messages, tools, False))
        return [Span(start, end) for start, end in spans]

    @property
    def environment(self) -> jinja2.Environment:
        """The sandboxed Jinja environment that transformers makes for chat templates."""
        return self._compiled.environment

    def context(self, messages: Sequence[TemplateMessage], tools: Sequence[Any], prompt: bool) -> dict[str, Any]:
        """Return all variables of a render."""
        if self.content_as_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        return {
            "messages": list(messages),
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": prompt,
            **self._variables,
        }


def _compiled(text: str) -> Any:
    """Compile in transformers' environment, with a cache behind `tojson` and without chance.

    Conversations of one source often share tool definitions; each definition is encoded once.
    `random` and `lipsum` would print another text in each process.
    """
    environment = _compile_jinja_template("").environment.overlay()  # "" since only the environment is wanted
    filters = {name: function for name, function in environment.filters.items() if name != "random"}
    environment.filters = {**filters, "tojson": _JsonCache(environment.filters["tojson"])}
    environment.globals = {name: value for name, value in environment.globals.items() if name != "lipsum"}
    bound(environment)
    compiled = environment.from_string(text)
    compiled.root_render_func.__globals__.update(compiled_names())
    return compiled


def exact_key(value: Any) -> bytes:
    """Return a key unique to each JSON value.

    1, 1.0, True and "1" have different keys, as have a list and a tuple; a NumPy array has the key
    of its bytes. Raises ValueError if the value holds a further type, a date for example: a JSON
    encoder would give a date and a string one key.
    """
    return marshal.dumps(value, 2)  # versions 3 and 4 give equal values different bytes


class _JsonCache:
    """A cache of a function's results by `exact_key` of the arguments.

    Two generations of up to `REMEMBERED` results: a full generation becomes the earlier one, and a
    result found there moves to the current generation.
    """

    def __init__(self, function: Callable[..., str]) -> None:
        self._function = function
        self._results: dict[bytes, str] = {}
        self._earlier: dict[bytes, str] = {}

    def __call__(self, value: Any, *arguments: Any, **options: Any) -> str:
        try:
            key = exact_key((value, arguments, options))
        except ValueError:
            return self._function(value, *arguments, **options)
        if (result := self._results.get(key)) is None:
            if len(self._results) >= REMEMBERED:
                self._results, self._earlier = {}, self._results
            result = self._earlier.get(key)
            if result is None:
                result = self._function(value, *arguments, **options)
            self._results[key] = result
        return result


@contextmanager
def bounded() -> Iterator[None]:
    """Convert errors of a template, and the limits of its work, to `Refused`.

    Raises RuntimeError, which ends a run, if the template uses up the time limit all the same.
    """
    with _RUNNING, _alarm(), metered():
        yield


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Limit the process to `MEMORY` further bytes of address space.

    A template that allocates without end raises MemoryError instead of exhausting the machine.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound if before[1] < 0 else min(bound, before[1]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _alarm() -> Iterator[None]:
    # Signals reach the main thread only; other threads render without a time limit.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _too_late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _too_late(_number: int, _frame: FrameType | None) -> None:
    raise RuntimeError(
        f"the chat template did not print a conversation within {SECONDS:.0f} s; use another template, or lower "
        "max_row_bytes of the sources"
    )


def template_message(message: Message) -> TemplateMessage:
    """Return the message as the dictionary that chat templates expect.

    `content` is always a string: many templates print None as 'None'.
    """
    result: TemplateMessage = {"role": message.role, "content": message.content or ""}
    if message.reasoning:
        result |= dict.fromkeys(REASONING_KEYS, message.reasoning)
    if message.tool_calls:
        # Mistral requires an id of nine letters and digits; any id serves for a call without one.
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
