"""Names of roles in datasets."""

from __future__ import annotations

from collections.abc import Mapping

from sftstream.config import RowSettings
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
    """Return the roles by name: the names of `ROLES`, and the names that the source adds."""
    return {**ROLES, **settings.roles} if settings.roles else ROLES
