"""Names of roles in datasets."""

from __future__ import annotations

from collections.abc import Mapping

from sftstream.config import RowSettings
from sftstream.formats.fields import spellings
from sftstream.records import Role

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "tool_result": "tool",
}
"""Name of a role in datasets, in small letters -> role of a `Message`."""

CALLING = frozenset({"function_call", "tool_call"})
"""Names of roles whose content is a tool call."""


def known_roles(settings: RowSettings) -> Mapping[str, Role]:
    """Return the roles by name: the names of `ROLES`, and the names that the source adds.

    A name that the source calls "tool_call" is left out: its content is a call, as in `CALLING`.
    """
    if not settings.roles:
        return ROLES
    added = {name: role for name, role in settings.roles.items() if role != "tool_call"}
    return {name: role for name, role in ROLES.items() if name not in settings.roles} | added


def find_role(given: object, roles: Mapping[str, Role], settings: RowSettings) -> tuple[str, Role] | None:
    """Return the name of a role as in `ROLES`, and the role; None of an unknown name.

    `roles` are the known roles of the settings. A name may be spelled "User" or "function-call". A
    name that the source adds is found as the name that the source gives to it: with
    `roles = {invoke = "tool_call"}`, "invoke" is found as "tool_call".
    """
    if not isinstance(given, str):
        return None
    for name in spellings(given):
        if settings.roles and (added := settings.roles.get(name)):
            return ("tool_call", "assistant") if added == "tool_call" else (added, added)
        if role := roles.get(name):
            return name, role
    return None
