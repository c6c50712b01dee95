"""Run a chat template on symbolic strings; record what the template prints and asks.

In a traced conversation, symbolic objects replace the values: texts, tool definitions and call
arguments. Each question that the template asks about a symbolic object (`in`, `==`, `startswith`,
truth) is recorded with its answer as a `Guard`. Each printed object is recorded as a `ValueRef`. An
operation that cannot be recorded raises `Untraceable`; the trace then ends without a result, and
the conversation gets no plan. A trace is therefore never a guess: for every conversation of the
same shape with the same answers, the template prints the recorded pieces.

Example, run on a conversation of one message with the content " ax ":

    template   {% for m in messages %}[{% if 'x' in m.content %}!{% endif %}{{ m.content | trim }}]
               {%- endfor %}
    messages   [{"role": "user", "content": SymbolicStr(recorder, ValueRef(0), " ax ")}]

    pieces     ("[!", ValueRef(0, (("strip", (None,)),)), "]")
    guards     (Guard(ValueRef(0), "__contains__", ("x",), answer=True),)

The trace reads: if value 0 contains "x", the template prints "[!", then value 0 stripped of white
space, then "]". The content "box " fulfils the guard, so the output is "[!box]" without a run of
the template. The content "no" does not fulfil the guard; the trace says nothing about "no".

How symbolic objects survive printing. Jinja compiles a template into a Python module. The module
calls `str` on every printed value, `str_join` or `markup_join` for the operator `~`, and
`environment.concat` for macros and set blocks. The builtin `str` must return a real string and
would lose a symbolic object. `TracedTemplate` therefore compiles a second copy of the template and
sets globals of the copy's module: `str` to `_to_str`, `str_join` and `markup_join` to `_join`.
Python looks names up in the module's globals before the builtins. The first copy, used for all
real renders, keeps its own globals.

A later Jinja release may generate other code. Three checks prevent wrong text in that case:

- the builtin `str` raises `Untraceable` on a symbolic object;
- `RenderCache` keeps a plan only if it prints the text and the spans of the real render;
- of the conversations rendered from plans, 1 in 4,096 is also rendered by the template, and a
  difference is an error.

The technique is known as concolic execution, here along one path: Godefroid, Klarlund, Sen, "DART:
Directed Automated Random Testing", PLDI 2005, https://doi.org/10.1145/1065010.1065036.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jinja2 import Template

from sftstream.records import Refused
from sftstream.rendering.limits import Bounded
from sftstream.rendering.template import ChatTemplate, TemplateMessage

Op = tuple[str, tuple[Any, ...]]
"""An operation on a value: the name of a `str` method and its arguments, or a call of `tojson`.

`("strip", (None,))` is `value.strip(None)`; `("tojson", (("indent", 2),))` is
`value | tojson(indent=2)`.
"""


NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})


class ValueRef(NamedTuple):
    """A value of the conversation after some operations, for example value 0 after `strip`."""

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
    """The pieces printed in one run of the template, with the guards that make the run valid."""

    pieces: tuple[str | ValueRef, ...]
    """Texts of the template and references to printed values, in text order."""
    guards: tuple[Guard, ...]
    """The template's questions with their answers, in the order of the first asking."""


class Untraceable(BaseException):
    """Raised by an operation on a symbolic object that cannot be recorded.

    Derives from BaseException, since Jinja catches Exception to answer tests like `is iterable`.
    """


class _Symbolic:
    """Base class of symbolic objects: every operation raises `Untraceable`, also `str(self)`.

    Subclasses add the operations that are recorded. All data attributes begin with an underscore,
    because Jinja's sandbox hides such names from templates.
    """

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise Untraceable

    __str__ = __repr__ = __format__ = __bytes__ = __len__ = __iter__ = __getitem__ = __hash__ = _refuse
    __int__ = __float__ = __index__ = __complex__ = __contains__ = __reversed__ = __mod__ = __mul__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __bool__ = __add__ = __radd__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Jinja looks for optional methods, for example `__html__`
            raise AttributeError(name)
        raise Untraceable


class SymbolicStr(_Symbolic):
    """A symbolic object for a text.

    `value`, the text in the traced conversation, is only used to answer questions.
    """

    def __init__(self, recorder: Recorder, ref: ValueRef, value: str) -> None:
        self._recorder, self._ref, self._value = recorder, ref, value

    def _ask(self, method: str, *arguments: Any) -> bool:
        return self._recorder.ask(self._ref, self._value, method, arguments)

    def _apply(self, method: str, *arguments: Any) -> SymbolicStr:
        ref = ValueRef(self._ref.number, (*self._ref.ops, (method, arguments)))
        return type(self)(self._recorder, ref, getattr(self._value, method)(*arguments))

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
        """Return a list with the whole string as its only item if the separator is absent; else
        raise `Untraceable`."""
        return [self] if isinstance(separator, str) and separator not in self else self._refuse()

    rsplit = split

    def replace(self, old: str, _new: str) -> SymbolicStr:
        """Return the string unchanged if `old` is absent; raises `Untraceable` if not."""
        return self if isinstance(old, str) and old not in self else self._refuse()


class SymbolicAnswer(SymbolicStr):
    """A symbolic object for a text that an assistant says.

    It cannot be printed as JSON: a conversation whose answer JSON escapes is refused, so a plan may
    not print it.
    """


class SymbolicConcat(_Symbolic):
    """A text joined by the template from strings and symbolic strings: `"a" + content`."""

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
    """The length of a symbolic string, which can only be compared with 0."""

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
    """A symbolic object for a tool definition or call arguments, printed only as a whole."""

    def __init__(self, recorder: Recorder, ref: ValueRef, value: Any) -> None:
        self._recorder, self._ref, self._value = recorder, ref, value

    def __bool__(self) -> bool:
        return self._recorder.ask(self._ref, self._value, "__len__", ())


class Recorder:
    """The guards of one trace, in the order of the questions; equal guards are stored once."""

    def __init__(self) -> None:
        self.guards: dict[Guard, None] = {}

    def ask(self, ref: ValueRef, value: Any, method: str, arguments: tuple[Any, ...]) -> bool:
        """Return `bool(value.method(*arguments))`, and record the question with this answer."""
        answer = bool(getattr(value, method)(*arguments))
        self.guards[Guard(ref, method, arguments, answer)] = None
        return answer


class TracedTemplate:
    """A second compiled copy of a chat template, which can print and join symbolic strings.

    The module docstring explains the globals that are set in the compiled module.
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
        # `{{ value }}` calls `str`, and `~` calls a join. Globals hide the builtins of these names.
        self._compiled.root_render_func.__globals__.update(str=_to_str, str_join=_join, markup_join=_join)

    def trace(
        self,
        recorder: Recorder,
        messages: Sequence[TemplateMessage],
        tools: Sequence[Any],
        *,
        prompt: bool = False,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> Trace | None:
        """Run the template on messages and tools that contain symbolic objects.

        `variables` are the conversation's variables, in addition to those of the config. The guards
        are added to `recorder`. Return None if an operation cannot be recorded or the template
        raises an error.
        """
        template = self._template.with_variables(variables)
        context = self._compiled.new_context(template.context(messages, tools, prompt))
        try:
            with Bounded():
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
    """Strip the first part; if nothing is left of the part, drop it and strip the next part."""
    for index, part in enumerate(parts):
        if rest := strip(part):
            return [rest, *parts[index + 1 :]]
    return []


def _merge(parts: Iterable[Any]) -> list[str | ValueRef]:
    """Join neighbouring strings, and replace each symbolic string by its `ValueRef`."""
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
    """Return False: a symbolic string is unequal to an object that is no string.

    Raises `Untraceable` for a symbolic object: a guard cannot record a comparison of two values.
    """
    if isinstance(other, _Symbolic):
        raise Untraceable
    return False


def _to_str(value: object = "") -> Any:
    return value if isinstance(value, SymbolicStr | SymbolicConcat) else str(value)


def _join(items: Iterable[Any]) -> Any:
    parts = [part for item in items for part in _parts(_to_str(item)) if not isinstance(part, str) or part]
    if len(parts) == 1:  # a macro that prints just one symbolic string returns the string itself
        return parts[0]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else SymbolicConcat(parts)


def _trim(value: Any, characters: str | None = None) -> Any:
    return _to_str(value).strip(characters)


def _length(value: Any) -> Any:
    return SymbolicLength(value) if isinstance(value, SymbolicStr) else len(value)


def _to_json(environment: Any) -> Callable[..., Any]:
    plain = environment.filters["tojson"]

    def to_json(value: Any, **options: Any) -> Any:
        if isinstance(value, SymbolicAnswer):
            raise Untraceable
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
