"""Count the work of a chat template, so that a row is refused for too much work and never for too
much time.

A template is a program of unknown origin. Each render has a budget of work units: a pass of a loop
costs 1 unit, a call 16 units, and copied text 1 unit per 1,024 characters. Values have a limit of
size, which is checked before the value is made.

Example: `{% for i in range(99999) %}` nested three times is refused after 10,000,000 units, and
`{{ 'x' * 10**13 }}` at once, on every machine alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import GeneratorType
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sftstream.records import Refused

MOST_WORK = 10_000_000
"""Steps of a render: a few seconds. A conversation of 1,000 messages takes some 100,000."""
MOST_CHARACTERS = 1 << 26
"""Size of a value: characters of a text, or elements of a list."""
_MOST_BITS = 1 << 16
_COPIED = 1024
"""Characters copied in one unit of work."""
_CALL, _NODE = 16, 32
"""Work units of a call; and the characters added for each element of a nested value, when the size
of the printed value is estimated."""
_WIDTH = re.compile(r"\d{7}|\*")

_GROWING = {
    *("*", "%", "join", "replace", "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap"),
    *("format", "format_map", "batch", "slice", "round", "translate", "tojson", "pprint", "string"),
    *("xmlattr", "urlize"),
}
"""Operators, methods and filters whose result may be far longer than their arguments."""
_NESTED = {"join", "tojson", "pprint", "string", "format", "%", "xmlattr"}
"""The growing ones that print the elements of a list."""
_SIZED: tuple[Any, ...] = (str, list, tuple, dict, range, set, type({}.keys()), type({}.values()), type({}.items()))
_LAZY: tuple[Any, ...] = (GeneratorType, type(reversed([])), type(reversed({})), type(iter([])), map, filter, zip)


class _Meter:
    """The work units of a render."""

    def __init__(self) -> None:
        self.work = 0

    def count(self, work: int) -> None:
        self.work += work
        if self.work > MOST_WORK:
            raise Refused(
                "template does too much",
                f"it took more than {MOST_WORK:,} units of work on this conversation; "
                "simplify the loops of the template",
            )


_METER: ContextVar[_Meter] = ContextVar("meter")


@contextmanager
def metered() -> Iterator[None]:
    """Limit the work of all renders in the body of this context. More work raises `Refused`."""
    token = _METER.set(_Meter())
    try:
        yield
    finally:
        _METER.reset(token)


def _count(work: int) -> None:
    if meter := _METER.get(None):
        meter.count(work)


def _require_size(size: int) -> None:
    if size > MOST_CHARACTERS:
        raise Refused("template does too much", f"it makes a value of size {size:,}, above {MOST_CHARACTERS:,}")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that counts work, and limits the size of each value.

    Jinja computes constants such as `'x' * 10**9` when it compiles a template, but leaves the
    operators in `intercepted_binops` to each render.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def call_binop(self, _context: Any, operator: str, left: Any, right: Any) -> Any:
        """Return the result of an operator of a template."""
        if operator == "+":  # makes at most the sum of two sizes
            return _checked(left + right)
        _require_affordable(operator, (left, right))
        return self.binop_table[operator](left, right)

    def call(__self: Any, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the result of a call in a template."""
        _count(_CALL)
        name = getattr(__obj, "__name__", "")
        if name in _GROWING:
            method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps `str.format`
            _require_affordable(name, (getattr(method, "__self__", None), *args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _EACH, [], [], None, None, lineno=loop.lineno)
        return tree


_EACH = "each"
"""Name of the filter around each loop's values; replaces no filter of Jinja."""


def bound(environment: ImmutableSandboxedEnvironment) -> None:
    """Make a sandbox a `BoundedEnvironment`, with a limit on each filter."""
    environment.__class__ = BoundedEnvironment
    limited = {name: _limited(name, environment.filters[name]) for name in _GROWING & environment.filters.keys()}
    environment.filters = {**environment.filters, **limited, _EACH: _each}
    environment.concat = _joined


def compiled_names() -> Mapping[str, Callable[..., Any]]:
    """Return the functions that a compiled template calls by global names: for `~` and `{{ }}`."""
    return {"str_join": _joined_values, "markup_join": _joined_values, "str": _text}


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps the marks that tell Jinja to pass its context
    def limited(*args: Any, **kwargs: Any) -> Any:
        _require_affordable(name, (*args, *kwargs.values()))
        return function(*args, **kwargs)

    return limited


def _each(values: Any) -> Any:
    """Return the values of a loop, counted."""
    kind = type(values)
    if kind in _SIZED:
        _count(len(values) + 1)
        return values
    return _counted(values) if kind in _LAZY else values


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _count(1)
        yield value


def _require_affordable(name: str, values: Sequence[Any]) -> None:
    """Raise `Refused` if an operation would take too much work, or its result be too large."""
    size, work = 1, 1
    for index, value in enumerate(values):
        kind = type(value)
        if kind is str:
            size *= len(value) + 1
            work += len(value) // _COPIED
        elif kind in (list, tuple, dict):
            size *= (_printed(value) if name in _NESTED else len(value)) + 1
            work += len(value) // _COPIED
        elif kind is int and (index or name == "*"):  # a width; the first value is what is printed
            size *= abs(value) + 1
    _count(work)
    if name == "**" or (name == "*" and type(values[0]) is type(values[1]) is int):
        _require_number(name, *values)
    elif size > MOST_CHARACTERS:
        _require_size(_exact(name, values, size))
    elif name in ("%", "format", "format_map") and any(_has_width(value) for value in values):
        raise Refused("template does too much", "it formats a text with a width of millions")


def _require_number(name: str, left: Any, right: Any) -> None:
    if type(left) is int and type(right) is int:
        bits = left.bit_length() * right if name == "**" else left.bit_length() + right.bit_length()
        if bits > _MOST_BITS:
            raise Refused("template does too much", f"it makes a number of {bits:,} bits")


def _exact(name: str, values: Sequence[Any], bound: int) -> int:
    """Return the length of a replaced or joined text, or `bound` for other operations."""
    texts = [value for value in values if type(value) is str]
    if name == "replace" and len(texts) == 3:
        text, old, new = texts
        return len(text) + (text.count(old) if old else len(text) + 1) * len(new)
    lists = [value for value in values if type(value) in (list, tuple)]
    if name == "join" and len(lists) == 1:
        return _printed(lists[0]) + len(lists[0]) * sum(map(len, texts))
    return bound


def _has_width(value: Any) -> bool:
    return type(value) is str and _WIDTH.search(value) is not None and ("%" in value or "{" in value)


def _printed(value: Any) -> int:
    """Return roughly the number of characters of a printed nested value. Counting stops above
    `MOST_CHARACTERS`, so that a larger result is only a lower bound."""
    size, waiting = 0, [value]
    while waiting and size <= MOST_CHARACTERS:
        inner = waiting.pop()
        kind = type(inner)
        size += _NODE
        if kind is str:
            size += len(inner)
        elif kind is dict:
            waiting += inner.keys()
            waiting += inner.values()
        elif kind in (list, tuple):
            waiting += inner
    return size


def _text(value: Any = "") -> str:
    """Return a printed value."""
    if type(value) is str:
        return value
    if type(value) in (list, tuple, dict):
        _require_size(_printed(value))
    return str(value)


def _joined_values(values: Iterable[Any]) -> str:
    return str(_checked("".join(map(_text, values))))  # makes at most the sum of a few sizes


def _checked(value: Any) -> Any:
    """Return the value if its size is within the limit; raises `Refused` if it is larger. For
    values that were cheap to compute, whatever their size."""
    if type(value) in (str, list, tuple) and len(value) > _COPIED:
        _require_size(len(value))
        _count(len(value) // _COPIED)
    return value


def _joined(pieces: Iterable[str]) -> str:
    """Return the pieces of a template's output as one text."""
    pieces = list(pieces)
    size = sum(map(len, pieces))
    _require_size(size)
    _count(size // _COPIED + 1)
    return "".join(pieces)
