"""Read tool calls and tool definitions in the spellings of different datasets.

All of these calls become ToolCall("add", {"a": 1}):

    {"name": "add", "arguments": {"a": 1}}
    {"name": "add", "arguments": "{\\"a\\": 1}"}
    {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sftstream.excerpt import excerpt
from sftstream.formats.fields import decoded, is_list, optional_id
from sftstream.formats.keys import ARGUMENTS, KEEP_ONE, only_value, require_plain
from sftstream.records import Refused, ToolCall, ToolCalls


def parse_calls(value: Any, path: str, ignored: Collection[str] = ()) -> ToolCalls:
    """Return the tool calls in a value of any known spelling.

    The value is a call or a list of calls. Each call is an object or JSON text, with or without a
    surrounding `function` object. Raises Refused if a call has no name or no arguments, or if a key
    that is not `ignored` is a mark or holds further words.
    """
    value = decoded(value)
    if not value:
        return ToolCalls()
    calls = value if is_list(value) else [value]
    return ToolCalls(_call(call, path, ignored) for call in map(decoded, calls) if not _is_null(call))


def _is_null(call: Any) -> bool:
    """Return True for the object of nulls by which a table says that there is no call."""
    if not isinstance(call, dict) or not call or call.get("name") or call.get("id"):
        return False
    return all(value is None or _is_null(value) for value in call.values())


def _call(call: Any, path: str, ignored: Collection[str]) -> ToolCall:
    if isinstance(call, Mapping):
        function = decoded(call.get("function")) or call
        named = isinstance(function, Mapping) and isinstance(function.get("name"), str)
        if named and any(name in function for name in ARGUMENTS):
            if function is not call and not _AROUND.issuperset(call):
                require_plain(call, ("function",), path, ignored)
            if _CALL.issuperset(function):  # the case of most rows, read in half of the time
                given = function["arguments"]
            else:
                require_plain(function, ARGUMENTS, path, ignored)
                given = only_value(function, ARGUMENTS, path, KEEP_ONE)
            given = decoded(given) or {}
            if isinstance(given, Mapping):
                return ToolCall(function["name"], dict(given), optional_id(call, path, "id", "call_id"))
            raise Refused(
                "bad tool call",
                f"{path}: the arguments of {function['name']!r} are {excerpt(given)}, not a JSON object; write "
                f'"arguments": {{"a": 1}}',
            )
    raise Refused(
        "bad tool call",
        f'{path}: {excerpt(call)} has no name and arguments; write {{"name": "add", "arguments": {{"a": 1}}}}',
    )


_AROUND = frozenset({"id", "index", "type", "function"})
"""Usual keys of an object around a `function` object."""
_CALL = frozenset({"id", "call_id", "index", "type", "name", "arguments"})
"""Usual keys of a call."""
PARAMETERS = ("parameters", "input_schema", "inputSchema")
"""Keys of the schema of a definition's parameters."""


def parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Return tool definitions of any known spelling, each as `{"type": "function", ...}`.

    The value is a definition, a list of definitions, or an object of name -> definition, such as
    `{"add": {"description": "adds"}}`. Each definition is an object or JSON text, with or without a
    surrounding `function` object. Raises Refused for another value.
    """
    if not value or not (value := decoded(value)):
        return ()
    if isinstance(value, Mapping) and not isinstance(value.get("name"), str) and "function" not in value:
        value = _named(value)
    tools = [decoded(tool) for tool in (value if is_list(value) else [value])]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise Refused("bad tools", f"{excerpt(value)} is not a list of tool definitions")
    return tuple(map(_tool, tools))


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a definition as a template reads it: in `function`, with its schema as `parameters`.

    The Responses API writes `{"type": "function", "name": "add", "parameters": {...}}`, and
    Anthropic's API and MCP call the schema `input_schema` and `inputSchema`. Another type than
    "function" is dropped from a tool with a schema, or with a name and a description. Raises
    Refused for any other tool of such a type, like `{"type": "web_search_20250305", ...}`, which
    would be printed as a function that nobody has described.
    """
    if function := decoded(tool.get("function")):
        return {**tool, "function": _with_parameters(function) if isinstance(function, Mapping) else function}
    function = dict(_with_parameters(tool))
    function.pop("function", None)  # a table has the key in each row
    kind = function.pop("type", None)
    described = function.get("parameters") is not None or (function.get("name") and function.get("description"))
    if kind not in (None, "function") and not described:
        raise Refused(
            "bad tools",
            f"the tool {excerpt(tool)} has the type {excerpt(kind)}, no parameters and no description; write it as "
            "a function with parameters, or leave it out of the tools",
        )
    return {"type": "function", "function": function}


def _with_parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a definition whose schema, under any name and perhaps JSON text, is `parameters`."""
    names = [name for name in PARAMETERS if function.get(name) is not None]
    if not names or (names == ["parameters"] and not isinstance(function["parameters"], str)):
        return function
    schema = only_value({name: decoded(function[name]) for name in names}, names, "tools", KEEP_ONE)
    named = {"parameters" if key in PARAMETERS else key: value for key, value in function.items()}
    return named | {"parameters": schema}


def _named(definitions: Mapping[str, Any]) -> list[Any]:
    """Return the definitions in an object of name -> definition, with the name put into each.

    `{"add": {"description": "adds"}}` gives `[{"name": "add", "description": "adds"}]`.
    """
    tools = {name: decoded(tool) for name, tool in definitions.items()}
    for name, tool in tools.items():
        if not isinstance(tool, Mapping) or tool.get("name", name) != name:
            raise Refused("bad tools", f"{excerpt(definitions)} is neither a tool definition nor name -> definition")
    return [tool if "function" in tool else {"name": name, **tool} for name, tool in tools.items()]
