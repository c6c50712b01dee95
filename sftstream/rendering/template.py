"""The model's own chat template, compiled once: messages -> text, with the date frozen and the time bounded."""

from __future__ import annotations

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

from sftstream.records import REASONING_KEYS, Message, Refused, Span

TemplateMessage = dict[str, Any]

SECONDS = 10.0
"""Longest time that one conversation may take to render; a long one takes a few milliseconds."""

MEMORY = 256 << 20
"""Bytes that a template may take while it is probed."""

REMEMBERED = 2048
"""Values whose JSON is kept."""

_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    MemoryError,
)
# A template is a program: it adds None to a string, splits by nothing, divides by a count, calls itself, or is hostile.


class ChatTemplate:
    """A template's text with the variables that every render gets.

    `variables` are the tokenizer's (`bos_token`, ...). `date` is what the template prints as today, by
    `strftime_now` or `date_string`; by default the day of construction. Raises ValueError where the text is no Jinja.
    """

    def __init__(self, text: str, variables: Mapping[str, str], date: Date | None = None) -> None:
        self.text = text
        asks_for_date = "strftime_now" in text or "date_string" in text
        self.date = (date or Date.today()) if asks_for_date else None
        self._variables: dict[str, Any] = dict(variables)
        if self.date is not None:
            self._variables |= {"strftime_now": self.date.strftime, "date_string": self.date.strftime("%d %b %Y")}
        try:
            self._compiled = _compiled(text)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from None
        self.has_generation_tags = bool(re.search(r"{%-?\s*generation\s*-?%}", text))

    def render(self, messages: Sequence[TemplateMessage], tools: Sequence[Any] = (), *, prompt: bool = False) -> str:
        """The text; with `prompt`, up to where the assistant begins to speak. Raises `Refused`."""
        with bounded():
            text: str = self._compiled.render(**self.context(messages, tools, prompt))
        return text

    def tagged_spans(self, messages: Sequence[TemplateMessage], tools: Sequence[Any] = ()) -> list[Span]:
        """Where the template's own `{% generation %}` tags are. Raises `Refused`."""
        with bounded():
            _, spans = _render_with_assistant_indices(self._compiled, **self.context(messages, tools, False))
        return [Span(start, end) for start, end in spans]

    @property
    def environment(self) -> jinja2.Environment:
        """Jinja's, as transformers makes it for chat templates."""
        return self._compiled.environment

    def context(self, messages: Sequence[TemplateMessage], tools: Sequence[Any], prompt: bool) -> dict[str, Any]:
        """What the template's names stand for."""
        return {
            "messages": list(messages),
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": prompt,
            **self._variables,
        }


def _compiled(text: str) -> Any:
    """As transformers compiles it, but that what was printed as JSON once is not encoded again: tools come with every render."""
    environment = _compile_jinja_template("").environment.overlay()  # what matters is whose environment it is
    environment.filters = {**environment.filters, "tojson": _Remembered(environment.filters["tojson"])}
    return environment.from_string(text)


def exact_key(value: Any) -> bytes:
    """Another for every other value of JSON's types, and for a list and a tuple; ValueError where any other type is in it.

    Dates, say, which come out of tables: other encoders make of them what they make of a text. (An array counts as its bytes.)
    """
    return marshal.dumps(value, 2)  # later versions of the format differ between equal values


class _Remembered:
    """A function of JSON-like values, and its latest results: what was asked for again is kept longer."""

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
    """Turns whatever a template does wrong, also for ever, into a refusal."""
    try:
        with _alarm():
            yield
    except TimeoutError:
        raise Refused("template takes too long", f"it did not end within {SECONDS:.0f} s") from None
    except Refused:
        raise
    except _ERRORS as error:
        raise Refused("template raises", " ".join(str(error).split()) or type(error).__name__) from None


@contextmanager
def bounded_memory() -> Iterator[None]:
    """While a template is met for the first time: one that allocates without end meets MemoryError, not the machine's end."""
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
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
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
    raise TimeoutError


def template_message(message: Message) -> TemplateMessage:
    """The dictionary that chat templates expect. `content` is always text: many templates print None as 'None'."""
    result: TemplateMessage = {"role": message.role, "content": message.content or ""}
    if message.reasoning:
        result |= dict.fromkeys(REASONING_KEYS, message.reasoning)
    if message.tool_calls:
        # Mistral wants ids of nine letters and digits; where the data has none, any will do.
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
