"""A thought that a message holds twice: in a key of its own and at the beginning of the content.

    {"reasoning_content": "add", "content": "<think>\\nadd\\n</think>\\n\\n5"}

has the reasoning "add" and the text "5".
"""

from __future__ import annotations

from sftstream.excerpt import excerpt
from sftstream.formats.fields import in_turns
from sftstream.records import Refused

_ENDS = ("</think>", "</thinking>", "</thought>", "</reasoning>", "</seed:think>", "[/THINK]")
"""Tags that end a thought inside a content."""


def may_hold_thought(text: str) -> bool:
    """Return True if a text has the end of a thought."""
    return any([end in text for end in _ENDS])


def without_thought(text: str, reasoning: str, path: str, key: str = "reasoning") -> str:
    """Return the text without the thought at its beginning, which is also the reasoning.

    The tag that opens the thought may be missing, as in answers to prompts ending with the tag.
    `key` holds the reasoning. Raises Refused if the text begins with another thought.
    """
    end = next((end for end in _ENDS if end in text), None)
    if end is None:
        return text
    before, _, rest = text.partition(end)
    start = end.replace("/", "")
    thought = before.lstrip().removeprefix(start).strip()
    if thought in ("", reasoning.strip()):
        return rest.lstrip("\n")
    if before.lstrip().startswith(start):
        raise Refused(
            "two contents",
            f"{path} has the reasoning {excerpt(reasoning)}, and another thought in its content: {excerpt(thought)}; keep "
            f"one of them, or leave out the key of the reasoning by ignore = [{in_turns(path, key)}]",
        )
    return text
