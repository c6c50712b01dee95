"""Compile a chat template in a sandbox with the settings, filters and functions of transformers.

The sandbox differs from the one of transformers in four points. `tojson` has a cache. `random`,
`lipsum` and a clock are missing, since their output differs in each process; the renderer passes
`strftime_now` as a variable. The work of a render is counted (`bounds.py`). Frequent attributes are
read faster.

The module imports Jinja and neither transformers nor torch: `certificate_process.py` starts in a
tenth of a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

from sftstream.door import Door
from sftstream.rendering.bounds import BoundedEnvironment, bound, compiled_names
from sftstream.rendering.json_cache import JsonCache


def compiled(text: str) -> jinja2.Template:
    """Return the compiled template; raises ValueError if `text` is not valid Jinja."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTags, loopcontrols])
    removed = {"random", "lipsum"}
    environment.filters = {name: f for name, f in environment.filters.items() if name not in removed}
    environment.filters["tojson"] = JsonCache(_to_json)
    environment.globals = {name: value for name, value in environment.globals.items() if name not in removed}
    environment.globals |= {"raise_exception": _raise_exception, "dict": _Dict(), "namespace": _PublicNamespace}
    bound(environment)
    with Door("the chat template is not valid Jinja"):
        template = environment.from_string(text)
    template.root_render_func.__globals__.update(compiled_names())
    template.globals = dict(template.globals)  # each render copies the globals, slowly from a ChainMap
    return template


class _Sandbox(BoundedEnvironment):
    """A sandbox that answers the most frequent questions of chat templates without a detour.

    For `message.content`, Jinja's sandbox first asks for an attribute of the dictionary, catches
    the error, and asks for the key. Most of the time of a render goes into such detours. For
    dictionaries, texts, namespaces and loops, `getattr` returns what Jinja's sandbox returns.
    """

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return the value of `obj.attribute` in a template."""
        kind = type(obj)
        if kind is dict and attribute not in _OF_DICT:
            try:
                return obj[attribute]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)
        if kind is str and attribute in _OF_STR:
            return getattr(obj, attribute)
        if kind in (_PublicNamespace, LoopContext) and not attribute.startswith("_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)


_OF_DICT = frozenset(dir(dict))
_OF_STR = frozenset(name for name in dir(str) if not name.startswith(("_", "format")))


class GenerationTags(Extension):  # type: ignore[misc]
    """The tag `{% generation %}`: marks the text that an assistant says.

    Inside `rendered_with_tags`, the positions of such texts are recorded; any other render prints
    them like other text.
    """

    tags = {"generation"}  # noqa: RUF012 (Jinja reads the attribute of the class)

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the node of a block; Jinja calls the method at each `{% generation %}`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_printed"), [], [], body).set_lineno(line)

    def _printed(self, caller: Any) -> str:
        text: str = caller()
        tags = _TAGS.get(None)
        if tags is not None:
            tags.spans.append((tags.length, tags.length + len(text)))
        return text


class _Tags:
    """The spans of `{% generation %}` blocks, and the number of characters printed so far."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []
        self.length = 0

    def counted(self, pieces: Iterable[str]) -> Iterator[str]:
        for piece in pieces:
            self.length += len(piece)
            yield piece


_TAGS: ContextVar[_Tags] = ContextVar("tags")


def rendered_with_tags(template: jinja2.Template, context: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """Render a template; return the text, and the spans of its generation blocks."""
    tags = _Tags()
    token = _TAGS.set(tags)
    try:
        text: str = template.environment.concat(tags.counted(template.generate(**context)))
    finally:
        _TAGS.reset(token)
    return text, tags.spans


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return the value as JSON, without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


class _Dict:
    """The function `dict` of templates, without the attributes of the class `dict`."""

    def __call__(self, *arguments: Any, **items: Any) -> dict[Any, Any]:
        return dict(*arguments, **items)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _PublicNamespace(Namespace):  # type: ignore[misc]
    """The `namespace` of templates, without names that begin with an underscore."""

    def __init__(*arguments: Any, **items: Any) -> None:  # the signature of Jinja, for `namespace(self=1)`
        self, *rest = arguments
        given = dict(*rest, **items)
        for name in given:
            _require_public(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace of a chat template cannot hold the name {name!r}; rename it"
        )
