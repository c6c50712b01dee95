"""Spans are compared with tokens by literal arrays."""

from __future__ import annotations

import unicodedata

import numpy as np

from sftstream.records import Rendered
from sftstream.tokenization.alignment import align_batch, align_by_offsets, span_byte_bounds


def test_tokens_inside_spans_are_trained_and_tokens_across_a_bound_are_counted() -> None:
    inside, *counts = align_batch(np.array([1, 3, 2, 4, 2, 2]), np.array([0, 4, 6]), [([1, 6, 8, 10], 10), ([0, 2], 4)])
    assert inside.tolist() == [False, True, True, False, True, False]
    assert counts == [[10, 4], [0, 1], [2, 1], [1, 0]]


def test_a_span_that_begins_and_ends_inside_tokens_straddles_each_of_them_once() -> None:
    for bounds, trained, straddling in (
        ([2, 6], 1, 1),
        ([7, 8], 0, 1),
        ([2, 8], 1, 2),
        ([0, 3], 1, 1),
        ([0, 10], 4, 0),
    ):
        aligned = align_batch(np.array([1, 3, 2, 4]), np.array([0, 4]), [(bounds, 10)])
        assert (aligned.trained, aligned.straddling) == ([trained], [straddling]), bounds


def test_no_token_is_inside_if_tokens_do_not_hold_the_bytes_of_their_text() -> None:
    inside, *counts = align_batch(np.array([1, 3, 2, 2]), np.array([0, 2, 4, 4]), [([0, 5], 5), ([0, 4], 4), ([], 0)])
    assert inside.tolist() == [False, False, True, True]
    assert counts == [[4, 4, 0], [0, 1, 0], [0, 2, 0], [0, 0, 0]]


def test_spans_are_found_between_tokens_with_gaps() -> None:
    inside, trained, straddling = align_by_offsets([(0, 2), (3, 5), (6, 8)], [(3, 7)])
    assert (inside.tolist(), trained, straddling) == ([False, True, False], 1, 1)


def test_span_bounds_are_counted_in_bytes_of_the_normalized_text() -> None:
    text = Rendered("é<s>hé!</s>", (4, 11))
    assert span_byte_bounds(text, str) == ([5, 13], 13)
    decomposed = Rendered("e\u0301<s>he\u0301!</s>", (5, 13))
    assert span_byte_bounds(decomposed, lambda part: unicodedata.normalize("NFC", part)) == ([5, 13], 13)
