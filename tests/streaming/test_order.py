"""Which row comes when: permutations, draws of streams, the schedule that mixes sources."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftstream.state import PastOrder
from sftstream.streaming.order import (
    RowOrder,
    draws_of_source,
    draws_of_stream,
    next_source,
    permute,
    round_keys,
    unpermute,
)


def permutation(size: int, *words: int | str) -> list[int]:
    keys = round_keys(*words)
    result: list[int] = permute(np.arange(size), size, keys).tolist()
    return result


def schedule(weights: list[float], draws: int, limits: list[int] | None = None) -> list[int | None]:
    drawn = [0] * len(weights)
    result = []
    for _ in range(draws):
        open_sources = [i for i in range(len(weights)) if limits is None or drawn[i] < limits[i]]
        source = next_source(drawn, weights, open_sources)
        result.append(source)
        if source is not None:
            drawn[source] += 1
    return result


def test_every_index_has_one_place_in_every_size() -> None:
    for size in range(1, 301):
        assert sorted(permutation(size, "row", 0, 0, 0)) == list(range(size))


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 10**9 + 7, 10**12])
def test_places_in_huge_sizes_are_distinct_and_inside(size: int) -> None:
    keys = round_keys("row", 3, 0, 0)
    indices = [*range(1000), *range(size - 1000, size), *range(0, size, size // 1000)]
    places = set(permute(np.array(sorted(set(indices))), size, keys).tolist())
    assert len(places) == len(set(indices))
    assert all(0 <= place < size for place in places)


def test_the_order_never_changes_by_accident() -> None:
    assert round_keys("row", 0, 0, 0)[:2] == (9733763120062159810, 4207131364801289264)
    assert permutation(10, "row", 0, 0, 0) == [3, 7, 1, 0, 4, 2, 6, 9, 8, 5]
    assert permutation(10, "row", 0, 0, 1) == [5, 0, 8, 1, 7, 3, 6, 9, 4, 2]
    assert permutation(10, "row", 1, 0, 0) == [3, 6, 2, 9, 8, 7, 0, 5, 4, 1]
    keys = round_keys("row", 0, 0, 0)
    assert permute(np.arange(4), 10**9, keys).tolist() == [968090560, 836325623, 717508662, 740545038]


def test_each_epoch_seed_and_source_has_an_order_of_its_own() -> None:
    orders = {
        tuple(permutation(50, "row", seed, source, epoch)) for seed in (0, 1) for source in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 8


def test_words_are_kept_apart_in_the_keys() -> None:
    assert (
        len({round_keys("row", 1, 23), round_keys("row", 12, 3), round_keys("row", 123), round_keys("row1", 23)}) == 4
    )


def test_every_permutation_of_four_is_drawn_about_as_often() -> None:
    counts = Counter(tuple(permutation(4, seed)) for seed in range(4800))
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 50  # chi-squared, 23 degrees: p = 0.001


@pytest.mark.parametrize("size", [5, 6, 12, 30, 64, 100])
def test_every_place_is_as_likely_for_every_row_and_neighbours_are_not_kept_together(size: int) -> None:
    """Chi-squared over 2,000 keys: within five standard deviations of its mean."""
    draws = [permutation(size, "row", seed, 0, 0) for seed in range(2000)]
    places = np.zeros((size, size))
    steps = np.zeros(size)
    for order in draws:
        places[np.arange(size), order] += 1
        steps += np.bincount(np.diff(order) % size, minlength=size)
    for counts, free in ((places, (size - 1) ** 2), (steps[1:], size - 2)):
        expected = counts.sum() / counts.size
        assert abs(((counts - expected) ** 2 / expected).sum() - free) < 5 * math.sqrt(2 * free)


def test_draws_of_all_streams_make_whole_epochs() -> None:
    streams, rows, epochs = 7, 10, 3
    drawn = []
    order = RowOrder((rows,), 5, 0, True)
    for stream in range(streams):
        count = draws_of_stream(rows * epochs, stream, streams)
        drawn += [order.at(stream + i * streams) for i in range(count)]
    assert sorted(drawn) == [(row, epoch) for row in range(rows) for epoch in range(epochs)]


@pytest.mark.parametrize(
    ("rows", "repeat", "epochs", "draws"), [(100, 0.29, 1, 29), (100, 0.57, 100, 5700), (7, 1.5, 1, 10), (3, 0.3, 1, 0)]
)
def test_a_fractional_repeat_counts_as_it_is_written(rows: int, repeat: float, epochs: int, draws: int) -> None:
    assert draws_of_source(rows, repeat, epochs) == draws


def test_a_stream_that_gets_no_draw_has_none() -> None:
    assert [draws_of_stream(3, stream, 5) for stream in range(5)] == [1, 1, 1, 0, 0]


def test_draws_in_order_are_rows_in_order() -> None:
    assert list(map(RowOrder((3,), 0, 0, False).at, range(5))) == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]


def test_shards_come_in_an_order_of_their_own_and_their_rows_as_they_lie() -> None:
    sizes = (3, 0, 2, 4, 1)
    starts = {0: 0, 2: 3, 3: 5, 4: 9}
    order = RowOrder(sizes, 11, 0, "shards")
    epochs = [[order.at(draw) for draw in range(epoch * 10, epoch * 10 + 10)] for epoch in range(200)]
    seen: Counter[tuple[int, ...]] = Counter()
    for number, epoch in enumerate(epochs):
        assert {at for _, at in epoch} == {number}
        first = [shard for row, _ in epoch for shard, start in starts.items() if row == start]
        assert [row for row, _ in epoch] == [row for s in first for row in range(starts[s], starts[s] + sizes[s])]
        seen[tuple(first)] += 1
    assert len(seen) == 24
    assert order.at(1234) == RowOrder(sizes, 11, 0, "shards").at(1234)


def test_the_draws_never_change_by_accident() -> None:
    drawn = list(map(RowOrder((5,), 7, 0, True).at, range(12)))
    assert drawn[:5] == [(0, 0), (1, 0), (4, 0), (3, 0), (2, 0)]
    assert drawn[5:] == [(4, 1), (0, 1), (1, 1), (3, 1), (2, 1), (0, 2), (4, 2)]
    assert [row for row, _ in map(RowOrder((2, 1, 2), 7, 0, "shards").at, range(10))] == [2, 0, 1, 3, 4, 3, 4, 2, 0, 1]


def test_sources_are_mixed_by_a_literal_schedule() -> None:
    assert schedule([3, 1], 8) == [0, 0, 1, 0, 0, 0, 1, 0]
    assert schedule([0.7, 0.2, 0.1], 10) == [0, 0, 1, 0, 2, 0, 0, 1, 0, 0]


def test_sources_of_any_size_end_their_epoch_together() -> None:
    sizes = [300, 70, 30, 7, 1]
    for epoch in range(1, 4):
        counts = Counter(schedule([float(size) for size in sizes], epoch * sum(sizes)))
        assert [counts[i] for i in range(5)] == [epoch * size for size in sizes]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=8), st.integers(1, 400))
def test_every_source_keeps_its_share_after_any_number_of_draws(weights: list[int], draws: int) -> None:
    counts = Counter(schedule([float(weight) for weight in weights], draws))
    for source, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(counts[source] - draws * share) <= (1 + len(weights) * share) / 2 + 1e-9


@given(st.lists(st.integers(1, 100), min_size=1, max_size=3), st.integers(1, 400))
def test_up_to_three_sources_stay_within_one_draw_of_their_shares(weights: list[int], draws: int) -> None:
    counts = Counter(schedule([float(weight) for weight in weights], draws))
    assert all(abs(counts[i] - draws * weight / sum(weights)) < 1 for i, weight in enumerate(weights))


def test_a_source_at_its_limit_is_passed_over_until_all_are() -> None:
    assert schedule([5, 3, 2], 5, [1, 2, 1]) == [0, 1, 2, 1, None]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 99, 255, 256, 257, 1000, 4097])
def test_an_output_of_a_permutation_leads_back_to_its_index(size: int) -> None:
    keys = round_keys("back", size)
    indices = np.arange(size)
    assert unpermute(permute(indices, size, keys), size, keys).tolist() == indices.tolist()


def test_an_output_of_a_large_permutation_leads_back_to_its_index() -> None:
    keys = round_keys("back")
    indices = np.array([0, 1, 17, 10**9, 10**12 - 1])
    assert unpermute(permute(indices, 10**12, keys), 10**12, keys).tolist() == indices.tolist()


@pytest.mark.parametrize("shuffle", [True, False, "shards"])
@pytest.mark.parametrize("sizes", [(7,), (3, 0, 4, 1), (300, 20)])
def test_a_row_leads_back_to_its_draw(shuffle: Any, sizes: tuple[int, ...]) -> None:
    order = RowOrder(sizes, 5, 0, shuffle)
    for epoch in (2, 0):
        draws = range(epoch * order.rows, (epoch + 1) * order.rows)
        rows = np.array([order.at(draw)[0] for draw in draws])
        assert order.draws_of(rows, epoch).tolist() == list(draws)


def test_rows_lead_back_to_draws_after_a_change_of_files_only() -> None:
    past = [PastOrder(epochs=2, files=((2, 0),))]
    order = RowOrder((3,), 5, 0, True, past)
    rows = np.array([order.at(draw)[0] for draw in range(4, 7)])
    assert order.draws_of(rows, 2).tolist() == [4, 5, 6]
    with pytest.raises(ValueError, match="epoch 1 had other files than epoch 2; give a later epoch"):
        order.draws_of(rows, 1)
