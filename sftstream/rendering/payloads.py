"""The places of the conversation's own texts in a rendered text.

The payloads of most renders are in order: each payload is printed once, after the payloads of all
earlier messages. `PayloadIndex` then finds a message's neighbours without a search.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, islice
from operator import le
from typing import NamedTuple

from sftstream.records import Span

KINDS = ("reasoning", "content", "call")
"""Kinds of payloads."""


class Payload(NamedTuple):
    """A printed payload, at the characters `[start, end)` of the rendered text."""

    start: int
    end: int
    message: int
    """Index of the message in the conversation."""
    kind: str
    """A member of `KINDS`."""
    number: int
    """Number of the payload in the conversation.

    If a template prints a text twice, the text has two `Payload` records with the same number. A
    thought that was split off a content has a negative number.
    """


class Neighbours(NamedTuple):
    """The payloads of a message, and the characters at which the payloads around them end and
    start."""

    before: int
    """End of the payload before; 0 if there is none."""
    own: list[Payload]
    after: int | None
    """Start of the payload after; None if there is none."""


class PayloadIndex:
    """Payloads of a rendered text, for searches by message and by offset without a full scan."""

    def __init__(self, payloads: Sequence[Payload]) -> None:
        self._by_start = sorted(payloads)
        self._starts = [payload.start for payload in self._by_start]
        self._of: dict[int, list[Payload]] = {}
        for payload in self._by_start:
            self._of.setdefault(payload.message, []).append(payload)

    def of(self, message: int) -> Sequence[Payload]:
        """Return the payloads of a message, in the order of the printed text."""
        return self._of.get(message, ())

    @cached_property
    def in_order(self) -> bool:
        """True if each payload is printed once, and after the payloads of all earlier messages."""
        messages = [payload.message for payload in self._by_start]
        ends = [payload.end for payload in self._by_start]
        return (
            all(map(le, messages, messages[1:]))
            and all(map(le, ends, self._starts[1:]))
            and len({payload.number for payload in self._by_start}) == len(ends)
        )

    def first_prints(self, index: int, earliest: int) -> list[Payload]:
        """Return the first occurrence, at or after `earliest`, of each payload of the message."""
        own = self.of(index)
        if len(own) == 1:
            return [own[0]] if own[0].start >= earliest else []
        first_prints: dict[tuple[str, int], Payload] = {}
        for payload in own:
            if payload.start >= earliest:
                first_prints.setdefault((payload.kind, payload.number), payload)
        return sorted(first_prints.values())

    def neighbours(self, message: int) -> Neighbours | None:
        """Return the payloads of a message, and where the text of its neighbours ends and starts.

        Return None if the payloads are not in order, or if the message has none.
        """
        return self._neighbours.get(message)

    @cached_property
    def _neighbours(self) -> dict[int, Neighbours]:
        if not self.in_order:
            return {}
        found, before, position = {}, 0, 0
        starts = [*self._starts, None]
        for message, own in self._of.items():
            position += len(own)
            found[message] = Neighbours(before, own, starts[position])
            before = own[-1].end
        return found

    def last_end(self, message: int, offset: int) -> int:
        """Among the payloads of earlier messages, return the last end at or before `offset`; or
        0."""
        found = bisect_right(self._by_end, (offset, len(self._by_end) + message)) - 1
        while found >= 0 and self._by_end[found][1] >= message:
            found -= 1
        return self._by_end[found][0] if found >= 0 else 0

    @cached_property
    def _by_end(self) -> list[tuple[int, int]]:
        return sorted((payload.end, payload.message) for payload in self._by_start)

    def next_start(self, message: int, offset: int) -> int | None:
        """Return the smallest payload start from `offset` on, of the messages after `message`.

        Return None if there is no such payload.
        """
        for payload in islice(self._by_start, bisect_left(self._starts, offset), None):
            if payload.message > message:
                return payload.start
        return None

    def foreign(self, message: int, span: Span) -> Payload | None:
        """Return the first payload of another message that shares a character with the span."""
        place = self.neighbours(message)
        if place and place.before <= span.start and (place.after is None or span.end <= place.after):
            return None
        first, last = bisect_right(self._latest_end, span.start), bisect_left(self._starts, span.end)
        overlapping = (p for p in self._by_start[first:last] if span.start < p.end)
        return next((payload for payload in overlapping if payload.message != message), None)

    @cached_property
    def _latest_end(self) -> list[int]:
        return list(accumulate((payload.end for payload in self._by_start), max))
