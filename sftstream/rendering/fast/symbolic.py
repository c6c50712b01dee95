"""Run a chat template on symbolic strings; record its output and conditions.

A traced conversation holds symbolic objects in place of texts, tool definitions and call
arguments. Each question that the template asks about a symbolic object (`in`, `==`, `startswith`,
truth) is recorded with the answer as a `Guard`; each printed object is recorded as a `ValueRef`.
An operation without a recording raises `Untraceable`, the trace ends without a result, and the
conversation is rendered by the template itself. A trace is therefore never a guess: for every
conversation of equal shape and equal answers the template prints the recorded pieces.

Example, run on a conversation of one message with the content " ax ":

    template   {% for m in messages %}[{% if 'x' in m.content %}!{% endif %}{{ m.content | trim }}]
               {%- endfor %}
    messages   [{"role": "user", "content": SymbolicStr(recorder, ValueRef(0), " ax ")}]

    pieces     ("[!", ValueRef(0, (("strip", (None,)),)), "]")
    guards     (Guard(ValueRef(0), "__contains__", ("x",), answer=True),)

Read: if value 0 contains "x", the template prints "[!", value 0 stripped of white space, "]". The
content "box " fulfils the guard and gives "[!box]" without a run of the template. The content "no"
does not fulfil the guard; the trace says nothing about "no".

The compiled module's names. Jinja compiles a template into a Python module; the module's code calls
`str` on every printed value, `str_join` (or `markup_join`) for `~`, and `environment.concat` for
macros and set blocks. The builtins must return real strings and would lose the symbolic objects.
`TracedTemplate` therefore compiles a second copy of the template and writes `_to_str` and `_join`
into the globals of the copy under the names `str`, `str_join` and `markup_join`; module globals
come before builtins. The first copy, used for all real renders, stays unchanged. Three guards
cover a Jinja release with another code generator: a real `str` raises `Untraceable` on a symbolic
object; `RenderCache` keeps a plan only if the plan reproduces the template's own text and spans;
and of the conversations rendered from plans, 1 in 4,096 is also rendered by the template and
compared, a difference being an error.

The technique is concolic execution along the executed path: Godefroid, Klarlund, Sen, "DART:
Directed Automated Random Testing", PLDI 2005, https://doi.org/10.1145/1065010.1065036.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jinja2 import Template

from sftstream.records import Refused
from sftstream.rendering.template import ChatTemplate, TemplateMessage, bounded

Op = tuple[str, tuple[Any, ...]]
"""A `str` method with positional arguments, or `tojson` with the items of the keyword arguments.

Examples: `("strip", (None,))`, `("tojson", (("indent", 2),))`.
"""


class ValueRef(NamedTuple):
    """A conversation's value after some operations, value 0 stripped for example."""

    number: int
    """Index into the conversation's list of values."""
    ops: tuple[Op, ...] = ()
    """Operations in order of application."""


class Guard(NamedTuple):
    """A question and its answer: `bool(value.method(*arguments)) is answer`."""

    ref: ValueRef
    method: str
    arguments: tuple[Any, ...]
    answer: bool


class Trace(NamedTuple):
    """The pieces printed in one run, valid for all values that fulfil the guards."""

    pieces: tuple[str | ValueRef, ...]
    guards: tuple[Guard, ...]


class Untraceable(BaseException):
    """An operation that cannot be recorded.

    Derives from BaseException because Jinja answers some questions by catching Exception.
    """


class _Symbolic:
    """Base class that refuses every operation; subclasses add the recorded operations.

    Conversion to a real string is refused as well. All data attributes begin with an underscore,
    since Jinja's sandbox hides underscored names from templates.
    """

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise Untraceable

    __str__ = __repr__ = __format__ = __bytes__ = __len__ = __iter__ = __getitem__ = __hash__ = _refuse
    __int__ = __float__ = __index__ = __complex__ = __contains__ = __reversed__ = __mod__ = __mul__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __bool__ = __add__ = __radd__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Jinja looks for protocols of its own, `__html__` for example
            raise AttributeError(name)
        raise Untraceable


class SymbolicStr(_Symbolic):
    """A string unknown to the template; questions are answered from the traced `value`."""

    def __init__(self, recorder: Recorder, ref: ValueRef, value: str) -> None:
        self._recorder, self._ref, self._value = recorder, ref, value

    def _ask(self, method: str, *arguments: Any) -> bool:
        return self._recorder.ask(self._ref, self._value, method, arguments)

    def _apply(self, method: str, *arguments: Any) -> SymbolicStr:
        ref = ValueRef(self._ref.number, (*self._ref.ops, (method, arguments)))
        return SymbolicStr(self._recorder, ref, getattr(self._value, method)(*arguments))

    def __bool__(self) -> bool:
        return self._ask("__len__")

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, str) and self._ask("__eq__", other)) or _equals_no_string(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = _Symbolic.__hash__

    def __contains__(self, part: object) -> bool:
        return self._ask("__contains__", part) if isinstance(part, str) else self._refuse()

    def __add__(self, other: object) -> SymbolicConcat:
        return SymbolicConcat([self]) + other

    def __radd__(self, other: object) -> SymbolicConcat:
        return other + SymbolicConcat([self])

    def startswith(self, part: str | tuple[str, ...]) -> bool:
        return self._ask("startswith", part)

    def endswith(self, part: str | tuple[str, ...]) -> bool:
        return self._ask("endswith", part)

    def strip(self, characters: str | None = None) -> SymbolicStr:
        return self._apply("strip", characters)

    def lstrip(self, characters: str | None = None) -> SymbolicStr:
        return self._apply("lstrip", characters)

    def rstrip(self, characters: str | None = None) -> SymbolicStr:
        return self._apply("rstrip", characters)

    def split(self, separator: str, _most: int = -1) -> list[SymbolicStr]:
        """Return the whole string in a list if the separator is absent; untraceable otherwise."""
        return [self] if isinstance(separator, str) and separator not in self else self._refuse()

    rsplit = split

    def replace(self, old: str, _new: str) -> SymbolicStr:
        """Return the string unchanged if `old` is absent; untraceable otherwise."""
        return self if isinstance(old, str) and old not in self else self._refuse()


class SymbolicConcat(_Symbolic):
    """Strings and symbolic strings joined by the template, in order of print."""

    def __init__(self, parts: Iterable[Any]) -> None:
        self._parts = list(parts)

    def __add__(self, other: object) -> SymbolicConcat:
        return SymbolicConcat([*self._parts, *_parts(other)])

    def __radd__(self, other: object) -> SymbolicConcat:
        return SymbolicConcat([*_parts(other), *self._parts])

    def __bool__(self) -> bool:
        return any(isinstance(part, str) and part for part in self._parts) or any(map(bool, self._parts))

    def strip(self, characters: str | None = None) -> SymbolicConcat:
        return self.lstrip(characters).rstrip(characters)

    def lstrip(self, characters: str | None = None) -> SymbolicConcat:
        return SymbolicConcat(_strip_first(self._parts, lambda part: part.lstrip(characters)))

    def rstrip(self, characters: str | None = None) -> SymbolicConcat:
        return SymbolicConcat(_strip_first(self._parts[::-1], lambda part: part.rstrip(characters))[::-1])


class SymbolicLength(_Symbolic):
    """The length of a symbolic string; only comparison with 0 is recorded."""

    def __init__(self, measured: SymbolicStr) -> None:
        self._measured = measured

    def __bool__(self) -> bool:
        return bool(self._measured)

    def __eq__(self, other: object) -> bool:
        return not self if other == 0 else self._refuse()

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __gt__(self, other: object) -> bool:
        return bool(self) if other == 0 else self._refuse()

    __hash__ = _Symbolic.__hash__


class SymbolicJson(_Symbolic):
    """A tool definition or call arguments, printed whole as JSON or not at all."""

    def __init__(self, recorder: Recorder, ref: ValueRef, value: Any) -> None:
        self._recorder, self._ref, self._value = recorder, ref, value

    def __bool__(self) -> bool:
        return self._recorder.ask(self._ref, self._value, "__len__", ())


class Recorder:
    """The guards of one trace, in order of the questions; a repeated question is recorded once."""

    def __init__(self) -> None:
        self.guards: dict[Guard, None] = {}

    def ask(self, ref: ValueRef, value: Any, method: str, arguments: tuple[Any, ...]) -> bool:
        """Answer `bool(value.method(*arguments))` and record the question with the answer."""
        answer = bool(getattr(value, method)(*arguments))
        self.guards[Guard(ref, method, arguments, answer)] = None
        return answer


class TracedTemplate:
    """A second compilation of a chat template that prints and joins symbolic strings.

    The module docstring explains the names written into the compiled module.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        environment = template.environment.overlay()
        environment.concat = _join
        filters = {
            "trim": _trim,
            "string": _to_str,
            "tojson": _to_json(environment),
            "length": _length,
            "count": _length,
        }
        environment.filters = {**environment.filters, **filters}
        environment.tests = {**environment.tests, **{name: _is(name, environment) for name in ("string", "mapping")}}
        environment.tests |= {name: _is_iterable(environment.tests[name]) for name in ("iterable", "sequence")}
        code = environment.compile(template.text)
        self._compiled = Template.from_code(environment, code, environment.make_globals(None))
        # Module globals come before builtins: `{{ }}` calls `str`, `~` calls a join.
        self._compiled.root_render_func.__globals__.update(str=_to_str, str_join=_join, markup_join=_join)

    def trace(
        self, recorder: Recorder, messages: Sequence[TemplateMessage], tools: Sequence[Any], *, prompt: bool = False
    ) -> Trace | None:
        """Run the template on messages and tools that hold symbolic objects of `recorder`.

        Return None if an operation cannot be recorded or the template raises.
        """
        context = self._compiled.new_context(self._template.context(messages, tools, prompt))
        try:
            with bounded():
                printed = [part for item in self._compiled.root_render_func(context) for part in _parts(item)]
        except (Untraceable, Refused):
            return None
        return Trace(tuple(_merge(printed)), tuple(recorder.guards))


def _parts(item: object) -> list[Any]:
    if isinstance(item, SymbolicConcat):
        return item._parts
    if isinstance(item, str | SymbolicStr):
        return [item]
    raise Untraceable


def _strip_first(parts: Sequence[Any], strip: Callable[[Any], Any]) -> list[Any]:
    """Strip the first part; drop parts stripped to nothing and go on with the next part."""
    for index, part in enumerate(parts):
        if rest := strip(part):
            return [rest, *parts[index + 1 :]]
    return []


def _merge(parts: Iterable[Any]) -> list[str | ValueRef]:
    """Join neighbouring strings; replace each symbolic string by its reference."""
    result: list[str | ValueRef] = []
    for part in parts:
        if isinstance(part, SymbolicStr):
            result.append(part._ref)
        elif result and isinstance(result[-1], str):
            result[-1] += part
        else:
            result.append(part)
    return result


def _equals_no_string(other: object) -> bool:
    """Return False for anything but a symbolic object; comparing two symbolic strings cannot be
    recorded."""
    if isinstance(other, _Symbolic):
        raise Untraceable
    return False


def _to_str(value: object = "") -> Any:
    return value if isinstance(value, SymbolicStr | SymbolicConcat) else str(value)


def _join(items: Iterable[Any]) -> Any:
    parts = [part for item in items for part in _parts(_to_str(item)) if not isinstance(part, str) or part]
    if len(parts) == 1:  # a macro that prints one symbolic string returns an object that can be questioned
        return parts[0]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else SymbolicConcat(parts)


def _trim(value: Any, characters: str | None = None) -> Any:
    return _to_str(value).strip(characters)


def _length(value: Any) -> Any:
    return SymbolicLength(value) if isinstance(value, SymbolicStr) else len(value)


def _to_json(environment: Any) -> Callable[..., Any]:
    plain = environment.filters["tojson"]

    def to_json(value: Any, **options: Any) -> Any:
        if not isinstance(value, SymbolicStr | SymbolicJson):
            return plain(value, **options)
        ref = ValueRef(value._ref.number, (*value._ref.ops, ("tojson", tuple(options.items()))))
        return SymbolicStr(value._recorder, ref, plain(value._value, **options))

    return to_json


def _is(name: str, environment: Any) -> Callable[..., bool]:
    plain = environment.tests[name]
    kind = (SymbolicStr, SymbolicConcat) if name == "string" else SymbolicJson
    return lambda value: isinstance(value, kind) if isinstance(value, _Symbolic) else plain(value)


def _is_iterable(plain: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, _Symbolic) or plain(value)
