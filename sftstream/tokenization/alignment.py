"""Spans of texts -> loss masks of tokens. A token wholly inside a span is trained.

The tokens of a byte-level tokenizer, put side by side, hold exactly the bytes of the text. Token
lengths alone then give the position of each token: with lengths `[1, 3, 2, 4]` the tokens lie
between the byte offsets `[0, 1, 4, 6, 10]`. A span of the bytes `[1, 6)` holds tokens 1 and 2; a
span of the bytes `[2, 6)` holds token 2 and cuts through token 1 (a straddling token).
"""

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
"""Byte offsets `[start, end, start, end, ...]` of a text's spans, and the text's size in bytes."""


class TokenAlignment(NamedTuple):
    """Tokens of a batch of texts, compared with the spans of the texts."""

    inside: NDArray[np.bool_]
    """True for tokens wholly inside a span, `(tokens of all texts,)`."""
    sizes: list[int]
    """Bytes held by the tokens of each text."""
    begins: list[int]
    """1 for each text whose first token is inside, else 0."""
    trained: list[int]
    """Tokens inside, of each text."""
    straddling: list[int]
    """Tokens partly inside a span, of each text."""


def span_byte_bounds(text: Rendered, normalize: Callable[[str], str]) -> ByteBounds:
    """Return the text's span bounds as byte offsets of the normalized text, and its size in bytes.

    For the text "é<s>hé!</s>" with the span "hé!</s>", `text.bounds` is `(4, 11)` in characters.
    Without normalization "é" takes 2 bytes, and the result is `([5, 13], 13)`.

    Stretches between bounds are normalized separately: spans begin and end at special tokens, with
    which no neighbouring character combines. Raises UnicodeEncodeError if the text holds half of a
    surrogate pair.
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
    """Return which tokens of a batch of texts lie inside spans.

    `lengths` holds the bytes of each token, `(tokens,)`; the tokens of text `i` are those from
    `offsets[i]` to `offsets[i + 1]`, `(texts + 1,)`; `byte_bounds` holds a pair for each text.

    For `lengths = [1, 3, 2, 4, 2, 2]`, `offsets = [0, 4, 6]` and
    `byte_bounds = [([1, 6, 8, 10], 10), ([0, 2], 4)]` the tokens lie between the bytes
    `[0, 1, 4, 6, 10, 12, 14]`, the second text begins at byte 10, and the result is

        inside      [False, True, True, False, True, False]
        sizes       [10, 4]
        begins      [0, 1]
        trained     [2, 1]
        straddling  [1, 0]      token 3, the bytes [6, 10), is cut by the span [8, 10)

    If the tokens of a text do not hold as many bytes as the text (`sizes` differs from the size in
    `byte_bounds`), none of its tokens is inside, and the caller must refuse the text.

    All texts are searched in a single call: for short arrays numpy's cost is the number of calls.
    """
    token_bounds = _running_sums(lengths)
    text_bounds = token_bounds[offsets]
    sizes = np.diff(text_bounds).tolist()
    bounds = [bounds if size == text_size else () for (bounds, text_size), size in zip(byte_bounds, sizes, strict=True)]
    counts = np.array(list(map(len, bounds)), np.int64)
    span_bounds = np.array(list(chain.from_iterable(bounds)), np.int64) + text_bounds[:-1].repeat(counts)
    first, last, straddling = _tokens_inside(token_bounds[1:], span_bounds)
    last = np.maximum(first, last)
    inside = _mask(first, last, len(lengths) + 1)  # a last text without tokens begins behind the end
    begins = inside[offsets[:-1]].astype(np.int64).tolist()
    return TokenAlignment(inside[:-1], sizes, begins, _sums(last - first, counts // 2), _sums(straddling, counts // 2))


def align_by_offsets(tokens: Iterable[Pair], spans: Sequence[Pair]) -> tuple[NDArray[np.bool_], int, int]:
    """Return the mask of tokens inside spans, their number, and the number of straddling tokens.

    `tokens` are the character offsets `(start, end)` of each token. Characters between tokens
    belong to no token, as the white space that some tokenizers leave out.

    For the text "ab cd ef", `tokens = [(0, 2), (3, 5), (6, 8)]` and `spans = [(3, 7)]` the result
    is `([False, True, False], 1, 1)`: the span holds "cd" and cuts "ef".
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
    """Return sums of consecutive groups: `[1, 2, 3]` in groups of `[2, 0, 1]` gives `[3, 0, 3]`."""
    result: list[int] = np.diff(_running_sums(values)[_running_sums(counts)]).tolist()
    return result


def _running_sums(values: NDArray[np.integer[Any]]) -> Integers:
    """Return the sums of the first 0, 1, 2, ... values: `[1, 3, 2]` gives `[0, 1, 4, 6]`."""
    sums = np.zeros(len(values) + 1, np.int64)
    values.cumsum(dtype=np.int64, out=sums[1:])
    return sums


def _tokens_inside(ends: Integers, span_bounds: Integers) -> tuple[Integers, Integers, Integers]:
    """Return, for each span, the range of tokens inside and the count of straddling tokens.

    The range is `[first, last)`. `ends` holds the byte offset at which each token ends; token `i`
    begins at `ends[i - 1]`, and token 0 at 0. `span_bounds` is `[start, end, start, end, ...]`. A
    span inside a single token has `first > last`.

    For `ends = [1, 4, 6, 10]` and the spans `[1, 6)`, `[2, 6)`, `[7, 8)` the result is
    `([1, 2, 4], [3, 3, 3], [0, 1, 1])`.
    """
    at = ends.searchsorted(span_bounds)  # the token that holds the bound, or ends at it
    cut = ends.take(at, mode="clip") != span_bounds if len(ends) else np.zeros(len(span_bounds), bool)
    (begin, end), (cut_begin, cut_end) = at.reshape(-1, 2).T, cut.reshape(-1, 2).T
    after_first_byte = span_bounds[::2] > 0
    cut_begin = cut_begin & after_first_byte
    straddling = cut_begin + (cut_end & ~(cut_begin & (begin == end))).astype(np.int64)
    return begin + after_first_byte, end + ~cut_end, straddling


def _mask(first: Integers, last: Integers, size: int) -> NDArray[np.bool_]:
    """Return a mask, True in the ascending ranges `[first[i], last[i])`, `(size,)`."""
    cuts = np.full(2 * len(first) + 2, size)
    cuts[0] = 0
    cuts[1:-1:2], cuts[2:-1:2] = first, last
    inside: NDArray[np.bool_] = (np.arange(len(cuts) - 1) % 2 == 1).repeat(np.diff(cuts))
    return inside
