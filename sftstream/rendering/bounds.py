"""Limit the work of a chat template by a count of operations, not by time.

A template is a program of unknown origin. Each render has a budget of 10,000,000 work units: a pass
of a loop costs 1 unit, a call 16 units, and copied text 1 unit per 1,024 characters. The size of a
value is also limited. An operation whose result may be far longer than its operands is checked
before it runs; a sum or a text joined by `~` is checked afterwards.

Example: three nested loops over `range(99999)` are refused after 10,000,000 units, and
`{{ 'x' * 10**13 }}` is refused at once. A count, unlike a time limit, refuses the same rows on
every machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from functools import wraps
from types import GeneratorType
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sftstream.refused import Refused

MOST_WORK = 10_000_000
"""Largest number of work units of a render, reached after a few seconds.

Published templates need up to 40,000 units for a conversation of 1,000 short messages.
"""
MOST_CHARACTERS = 1 << 26
"""Largest size of a value: characters of a text, or elements of a list."""
_MOST_BITS = 1 << 16
"""Largest number of bits of the result of `a * b` or `a ** b`, for integers a and b."""
_COPIED = 1024
"""Number of copied characters that cost one work unit."""
_CALL, _NODE = 16, 32
"""`_CALL` is the number of work units of a call. `_NODE` is a number of characters: the estimate of
a nested value's printed size adds `_NODE` for each list, dictionary and element."""
_WIDTH = re.compile(r"%(\([^)]*\))?[-+ #0]*\d*\.?(\d{7}|\*)|\{[^{}]*:[^{}]*(\d{7}|\{)")
"""Matches a format specifier whose width has 7 digits or more, or comes from a value: "%9999999d",
"%*d", "{:9999999}", "{:{}}"."""

_GROWING = {
    *("*", "%", "join", "replace", "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap"),
    *("format", "format_map", "batch", "slice", "round", "translate", "tojson", "pprint", "string"),
    *("xmlattr", "urlize"),
}
"""Operators, methods and filters whose result may be far longer than their arguments."""
_NESTED = {"join", "tojson", "pprint", "string", "format", "%", "xmlattr"}
"""Members of `_GROWING` that print the elements of a list."""
_SIZED: tuple[Any, ...] = (str, list, tuple, dict, range, set, type({}.keys()), type({}.values()), type({}.items()))
_UNORDERED: tuple[Any, ...] = (set, frozenset, type({}.keys()), type({}.items()))
_LAZY: tuple[Any, ...] = (GeneratorType, type(reversed([])), type(reversed({})), type(iter([])), map, filter, zip)


class _Meter:
    """A counter of the work units spent by a render."""

    def __init__(self) -> None:
        self.work = 0

    def count(self, work: int) -> None:
        self.work += work
        if self.work > MOST_WORK:
            raise Refused(
                "template does too much",
                f"a render needs more than {MOST_WORK:,} units of work (1 for each pass of a loop, {_CALL} for each "
                "call); simplify the loops of the template",
            )


_METER: ContextVar[_Meter] = ContextVar("meter")


def start_meter() -> Token[_Meter]:
    """Limit the work of all renders until `stop_meter` to `MOST_WORK` units together.

    More work raises `Refused`. Return the token for `stop_meter`.
    """
    return _METER.set(_Meter())


def stop_meter(token: Token[_Meter]) -> None:
    """End the limit that `start_meter` began."""
    _METER.reset(token)


_SIZES: ContextVar[dict[int, tuple[Any, int]] | None] = ContextVar("sizes", default=None)
"""Objects with their estimated sizes, by `id`; a stored object keeps its `id`."""


@contextmanager
def known_sizes() -> Iterator[None]:
    """Estimate the size of each object once inside the body.

    The body may not change an object. A template cannot change one either.
    """
    token = _SIZES.set({})
    try:
        yield
    finally:
        _SIZES.reset(token)


def _count(work: int) -> None:
    if meter := _METER.get(None):
        meter.count(work)


def _require_size(size: int) -> None:
    if size > MOST_CHARACTERS:
        raise Refused("template does too much", f"it makes a value of size {size:,}, above {MOST_CHARACTERS:,}")


class _Generator(CodeGenerator):
    """Writes sums as sums of Python: `{{ a + b + c }}` becomes `environment.sized((a + b + c))`.

    A sum is only as long as its operands together, so one check of the whole sum is enough. Jinja's
    sandbox calls a method for each `+`, which takes up to a quarter of the time of a render.
    """

    def visit_Add(self, node: nodes.Add, frame: Frame) -> None:
        self.write("environment.sized(")
        self._write_sum(node, frame)
        self.write(")")

    def _write_sum(self, node: nodes.Expr, frame: Frame) -> None:
        if not isinstance(node, nodes.Add):
            self.visit(node, frame)
            return
        self.write("(")
        self._write_sum(node.left, frame)
        self.write(" + ")
        self._write_sum(node.right, frame)
        self.write(")")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that counts the work of each render, and limits the size of values.

    Jinja computes constants when it compiles a template. Constants with an operator in
    `intercepted_binops`, such as `'x' * 10**9`, are an exception: each render computes them.
    """

    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "-", "*", "**", "%"])

    def call_binop(self, _context: Any, operator: str, left: Any, right: Any) -> Any:
        """Return the result of an operator of a template; raises `Refused` if it is too large."""
        if operator == "-":
            if type(left) in _UNORDERED:  # the difference is a set, whose order differs in each process
                raise Refused("template raises", "it subtracts from the keys of a dictionary; filter them in a loop")
            return left - right
        _require_affordable(operator, (left, right))
        return self.binop_table[operator](left, right)

    @staticmethod
    def sized(value: Any) -> Any:
        """Return the value of a sum in a template; raises `Refused` if it is too large."""
        return value if type(value) is str and len(value) <= _COPIED else _checked(value)

    def call(__self: Any, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the result of a call in a template; raises `Refused` if it is too large."""
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
"""Name of the filter that counts the passes of a loop. Jinja has no filter of this name."""


def bound(environment: BoundedEnvironment) -> None:
    """Limit the filters in `_GROWING`, the passes of loops, and the size of the printed text."""
    limited = {name: _limited(name, environment.filters[name]) for name in _GROWING & environment.filters.keys()}
    environment.filters = {**environment.filters, **limited, _EACH: _each}
    environment.concat = _joined


def compiled_names() -> Mapping[str, Callable[..., Any]]:
    """Return the limited functions that replace globals of a compiled template, by name.

    The compiled code of `~` and `{{ }}` calls these globals.
    """
    return {"str_join": _joined_values, "markup_join": _joined_values, "str": _text}


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps the attributes by which Jinja passes its context
    def limited(*args: Any, **kwargs: Any) -> Any:
        _require_affordable(name, (*args, *kwargs.values()))
        return function(*args, **kwargs)

    return limited


def _each(values: Any) -> Any:
    """Return the values of a loop, and count one work unit for each value.

    The elements of an iterator are counted when the loop reads them.
    """
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
    """Raise `Refused` if an operation would need too much work, or if its result may be too large.

    `values` are the operands; for a filter or method, the value that it applies to, followed by the
    arguments.
    """
    size, work = 1, 1
    for index, value in enumerate(values):
        kind = type(value)
        if kind is str:
            size *= len(value) + 1
            work += len(value) // _COPIED
        elif kind in (list, tuple, dict):
            size *= (_printed(value) if name in _NESTED else len(value)) + 1
            work += len(value) // _COPIED
        elif kind is int and (index or name == "*"):  # a width or a repeat count
            size *= abs(value) + 1
    _count(work)
    if name == "**" or (name == "*" and type(values[0]) is type(values[1]) is int):
        _require_number(name, *values)
    elif size > MOST_CHARACTERS:
        _require_size(_exact(name, values, size))
    elif name in ("%", "format", "format_map") and _has_width(values[0]):
        raise Refused(
            "template does too much",
            "it formats a text with a width of 7 digits or more, or with a width from a value",
        )


def _require_number(name: str, left: Any, right: Any) -> None:
    if type(left) is int and type(right) is int:
        bits = left.bit_length() * right if name == "**" else left.bit_length() + right.bit_length()
        if bits > _MOST_BITS:
            raise Refused("template does too much", f"it makes a number of {bits:,} bits, above {_MOST_BITS:,}")


def _exact(name: str, values: Sequence[Any], bound: int) -> int:
    """Return the length of the result of `replace` or `join`, or `bound` for other operations.

    For `join`, the length of the printed elements is an estimate.
    """
    texts = [value for value in values if type(value) is str]
    if name == "replace" and len(texts) == 3:
        text, old, new = texts
        return len(text) + (text.count(old) if old else len(text) + 1) * len(new)
    lists = [value for value in values if type(value) in (list, tuple)]
    if name == "join" and len(lists) == 1:
        return _printed(lists[0]) + len(lists[0]) * sum(map(len, texts))
    return bound


def _has_width(text: Any) -> bool:
    return type(text) is str and _WIDTH.search(text) is not None


def _printed(value: Any) -> int:
    """Return an estimate of the number of characters of a nested value if it is printed.

    The estimate stops as soon as it exceeds `MOST_CHARACTERS`. Inside `known_sizes`, the size of an
    object is estimated once, since each render of a conversation prints the same tools.
    """
    known = _SIZES.get()
    if known is None:
        return _estimate(value)
    if (found := known.get(id(value))) is None:
        found = known[id(value)] = value, _estimate(value)
    return found[1]


def _estimate(value: Any) -> int:
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
    """Return a value as text; raises `Refused` if the text of a nested value would be too long."""
    if type(value) is str:
        return value
    if type(value) in (list, tuple, dict):
        _require_size(_printed(value))
    return str(value)


def _joined_values(values: Iterable[Any]) -> str:
    return str(_checked("".join(map(_text, values))))  # only as long as the values together


def _checked(value: Any) -> Any:
    """Return a computed value; raises `Refused` if it is larger than the limit.

    For values that are only as long as their operands together, so that they may be computed before
    the check.
    """
    if type(value) in (str, list, tuple) and len(value) > _COPIED:
        _require_size(len(value))
        _count(len(value) // _COPIED)
    return value


def _joined(pieces: Iterable[str]) -> str:
    """Return the pieces of a template's output as one text; raises `Refused` if it is too long."""
    pieces = list(pieces)
    size = sum(map(len, pieces))
    _require_size(size)
    _count(size // _COPIED + 1)
    return "".join(pieces)
