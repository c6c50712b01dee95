"""A thought that a message holds twice: in a key of its own and at the beginning of the content.

    {"reasoning_content": "add", "content": "<think>\\nadd\\n</think>\\n\\n5"}

has the reasoning "add" and the text "5".
"""

from __future__ import annotations

import re

from sftstream.excerpt import excerpt
from sftstream.records import Refused

_NAMES = "think|thinking|thought|reasoning|seed:think"
_STARTS = rf"<(?:{_NAMES})>|\[THINK\]|<\|begin_of_thought\|>"
_ENDS = ("</think>", "</thinking>", "</thought>", "</reasoning>", "</seed:think>", "[/THINK]", "<|end_of_thought|>")
"""Tags that end a thought inside a content."""
_THOUGHT = re.compile(rf"\s*(?P<start>{_STARTS})?(?P<thought>.*?)(?:{'|'.join(map(re.escape, _ENDS))})", re.DOTALL)
"""Beginning of a text up to its first end of a thought."""


def may_hold_thought(text: str) -> bool:
    """Return True if a text has the end of a thought."""
    return any([end in text for end in _ENDS])


def without_thought(text: str, reasoning: str, path: str, ignore: str | None) -> str:
    """Return the text without the thought at its beginning, which is also the reasoning.

    The tag that opens the thought may be missing, as in answers to prompts ending with the tag. An
    empty thought is left out too. `ignore` is the entry of the setting that leaves out the
    reasoning, if there is one. Raises Refused if the text begins with another thought.
    """
    if not may_hold_thought(text) or not (found := _THOUGHT.match(text)):
        return text
    thought, rest = found["thought"].strip(), text[found.end() :]
    # Without the opening tag, words such as "</think> closes a thought." are no empty thought.
    if thought == reasoning.strip() or (not thought and (found["start"] or rest.startswith("\n"))):
        return rest.lstrip("\n")
    if found["start"]:
        remedy = f", or leave out the key of the reasoning by ignore = [{ignore}]" if ignore else ""
        raise Refused(
            "two contents",
            f"{path} has the reasoning {excerpt(reasoning)}, and another thought in its content: {excerpt(thought)}; keep "
            f"one of them{remedy}",
        )
    return text
