"""Spans of texts -> loss masks of their tokens, by the places where spans and tokens begin and end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftstream.records import Rendered

Pair = tuple[int, int]
Integers = NDArray[np.int64]


ByteBounds = tuple[Sequence[int], int]
"""The bounds of a text's spans in bytes of what is tokenized, and how many that has."""


class TokenAlignment(NamedTuple):
    """Of the tokens of several texts: which lie wholly inside a span; and for each text how many bytes its tokens hold, whether
    the first lies inside (0 or 1), how many do, and how many lie in a span just in part."""

    inside: NDArray[np.bool_]
    sizes: list[int]
    begins: list[int]
    trained: list[int]
    straddling: list[int]


def span_byte_bounds(text: Rendered, normalize: Callable[[str], str]) -> ByteBounds:
    """Its bounds in bytes of the normalized text; UnicodeEncodeError where it has none.

    What lies between two of them is normalized alone: spans begin and end at special tokens, which no character combines with.
    """
    at = size = 0
    bounds = []
    for bound in text.bounds:
        size += len(normalize(text.text[at:bound]).encode())
        bounds.append(size)
        at = bound
    return bounds, size + len(normalize(text.text[at:]).encode())


def align_batch(
    lengths: NDArray[np.integer[Any]], offsets: Integers, byte_bounds: Sequence[ByteBounds]
) -> TokenAlignment:
    """Of tokens with these lengths in bytes that lie side by side; those of text `i` are `[offsets[i], offsets[i + 1])`.

    A text whose tokens hold other bytes than it has is to be refused; nothing of it is inside. All texts are one row, which is
    searched once: it is the number of calls that costs.
    """
    ends = _running(lengths)
    borders = ends[offsets]
    sizes = np.diff(borders).tolist()
    bounds = [own if size == whole else () for (own, whole), size in zip(byte_bounds, sizes, strict=True)]
    counts = np.array(list(map(len, bounds)), np.int64)
    places = np.array(list(chain.from_iterable(bounds)), np.int64)
    first, last, straddling = _inside(ends[1:], places + borders[:-1].repeat(counts))
    last = np.maximum(first, last)
    inside = _ranges(first, last, len(lengths) + 1)  # one more, since a text without tokens may begin behind the last
    begins = inside[offsets[:-1]].astype(np.int64).tolist()
    return TokenAlignment(inside[:-1], sizes, begins, _sums(last - first, counts // 2), _sums(straddling, counts // 2))


def _sums(values: Integers, counts: Integers) -> list[int]:
    """Of values that belong together, so many each."""
    result: list[int] = np.diff(_running(values)[_running(counts)]).tolist()
    return result


def _running(values: NDArray[np.integer[Any]]) -> Integers:
    """The sums of the first 0, 1, 2, ... of them."""
    sums = np.zeros(len(values) + 1, np.int64)
    values.cumsum(dtype=np.int64, out=sums[1:])
    return sums


def align_by_offsets(tokens: Iterable[Pair], spans: Sequence[Pair]) -> tuple[NDArray[np.bool_], int, int]:
    """Which tokens lie inside a span, how many do, and how many lie in one in part. Anything can be between tokens."""
    places = np.array(list(tokens), np.int64).reshape(-1, 2)
    starts, ends = places[:, 0], places[:, 1]
    inside, straddling = np.zeros(len(places), bool), 0
    for begin, end in spans:
        first, last = int(starts.searchsorted(begin)), int(ends.searchsorted(end, "right"))
        inside[first:last] = True
        straddling += int(starts.searchsorted(end)) - int(ends.searchsorted(begin, "right")) - max(0, last - first)
    return inside, int(inside.sum()), straddling


def _inside(ends: Integers, spans: Integers) -> tuple[Integers, Integers, Integers]:
    """Of each span, a begin and an end in `spans`: the range of tokens inside, and how many straddle one of the two."""
    at = ends.searchsorted(spans)  # the tokens that they cut, or end with
    cut = ends.take(at, mode="clip") != spans if len(ends) else np.zeros(len(spans), bool)
    (begin, end), (cut_begin, cut_end) = at.reshape(-1, 2).T, cut.reshape(-1, 2).T
    opened = spans[::2] > 0
    cut_begin = cut_begin & opened
    return begin + opened, end + ~cut_end, cut_begin + (cut_end & ~(cut_begin & (begin == end))).astype(np.int64)


def _ranges(first: Integers, last: Integers, size: int) -> NDArray[np.bool_]:
    """True in ranges, which come in order."""
    cuts = np.full(2 * len(first) + 2, size)
    cuts[0] = 0
    cuts[1:-1:2], cuts[2:-1:2] = first, last
    inside: NDArray[np.bool_] = (np.arange(len(cuts) - 1) % 2 == 1).repeat(np.diff(cuts))
    return inside
