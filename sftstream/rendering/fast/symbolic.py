"""A chat template run on words that nobody knows yet: what it prints around them, and what it asked of them to decide that.

The words are objects that record every question. What cannot be recorded, a method that no one foresaw or a function that
wants a real string, ends the trace, and the conversation is rendered as ever. So a trace is never a guess: for every
conversation of the same shape that answers the recorded questions alike, the template prints the same pieces in the same
order. (Concolic execution, as in Godefroid, Klarlund, Sen, "DART", 2005, on the paths that a conversation takes.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jinja2 import Template

from sftstream.records import Refused
from sftstream.rendering.template import ChatTemplate, TemplateMessage, bounded

Op = tuple[str, tuple[Any, ...]]
"""A method of `str` and its arguments, or `tojson` and its keywords' items."""


class ValueRef(NamedTuple):
    """A value of a conversation as it is printed: its number, and what was done to it."""

    number: int
    ops: tuple[Op, ...] = ()


class Guard(NamedTuple):
    """A question, and the answer on which the template went on. `method` is one of `bool` or of `str`."""

    ref: ValueRef
    method: str
    arguments: tuple[Any, ...]
    answer: bool


class Trace(NamedTuple):
    """What a template printed, and on which conditions it always prints that."""

    pieces: tuple[str | ValueRef, ...]
    guards: tuple[Guard, ...]


class Untraceable(BaseException):
    """Not an Exception: Jinja answers some questions by catching those."""


class _Unknown:
    """What is not recorded is refused, above all what would make a real string of it.

    What these objects hold has names that Jinja's sandbox does not give to a template.
    """

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise Untraceable

    __str__ = __repr__ = __format__ = __bytes__ = __len__ = __iter__ = __getitem__ = __hash__ = _refuse
    __int__ = __float__ = __index__ = __complex__ = __contains__ = __reversed__ = __mod__ = __mul__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __bool__ = __add__ = __radd__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by Jinja, about Jinja's own protocols
            raise AttributeError(name)
        raise Untraceable


class SymbolicStr(_Unknown):
    """A string, known to be one and no more."""

    def __init__(self, recorder: Recorder, ref: ValueRef, value: str) -> None:
        self._recorder, self._ref, self._value = recorder, ref, value

    def _asked(self, method: str, *arguments: Any) -> bool:
        return self._recorder.ask(self._ref, self._value, method, arguments)

    def _changed(self, method: str, *arguments: Any) -> SymbolicStr:
        ref = ValueRef(self._ref.number, (*self._ref.ops, (method, arguments)))
        return SymbolicStr(self._recorder, ref, getattr(self._value, method)(*arguments))

    def __bool__(self) -> bool:
        return self._asked("__len__")

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, str) and self._asked("__eq__", other)) or _no_word(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = _Unknown.__hash__

    def __contains__(self, part: object) -> bool:
        return self._asked("__contains__", part) if isinstance(part, str) else self._refuse()

    def __add__(self, other: object) -> SymbolicConcat:
        return SymbolicConcat([self]) + other

    def __radd__(self, other: object) -> SymbolicConcat:
        return other + SymbolicConcat([self])

    def startswith(self, part: str | tuple[str, ...]) -> bool:
        return self._asked("startswith", part)

    def endswith(self, part: str | tuple[str, ...]) -> bool:
        return self._asked("endswith", part)

    def strip(self, characters: str | None = None) -> SymbolicStr:
        return self._changed("strip", characters)

    def lstrip(self, characters: str | None = None) -> SymbolicStr:
        return self._changed("lstrip", characters)

    def rstrip(self, characters: str | None = None) -> SymbolicStr:
        return self._changed("rstrip", characters)

    def split(self, separator: str, _most: int = -1) -> list[SymbolicStr]:
        """Where the separator is not in it."""
        return [self] if isinstance(separator, str) and separator not in self else self._refuse()

    rsplit = split

    def replace(self, old: str, _new: str) -> SymbolicStr:
        """Where there is nothing to replace."""
        return self if isinstance(old, str) and old not in self else self._refuse()


class SymbolicConcat(_Unknown):
    """Strings and words side by side: what a template puts together to print it."""

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
        return SymbolicConcat(_without_blank_beginning(self._parts, lambda part: part.lstrip(characters)))

    def rstrip(self, characters: str | None = None) -> SymbolicConcat:
        return SymbolicConcat(_without_blank_beginning(self._parts[::-1], lambda part: part.rstrip(characters))[::-1])


class SymbolicLength(_Unknown):
    """How many characters a word has: known to be none, or some."""

    def __init__(self, word: SymbolicStr) -> None:
        self._word = word

    def __bool__(self) -> bool:
        return bool(self._word)

    def __eq__(self, other: object) -> bool:
        return not self if other == 0 else self._refuse()

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __gt__(self, other: object) -> bool:
        return bool(self) if other == 0 else self._refuse()

    __hash__ = _Unknown.__hash__


class SymbolicJson(_Unknown):
    """A tool's definition or a call's arguments: an object that is printed as JSON or not at all."""

    def __init__(self, recorder: Recorder, ref: ValueRef, value: Any) -> None:
        self._recorder, self._ref, self._value = recorder, ref, value

    def __bool__(self) -> bool:
        return self._recorder.ask(self._ref, self._value, "__len__", ())


class Recorder:
    """The questions of one trace."""

    def __init__(self) -> None:
        self.guards: dict[Guard, None] = {}

    def ask(self, ref: ValueRef, value: Any, method: str, arguments: tuple[Any, ...]) -> bool:
        answer = bool(getattr(value, method)(*arguments))
        self.guards[Guard(ref, method, arguments, answer)] = None
        return answer


class TracedTemplate:
    """A chat template, compiled a second time so that it joins and prints words."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        environment = template.environment.overlay()
        environment.concat = _joined
        filters = {
            "trim": _trim,
            "string": _shown,
            "tojson": _to_json(environment),
            "length": _length,
            "count": _length,
        }
        environment.filters = {**environment.filters, **filters}
        environment.tests = {**environment.tests, **{name: _is(name, environment) for name in ("string", "mapping")}}
        environment.tests |= {name: _is_iterable(environment.tests[name]) for name in ("iterable", "sequence")}
        code = environment.compile(template.text)
        self._compiled = Template.from_code(environment, code, environment.make_globals(None))
        # The module's own names stand before Python's: what it prints goes through `str`, `~` through the joins.
        self._compiled.root_render_func.__globals__.update(str=_shown, str_join=_joined, markup_join=_joined)

    def trace(
        self, recorder: Recorder, messages: Sequence[TemplateMessage], tools: Sequence[Any], *, prompt: bool = False
    ) -> Trace | None:
        """`messages` and `tools` hold words and values of the recorder. None where something cannot be recorded."""
        context = self._compiled.new_context(self._template.context(messages, tools, prompt))
        try:
            with bounded():
                printed = [part for item in self._compiled.root_render_func(context) for part in _parts(item)]
        except (Untraceable, Refused):
            return None
        return Trace(tuple(_merged(printed)), tuple(recorder.guards))


def _parts(item: object) -> list[Any]:
    if isinstance(item, SymbolicConcat):
        return item._parts
    if isinstance(item, str | SymbolicStr):
        return [item]
    raise Untraceable


def _without_blank_beginning(parts: Sequence[Any], strip: Callable[[Any], Any]) -> list[Any]:
    """The first part that is not stripped to nothing, so stripped, and those behind it."""
    for index, part in enumerate(parts):
        if rest := strip(part):
            return [rest, *parts[index + 1 :]]
    return []


def _merged(parts: Iterable[Any]) -> list[str | ValueRef]:
    """Strings that follow one another as one, words by their leaves."""
    result: list[str | ValueRef] = []
    for part in parts:
        if isinstance(part, SymbolicStr):
            result.append(part._ref)
        elif result and isinstance(result[-1], str):
            result[-1] += part
        else:
            result.append(part)
    return result


def _no_word(other: object) -> bool:
    """What is no string equals none; two words might be the same."""
    if isinstance(other, _Unknown):
        raise Untraceable
    return False


def _shown(value: object = "") -> Any:
    return value if isinstance(value, SymbolicStr | SymbolicConcat) else str(value)


def _joined(items: Iterable[Any]) -> Any:
    parts = [part for item in items for part in _parts(_shown(item)) if not isinstance(part, str) or part]
    if len(parts) == 1:  # what a macro makes of a word alone can be asked like that word
        return parts[0]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else SymbolicConcat(parts)


def _trim(value: Any, characters: str | None = None) -> Any:
    return _shown(value).strip(characters)


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
    return lambda value: isinstance(value, kind) if isinstance(value, _Unknown) else plain(value)


def _is_iterable(plain: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, _Unknown) or plain(value)
