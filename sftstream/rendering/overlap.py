"""Comparisons of printed texts: common beginnings, cut at special tokens and tags.

A tag is a word in angle or square brackets: `<think>`, `[INST]`. A cut shortens a text so that it
ends with a whole special token, a whole tag or a line end, never inside a token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

TAG = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]")
_WORD = re.compile(r"\w+")
_THOUGHT = re.compile(r"\s*(<think|\[THINK)")


def contains(text: str, stops: Iterable[str]) -> bool:
    """Return True if the text contains one of the stops."""
    return any(stop in text for stop in stops)


def common_prefix(left: str, right: str) -> str:
    """Return the common beginning of two texts: "ab" for "abc" and "abd"."""
    known, most = 0, min(len(left), len(right))
    while known < most:
        middle = (known + most + 1) // 2
        if left.startswith(right[known:middle], known):
            known = middle
        else:
            most = middle - 1
    return left[:known]


def is_within(gap: str, tail: str) -> bool:
    """Return True if `gap` is `tail`, or `tail` without its end or without a stretch inside.

    For the tail "<a><b><c>", the gaps "<a><b><c>", "<a>" and "<a><c>" are within the tail.
    """
    common = len(common_prefix(gap, tail))
    return len(gap) <= len(tail) and tail.endswith(gap[common:])


def alike(left: str, right: str) -> bool:
    """Return True if two texts differ only in words that contain a digit: ids and numbers."""
    if _WORD.sub("", left) != _WORD.sub("", right):
        return False
    words = zip(_WORD.findall(left), _WORD.findall(right), strict=True)
    return all(a == b or (any(map(str.isdigit, a)) and any(map(str.isdigit, b))) for a, b in words)


def shared_end(lead: str, tail: str) -> int:
    """Return the length of the longest suffix of `tail` that starts with a tag and is a prefix of
    `lead`.

    `tail` "<think></think>" and `lead` "</think>call" share "</think>", 8 characters. The result is
    0 if nothing is shared.
    """
    ends = (tail[match.start() :] for match in TAG.finditer(tail))
    return next((len(end) for end in ends if lead.startswith(end)), 0)


def cut_prefix(left: str, right: str, control: re.Pattern[str]) -> str:
    """Return the common beginning, cut after the last token, tag or line end of `right` that the
    common beginning contains whole.

    The result for "<a><bc>" and "<a><bd>" is "<a>".
    """
    common = common_prefix(left, right)
    return common[: cut(common, right, control)]


def opens_thought(text: str) -> bool:
    """Return True if the text begins with `<think` or `[THINK`, after optional white space."""
    return bool(_THOUGHT.match(text))


def cut(prefix: str, text: str, control: re.Pattern[str]) -> int:
    """Return the length of `prefix`, cut after the last whole token, tag or line end of `text`.

    `prefix` is a beginning of `text`: for the prefix "<a><b" of the text "<a><bc>", the result is
    3, the length of "<a>". A prefix equal to the text is not cut.
    """
    if len(prefix) == len(text):
        return len(text)
    return max(
        (match.end() for match in _border(control.pattern).finditer(text) if match.end() <= len(prefix)), default=0
    )


def token_or_tag(control: re.Pattern[str]) -> re.Pattern[str]:
    """Return a pattern that matches any special token and any tag."""
    return _token_or_tag(control.pattern)


# The key is the text of the pattern, because a compiled pattern has no stored hash.
@cache
def _border(control: str) -> re.Pattern[str]:
    return re.compile(rf"{control}|{TAG.pattern}|\n+")


@cache
def _token_or_tag(control: str) -> re.Pattern[str]:
    return re.compile(rf"{control}|{TAG.pattern}")
