"""Render messages with the model's chat template, compiled once, with a fixed date and bounded
work."""

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
from jinja2 import meta, nodes
from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices

from sftstream.door import Door
from sftstream.records import REASONING_KEYS, Message, Refused, Span
from sftstream.rendering.bounds import bound, compiled_names, metered

TemplateMessage = dict[str, Any]

SECONDS = 60.0
"""Time limit for one render, in seconds; a long conversation takes a few milliseconds.

A render above the limit ends the run. The row is not refused, because a faster machine would accept
the same row.
"""
_LONGEST = 1 << 20
"""Largest number of characters of a template; published templates have up to 40,000."""

MEMORY = 256 << 20
"""Largest number of bytes that the process may allocate while a template is probed: 256 MiB."""

REMEMBERED = 2048
"""Number of results in one generation of `_JsonCache`, which keeps two generations."""

SET_BY_RENDERER = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "strftime_now", "date_string"}
    | {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
)
"""Names of template variables that only the renderer may set.

`ChatTemplate.set_by_renderer` also has the names of the tokenizer's further special tokens.
"""

# A template is a program: it may add None to a string, split a text at "", or divide by 0.
_RUNNING = Door("", error=lambda line: Refused("template raises", line.removeprefix(": ")))


class ChatTemplate:
    """A compiled chat template, with the variables that every render gets.

    `variables` come from the tokenizer: `{"bos_token": "<s>"}`. A template that prints today's date
    (with `strftime_now` or `date_string`) prints `date` instead; the default is the day on which
    the object is made. Raises ValueError if `text` is not valid Jinja or is too long.
    """

    def __init__(self, text: str, variables: Mapping[str, str], date: Date | None = None) -> None:
        self.text = text
        asks_for_date = "strftime_now" in text or "date_string" in text
        self.date = (date or Date.today()) if asks_for_date else None
        self._variables: dict[str, Any] = dict(variables)
        self.set_by_renderer = SET_BY_RENDERER | variables.keys()
        """Names of variables that `with_variables` refuses."""
        if self.date is not None:
            self._variables |= {"strftime_now": self.date.strftime, "date_string": self.date.strftime("%d %b %Y")}
        if len(text) > _LONGEST:
            raise ValueError(
                f"the chat template has {len(text):,} characters, above {_LONGEST:,}; use another template"
            )
        with Door("the chat template is not valid Jinja"):
            self._compiled = _compiled(text)
        self.variables: Mapping[str, Any] = {}
        """Variables from the config or a row, which every render gets too."""
        self.content_as_parts = False
        """True if a render passes the content "hi" as `[{"type": "text", "text": "hi"}]`."""
        self.has_generation_tags = bool(re.search(r"{%-?\s*generation\s*-?%}", text))

    def with_content_as_parts(self) -> ChatTemplate:
        """Return a copy of the template whose renders pass each content as a list.

        The content "hi" is passed as `[{"type": "text", "text": "hi"}]`.
        """
        result = copy.copy(self)
        result.content_as_parts = True
        return result

    def with_variables(self, variables: Mapping[str, Any]) -> ChatTemplate:
        """Return a copy of the template with further variables: `{"enable_thinking": False}`.

        Raises ValueError if only the renderer may set a variable, or if a value has no JSON form.
        """
        if not variables:
            return self
        for name, value in variables.items():
            if name in self.set_by_renderer:
                remedy = "set data.tokenizer.date" if name in ("date_string", "strftime_now") else "remove the variable"
                raise ValueError(f"the variable {name!r} is set by every render of a chat template; {remedy}")
            try:
                exact_key(value)
            except ValueError:
                raise ValueError(
                    f"the variable {name!r} = {value!r} is not a text, number, boolean, list or table; write it as a text"
                ) from None
        result = copy.copy(self)
        result.variables = {**self.variables, **variables}
        return result

    @property
    def unset_variables(self) -> tuple[str, ...]:
        """Names of the variables that the template reads, and that nothing sets, in sorted order.

        A variable that the template itself assigns is listed only if the template also asks whether
        it is defined: `{% if enable_thinking is not defined %}{% set enable_thinking = true %}`.
        """
        tree = self.environment.parse(self.text)
        names = list(tree.find_all(nodes.Name))
        assigned = {name.name for name in names if name.ctx != "load"}
        questions = [test for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined")]
        questions += [call for call in tree.find_all(nodes.Filter) if call.name in ("default", "d")]
        asked = {question.node.name for question in questions if isinstance(question.node, nodes.Name)}
        read = meta.find_undeclared_variables(tree) - (assigned - asked)
        return tuple(sorted(read - self.set_by_renderer - self.variables.keys()))

    def render(self, messages: Sequence[TemplateMessage], tools: Sequence[Any] = (), *, prompt: bool = False) -> str:
        """Return the rendered text; with `prompt`, the text ends with the generation prompt.

        Raises `Refused` if the template raises an error or does too much work, and RuntimeError if
        the render exceeds the time limit.
        """
        with bounded():
            text: str = self._compiled.render(**self.context(messages, tools, prompt))
        return text

    def tagged_spans(self, messages: Sequence[TemplateMessage], tools: Sequence[Any] = ()) -> list[Span]:
        """Return the spans printed inside `{% generation %}` blocks; raises `Refused`."""
        with bounded():
            _, spans = _render_with_assistant_indices(self._compiled, **self.context(messages, tools, False))
        return [Span(start, end) for start, end in spans]

    @property
    def environment(self) -> jinja2.Environment:
        """The sandboxed Jinja environment of the template, as described at `_compiled`."""
        return self._compiled.environment

    def context(self, messages: Sequence[TemplateMessage], tools: Sequence[Any], prompt: bool) -> dict[str, Any]:
        """Return all variables that the template gets for a render."""
        if self.content_as_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        return {
            "messages": list(messages),
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": prompt,
            **self._variables,
            **self.variables,
        }


def _compiled(text: str) -> Any:
    """Compile the template in the Jinja environment of transformers, with three changes.

    `tojson` gets a cache, since conversations of one source often share tool definitions. `random`
    and `lipsum` are removed, since their output differs in each process. The work of a render is
    counted (see `bounds`).
    """
    environment = _compile_jinja_template("").environment.overlay()  # "": only the environment is needed
    filters = {name: function for name, function in environment.filters.items() if name != "random"}
    environment.filters = {**filters, "tojson": _JsonCache(environment.filters["tojson"])}
    environment.globals = {name: value for name, value in environment.globals.items() if name != "lipsum"}
    bound(environment)
    compiled = environment.from_string(text)
    compiled.root_render_func.__globals__.update(compiled_names())
    return compiled


def exact_key(value: Any) -> bytes:
    """Return a key that differs for any two different JSON values.

    1, 1.0, True and "1" have four different keys; a list and a tuple of equal items have different
    keys. A NumPy array has the key of its bytes. Raises ValueError if the value contains an object
    that `marshal` does not know, for example a date; a JSON encoder would return the same key for a
    date and its text.
    """
    return marshal.dumps(value, 2)  # versions 3 and 4 may encode equal values differently


class _JsonCache:
    """A function with a cache of its results, keyed by `exact_key` of the arguments.

    The cache holds a current and an earlier generation, each of up to `REMEMBERED` results. Once
    the current generation is full, it replaces the earlier one, and an empty generation begins. A
    result found in the earlier generation is copied to the current one.
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
    """Raise `Refused` if the template raises an error or does too much work inside the body.

    Raises RuntimeError, which ends a run, if the body exceeds the time limit of `SECONDS`.
    """
    with _RUNNING, _alarm(), metered():
        yield


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Let the process allocate at most `MEMORY` more bytes of address space inside the body.

    A template that needs more raises MemoryError before it exhausts the machine's memory.
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
    # Python delivers signals to the main thread only, so other threads render without a time limit.
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
        # Mistral requires an id of nine letters and digits. A call without an id gets a new id.
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
