"""Spans of texts -> loss masks of their tokens, by the places where spans and tokens begin and end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftstream.records import Rendered

Pair = tuple[int, int]
Integers = NDArray[np.int64]


class Placed(NamedTuple):
    """The spans of a text in bytes of what is tokenized, and how many that has."""

    spans: Sequence[Pair]
    size: int


class Masked(NamedTuple):
    """Of one text's tokens: which lie wholly inside a span, how many these are, and how many lie in one just in part."""

    inside: NDArray[np.bool_]
    trained: int
    straddling: int


def measured(text: Rendered, normalize: Callable[[str], str]) -> Placed:
    """The spans, which are in order, in bytes of the normalized text; UnicodeEncodeError where it has none.

    What lies between two of their ends is normalized alone: spans begin and end at special tokens, which no character
    combines with.
    """
    at = size = 0
    spans = []
    for start, end in text.spans:
        begin = size + len(normalize(text.text[at:start]).encode())
        size = begin + len(normalize(text.text[start:end]).encode())
        spans.append((begin, size))
        at = end
    return Placed(spans, size + len(normalize(text.text[at:]).encode()))


def tiled(
    lengths: NDArray[np.integer[Any]], offsets: Sequence[int], placed: Sequence[Placed]
) -> Iterator[Masked | int]:
    """Of tokens with these lengths in bytes that lie side by side; those of text `i` are `[offsets[i], offsets[i + 1])`.

    Gives how many bytes the tokens hold where the text has others. All texts are one row, which is searched once: it is the
    number of calls that costs.
    """
    ends = lengths.cumsum(dtype=np.int64)
    borders = [int(ends[at - 1]) if at else 0 for at in offsets]
    sizes = [end - start for start, end in pairwise(borders)]
    spans: list[int] = []
    for base, size, place in zip(borders, sizes, placed, strict=False):
        if size == place.size:
            for start, stop in place.spans:
                spans += (base + start, base + stop)
    first, last, straddling = _inside(ends, np.array(spans, np.int64))
    inside = _ranges(first, last, len(lengths))
    trained, crossed = np.maximum(last - first, 0).tolist(), straddling.tolist()
    at = 0
    for (begin, end), size, place in zip(pairwise(offsets), sizes, placed, strict=True):
        if size != place.size:
            yield size
        else:
            own = slice(at, at + len(place.spans))
            yield Masked(inside[begin:end], sum(trained[own]), sum(crossed[own]))
            at = own.stop


def apart(tokens: Iterable[Pair], spans: Sequence[Pair]) -> Masked:
    """Of one text whose tokens have these places, with anything between them."""
    places = np.array(list(tokens), np.int64).reshape(-1, 2)
    starts, ends = places[:, 0], places[:, 1]
    inside, straddling = np.zeros(len(places), bool), 0
    for begin, end in spans:
        first, last = int(starts.searchsorted(begin)), int(ends.searchsorted(end, "right"))
        inside[first:last] = True
        straddling += int(starts.searchsorted(end)) - int(ends.searchsorted(begin, "right")) - max(0, last - first)
    return Masked(inside, int(inside.sum()), straddling)


def _inside(ends: Integers, spans: Integers) -> tuple[Integers, Integers, Integers]:
    """Of each span, a begin and an end in `spans`: the range of tokens inside, and how many straddle one of the two."""
    at = ends.searchsorted(spans)  # the tokens that they cut, or end with
    cut = ends.take(at, mode="clip") != spans if len(ends) else np.zeros(len(spans), bool)
    (begin, end), (cut_begin, cut_end) = at.reshape(-1, 2).T, cut.reshape(-1, 2).T
    opened = spans[::2] > 0
    cut_begin = cut_begin & opened
    return begin + opened, end + ~cut_end, cut_begin + (cut_end & ~(cut_begin & (begin == end))).astype(np.int64)


def _ranges(first: Integers, last: Integers, size: int) -> NDArray[np.bool_]:
    """True in ranges that do not overlap."""
    real = first < last
    steps = np.zeros(size + 1, np.int8)
    steps[first[real]] += 1
    steps[last[real]] -= 1
    return steps[:-1].cumsum(dtype=np.int8).view(np.bool_)
