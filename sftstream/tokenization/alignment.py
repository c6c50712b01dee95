"""Spans of texts -> loss masks of tokens. A token is trained if it lies wholly inside a span.

The tokens of a byte-level tokenizer together hold exactly the bytes of the text, so the position of
each token follows from the lengths of the tokens. Tokens of 1, 3, 2 and 4 bytes begin and end at
the byte offsets 0, 1, 4, 6 and 10:

    token        0    1    2     3
    bytes      [0,1)[1,4)[4,6)[6,10)
    span [1, 6)      in   in                  tokens 1 and 2 are inside
    span [2, 6)      cut  in                  token 2 is inside, token 1 is straddling
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftstream.records import Rendered

Pair = tuple[int, int]
"""Start and end of a range."""
Integers = NDArray[np.int64]


ByteBounds = tuple[Sequence[int], int]
"""A text's span bounds in bytes, `[start, end, start, end, ...]`, and its size in bytes."""


class TokenAlignment(NamedTuple):
    """The loss mask of a batch of texts, with counts for each text."""

    inside: NDArray[np.bool_]
    """Loss mask of all tokens, shape `(tokens of all texts,)`: True if wholly inside a span."""
    sizes: list[int]
    """For each text: number of bytes in its tokens."""
    begins: list[int]
    """For each text: 1 if the first token is inside a span, else 0."""
    trained: list[int]
    """For each text: number of tokens inside a span."""
    straddling: list[int]
    """For each text: number of tokens partly inside a span."""


def span_byte_bounds(text: Rendered, normalize: Callable[[str], str]) -> ByteBounds:
    """Return the bounds of the text's spans in bytes, and the size of the text in bytes.

    Both refer to the normalized text, as the tokenizer encodes it. For the text "é<s>hé!</s>" with
    the span "hé!</s>", `text.bounds` is `(4, 11)` in characters. "é" has 2 bytes (if `normalize`
    leaves "é" unchanged), so the result is `([5, 13], 13)`.

    The text is normalized piece by piece between the bounds. The result is the same as for the
    whole text, because spans begin and end beside special tokens, with which no character combines.
    Raises UnicodeEncodeError if the text contains half of a surrogate pair.
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
    """Return the loss mask of a batch of texts, with counts for each text.

    `lengths` has shape `(tokens of all texts,)`: the number of bytes of each token. `offsets` has
    shape `(texts + 1,)`: text `i` has the tokens from `offsets[i]` up to `offsets[i + 1]`.
    `byte_bounds` has one item for each text.

    Example with two texts, of 4 and 2 tokens:

        lengths      [1, 3, 2, 4, 2, 2]
        offsets      [0, 4, 6]
        byte_bounds  [([1, 6, 8, 10], 10), ([0, 2], 4)]

    Token 0 begins at byte 0, and the tokens end at the bytes 1, 4, 6, 10, 12, 14; the second text
    begins at byte 10. The spans of the first text are [1, 6) and [8, 10), the span of the second is
    [0, 2). The result:

        inside      [False, True, True, False, True, False]
        sizes       [10, 4]
        begins      [0, 1]
        trained     [2, 1]
        straddling  [1, 0]      token 3, the bytes [6, 10), is cut by the span [8, 10)

    `sizes` may differ from the size of a text in `byte_bounds`. The positions of the tokens are
    then unknown: no token of the text is inside, and the caller must refuse the text.

    All texts are searched in a single call, since each call of numpy has a fixed cost.
    """
    token_bounds = _running_sums(lengths)
    text_bounds = token_bounds[offsets]
    sizes = np.diff(text_bounds).tolist()
    bounds = [bounds if size == text_size else () for (bounds, text_size), size in zip(byte_bounds, sizes, strict=True)]
    counts = np.array(list(map(len, bounds)), np.int64)
    span_bounds = np.array(list(chain.from_iterable(bounds)), np.int64) + text_bounds[:-1].repeat(counts)
    first, last, straddling = _tokens_inside(token_bounds[1:], span_bounds)
    last = np.maximum(first, last)
    inside = _mask(first, last, len(lengths) + 1)  # a text without tokens may begin after the last token
    begins = inside[offsets[:-1]].astype(np.int64).tolist()
    return TokenAlignment(inside[:-1], sizes, begins, _sums(last - first, counts // 2), _sums(straddling, counts // 2))


def align_by_offsets(tokens: Iterable[Pair], spans: Sequence[Pair]) -> tuple[NDArray[np.bool_], int, int]:
    """Return the loss mask, the number of trained tokens, and the number of straddling tokens.

    `tokens` has the range `(start, end)` of each token in characters. A character may belong to no
    token: some tokenizers leave white space out.

    For the text "ab cd ef", `tokens = [(0, 2), (3, 5), (6, 8)]` and `spans = [(3, 7)]`, the result
    is `([False, True, False], 1, 1)`: "cd" is inside the span, and "ef" is straddling.
    """
    bounds = np.array(list(tokens), np.int64).reshape(-1, 2)
    starts, ends = bounds[:, 0], bounds[:, 1]
    inside, straddling = np.zeros(len(bounds), bool), 0
    for begin, end in spans:
        first, last = int(starts.searchsorted(begin)), int(ends.searchsorted(end, "right"))
        inside[first:last] = True
        overlapping = int(starts.searchsorted(end)) - int(ends.searchsorted(begin, "right"))
        straddling += overlapping - max(0, last - first)
    return inside, int(inside.sum()), straddling


def _sums(values: Integers, counts: Integers) -> list[int]:
    """Return sums of consecutive groups: `[1, 2, 3]` in groups of 2, 0 and 1 gives `[3, 0, 3]`."""
    result: list[int] = np.diff(_running_sums(values)[_running_sums(counts)]).tolist()
    return result


def _running_sums(values: NDArray[np.integer[Any]]) -> Integers:
    """Return the sums of the first 0, 1, 2, ... values: `[1, 3, 2]` gives `[0, 1, 4, 6]`."""
    sums = np.zeros(len(values) + 1, np.int64)
    values.cumsum(dtype=np.int64, out=sums[1:])
    return sums


def _tokens_inside(ends: Integers, span_bounds: Integers) -> tuple[Integers, Integers, Integers]:
    """Return `first`, `last` and `straddling` of each span.

    The tokens in the range `[first, last)` are inside the span; `straddling` is the number of
    tokens that the span cuts. `ends` has the byte offset at which each token ends: token `i` begins
    at `ends[i - 1]`, and token 0 at 0. `span_bounds` is `[start, end, start, end, ...]`. For a span
    inside a single token, `first` is greater than `last`.

    For `ends = [1, 4, 6, 10]` and the spans `[1, 6)`, `[2, 6)`, `[7, 8)`, the result is
    `([1, 2, 4], [3, 3, 3], [0, 1, 1])`.
    """
    at = ends.searchsorted(span_bounds)  # the token that contains the bound, or ends at the bound
    cut = ends.take(at, mode="clip") != span_bounds if len(ends) else np.zeros(len(span_bounds), bool)
    (begin, end), (cut_begin, cut_end) = at.reshape(-1, 2).T, cut.reshape(-1, 2).T
    after_first_byte = span_bounds[::2] > 0
    cut_begin = cut_begin & after_first_byte
    straddling = cut_begin + (cut_end & ~(cut_begin & (begin == end))).astype(np.int64)
    return begin + after_first_byte, end + ~cut_end, straddling


def _mask(first: Integers, last: Integers, size: int) -> NDArray[np.bool_]:
    """Return a mask of shape `(size,)` that is True in the ranges `[first[i], last[i])`.

    The ranges ascend: `first = [1, 4]`, `last = [3, 5]` and size 6 give
    `[False, True, True, False, True, False]`.
    """
    cuts = np.full(2 * len(first) + 2, size)
    cuts[0] = 0
    cuts[1:-1:2], cuts[2:-1:2] = first, last
    inside: NDArray[np.bool_] = (np.arange(len(cuts) - 1) % 2 == 1).repeat(np.diff(cuts))
    return inside
