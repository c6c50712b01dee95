"""Planning on lengths, building of packs, and the node that does both a window at a time."""

from __future__ import annotations

import itertools
import math
import pickle
import random
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftstream import IGNORE_INDEX, Example, Pack, Refusal, Segment
from sftstream.records import Ref
from sftstream.state import Leftover, StreamState
from sftstream.streaming.graph import Map
from sftstream.streaming.packer import MAX_WAIT, MOST_REFUSED, Packer, PackerConfig
from sftstream.streaming.packing import (
    WindowPlan,
    WindowSize,
    build_pack,
    packs_of_stream,
    plan_last_window,
    plan_packs,
    plan_window,
    ramped,
    window_size,
)
from sftstream.streaming.sampler import IndexedCursor, RowSampler

X = IGNORE_INDEX
PAD = 9


def example(tokens: Sequence[int], mask: Sequence[int]) -> Example:
    return Example(np.array(tokens, np.int32), np.array(mask, bool), sum(mask[1:]))


def test_two_conversations_and_padding_make_these_arrays() -> None:
    first, second = example([1, 2, 3, 4], [0, 0, 1, 1]), example([5, 6, 7], [1, 0, 1])
    segments = [Segment(0, 11, 4, 0), Segment(1, 22, 3, 2)]
    pack = build_pack([first, second], segments, 10, PAD)
    assert pack.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 9, 9, 9]
    assert pack.labels.tolist() == [X, 3, 4, X, X, 7, X, X, X, X]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
    assert pack.cu_seqlens.tolist() == [0, 4, 7, 10]
    assert pack.max_seqlen == 4
    assert pack.segments == tuple(segments)
    assert (pack.capacity, pack.tokens, pack.trained_tokens) == (10, 7, 3)
    assert (pack.refused, pack.exhausted) == ((), False)
    kinds = [tensor.dtype for tensor in (pack.input_ids, pack.labels, pack.position_ids, pack.cu_seqlens)]
    assert kinds == [torch.int64, torch.int64, torch.int64, torch.int32]


def test_a_full_pack_has_no_padding_segment() -> None:
    pack = build_pack([example([1, 2], [1, 1]), example([3], [1])], [Segment(0, 0, 2, 0), Segment(0, 1, 1, 0)], 3, PAD)
    assert pack.cu_seqlens.tolist() == [0, 2, 3]
    assert pack.labels.tolist() == [2, X, X]
    assert pack.max_seqlen == 2


def test_a_long_padding_counts_as_a_segment() -> None:
    pack = build_pack([example([1], [1])], [Segment(0, 0, 1, 0)], 5, PAD)
    assert pack.cu_seqlens.tolist() == [0, 1, 5]
    assert pack.max_seqlen == 4


def test_an_empty_pack_is_padding_alone() -> None:
    pack = build_pack([], [], 4, PAD, exhausted=True)
    assert pack.input_ids.tolist() == [9, 9, 9, 9]
    assert pack.labels.tolist() == [X, X, X, X]
    assert pack.position_ids.tolist() == [0, 1, 2, 3]
    assert pack.cu_seqlens.tolist() == [0, 4]
    assert (pack.max_seqlen, pack.tokens, pack.trained_tokens, pack.exhausted) == (4, 0, 0, True)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), max_size=6), st.integers(0, 5))
def test_labels_are_the_next_trained_tokens_and_never_cross_a_segment(masks: list[list[bool]], free: int) -> None:
    token = iter(range(1, 1000))
    examples = [example([next(token) for _ in mask], mask) for mask in masks]
    segments = [Segment(0, i, len(mask), 0) for i, mask in enumerate(masks)]
    capacity = sum(map(len, masks)) + free
    if not capacity:
        return
    pack = build_pack(examples, segments, capacity, 0)
    ids, labels = pack.input_ids.tolist(), pack.labels.tolist()
    borders = pack.cu_seqlens.tolist()
    assert borders == sorted(set(borders))
    assert (borders[0], borders[-1]) == (0, capacity)
    whole = [flag for mask in masks for flag in mask] + [False] * free
    for start, end in itertools.pairwise(borders):
        assert labels[end - 1] == X
        assert pack.position_ids[start:end].tolist() == list(range(end - start))
        assert [labels[t] for t in range(start, end - 1)] == [
            ids[t + 1] if whole[t + 1] else X for t in range(start, end - 1)
        ]
    assert pack.max_seqlen == max(b - a for a, b in itertools.pairwise(borders))


@pytest.mark.parametrize("asked", [False, True])
def test_a_pack_through_a_queue_is_the_same_pack(asked: bool) -> None:
    pack = build_pack(
        [example([1, 2, 3], [0, 1, 1])],
        [Segment(0, 5, 3, 1)],
        6,
        PAD,
        [Refusal(0, 1, 0, "why", "because")],
        exhausted=True,
    )
    if asked:  # what was made of it for a model stays behind
        assert pack.labels.tolist() == [2, 3, X, X, X, X]
        assert pack.position_ids.tolist() == [0, 1, 2, 0, 1, 2]
    copy = pickle.loads(pickle.dumps(pack))
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(copy, name), getattr(pack, name))
        assert getattr(copy, name).dtype == getattr(pack, name).dtype
    assert (copy.max_seqlen, copy.segments, copy.refused, copy.exhausted) == (3, pack.segments, pack.refused, True)
    assert copy.digest() == pack.digest()


def test_a_whole_pack_of_8192_tokens_fits_into_a_pipe() -> None:
    """What does not would wait for a worker that is busy with the next one."""
    lengths = [128] * 64
    examples = [example(range(n), [0] + [1] * (n - 1)) for n in lengths]
    pack = build_pack(examples, [Segment(0, row, n, 0) for row, n in enumerate(lengths)], 8192, PAD)
    assert len(pickle.dumps(pack)) < 65536


def test_a_digest_tells_ids_labels_and_borders_apart_and_nothing_else() -> None:
    def digest(tokens: Sequence[int], mask: Sequence[int], *cuts: int) -> str:
        examples = [example(tokens[a:b], mask[a:b]) for a, b in zip((0, *cuts), (*cuts, len(tokens)), strict=True)]
        segments = [Segment(0, 0, len(part.tokens), 0) for part in examples]
        return build_pack(examples, segments, len(tokens), 0).digest()

    digests = [
        digest([1, 2, 3, 4], [0, 1, 1, 1]),
        digest([1, 2, 3, 5], [0, 1, 1, 1]),
        digest([1, 2, 3, 4], [0, 0, 1, 1]),
        digest([1, 2, 3, 4], [0, 1, 1, 1], 2),
        digest([1, 2, 3, 4], [0, 1, 1, 1], 3),
    ]
    assert len(set(digests)) == 5
    assert digests[0] == "0ef111cfe9d11375f5d3598f3bbfeccd5139f831a96e79db27706c5b2c814471"
    other = Segment(0, 1, 4, 0)
    again = build_pack(
        [example([1, 2, 3, 4], [0, 1, 1, 1])], [other], 4, 0, [Refusal(0, 0, 0, "a", "b")], exhausted=True
    )
    assert again.digest() == digests[0]


def lengths_and_urgency() -> Any:
    items = st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=60)
    return st.integers(50, 120).flatmap(lambda capacity: st.tuples(st.just(capacity), items))


@given(lengths_and_urgency())
def test_a_plan_holds_each_conversation_once_and_no_pack_over_capacity(
    case: tuple[int, list[tuple[int, bool]]],
) -> None:
    capacity, items = case
    lengths, urgent = [length for length, _ in items], [urgency for _, urgency in items]
    plan = plan_packs(lengths, capacity, urgent)
    assert sorted(index for pack in plan for index in pack) == list(range(len(items)))
    loads = sorted(sum(lengths[i] for i in pack) for pack in plan)
    assert all(0 < load <= capacity for load in loads)
    if len(loads) > 1:
        assert loads[0] + loads[1] > capacity  # else best fit would have joined the two


@given(lengths_and_urgency())
def test_urgent_examples_fill_the_first_packs_as_if_they_were_alone(case: tuple[int, list[tuple[int, bool]]]) -> None:
    capacity, items = case
    lengths, urgent = [length for length, _ in items], [urgency for _, urgency in items]
    alone = [length for length, urgency in items if urgency]
    packs_alone = len(plan_packs(alone, capacity, [True] * len(alone)))
    holding = [any(urgent[i] for i in pack) for pack in plan_packs(lengths, capacity, urgent)]
    assert holding == [True] * packs_alone + [False] * (len(holding) - packs_alone)


def test_a_plan_is_best_fit_decreasing() -> None:
    assert plan_packs([4, 8, 1, 4, 2, 1], 10, [False] * 6) == [[1, 4], [0, 3, 2, 5]]
    assert plan_packs([4, 8, 1, 4, 2, 1], 10, [True, False, False, False, False, False]) == [[0, 3, 4], [1, 2, 5]]
    assert plan_packs([], 10, []) == []
    assert plan_packs([10, 10], 10, [False, False]) == [[0], [1]]


def test_a_window_leaves_its_emptiest_packs_and_fills_the_others_from_them() -> None:
    assert plan_packs([6, 3, 5, 2, 2], 10, [False] * 5) == [[0, 1], [2, 3, 4]]
    assert plan_window([6, 3, 5, 2, 2], 10, [False] * 5) == WindowPlan([[0, 4, 3]], [1, 2])
    assert plan_last_window([6, 3, 5, 2, 2], 10, [False] * 5) == [[0, 4, 3], [2, 1]]
    # 3 + 3 take the place of 5, and one of two free slots is filled.
    assert plan_packs([5, 5, 3, 3, 3], 12, [False] * 5) == [[0, 1], [2, 3, 4]]
    assert plan_window([5, 5, 3, 3, 3], 12, [False] * 5) == WindowPlan([[0, 3, 2]], [1, 4])
    assert plan_window([6, 3, 5, 2, 2], 10, [True] * 5) == WindowPlan([[0, 1], [2, 3, 4]], [])
    assert plan_window([], 10, []) == WindowPlan([], [])


@given(lengths_and_urgency())
def test_a_window_plans_or_leaves_each_example_once_and_leaves_no_urgent_one(
    case: tuple[int, list[tuple[int, bool]]],
) -> None:
    capacity, items = case
    lengths, urgent = [length for length, _ in items], [urgency for _, urgency in items]
    packs, left = plan_window(lengths, capacity, urgent)
    assert sorted([*(index for pack in packs for index in pack), *left]) == list(range(len(items)))
    assert all(0 < sum(lengths[i] for i in pack) <= capacity for pack in packs)
    assert not any(urgent[index] for index in left)
    whole = plan_last_window(lengths, capacity, urgent)
    assert sorted(index for pack in whole for index in pack) == list(range(len(items)))
    assert all(0 < sum(lengths[i] for i in pack) <= capacity for pack in whole)
    assert len(packs) <= len(plan_packs(lengths, capacity, urgent))


def test_the_first_windows_are_small_and_then_spread_over_the_streams() -> None:
    assert [ramped(256, 0, stream, 4) for stream in range(4)] == [32, 32, 32, 32]
    assert [ramped(256, 1, stream, 4) for stream in range(4)] == [88, 144, 200, 256]
    assert [ramped(256, windows, 1, 4) for windows in (2, 3, 100)] == [256, 256, 256]
    assert [ramped(1, windows, 0, 64) for windows in (0, 1, 2)] == [1, 1, 1]


def test_a_window_holds_several_packs_and_the_last_window_all_rows_left() -> None:
    assert window_size(256, 8192, 0, 0, 4, None) == WindowSize(32, 0, 32)
    assert window_size(256, 8192, 1, 1, 4, 5000) == WindowSize(144, 0, 144)
    assert window_size(256, 8192, 2, 0, 4, 513) == WindowSize(256, 32768, 1024)
    assert window_size(256, 8192, 2, 0, 4, 512) == WindowSize(512, 0, 512)
    assert window_size(256, 8192, 0, 0, 4, 400) == WindowSize(512, 0, 512)
    size = WindowSize(256, 32768, 1024)
    assert [size.missing(*read) for read in ((0, 0), (200, 9000), (256, 32768), (256, 16384), (1000, 100))] == [
        *(256, 56, 0, 256, 24),
    ]
    assert size.missing(1024, 100) == 0


class LengthReader:
    """Examples of given lengths; the tokens of a row are its number."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths

    def expect(self, ref: Ref) -> None:
        """Every row can be read again at any time."""

    def remember(self, bookmarks: object) -> None:
        """Every row can be read at any time."""

    def examples(self, ref: Ref) -> list[Example]:
        length = self.lengths[ref.row]
        return [Example(np.full(length, ref.row, np.int32), np.ones(length, bool), length - 1)]


def require_own_tokens(packs: Iterable[Pack]) -> None:
    """Each segment holds the tokens of the row that it names."""
    for pack in packs:
        named = [segment.row for segment in pack.segments for _ in range(segment.length)]
        assert pack.ids[: len(named)].tolist() == named


class RecordedPacker(Packer):
    """Notes in `ends` the rows read before and after each window."""

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.ends = [self.state.drawn[0]]

    def _plan_window(self) -> list[Refusal]:
        refused = super()._plan_window()
        self.ends.append(self.state.drawn[0])
        return refused


def packer(
    lengths: Sequence[int], capacity: int, window: int = 16, *, endless: bool = False, shuffle: bool = True
) -> RecordedPacker:
    epochs = None if endless else 1
    config = tiny.data_config("", "", streams=1, shuffle=False, epochs=epochs, sources=[{"path": "rows"}])
    sampler = RowSampler(config, [IndexedCursor((len(lengths),), config, 0, 0)])
    reader = LengthReader(lengths)
    source = Map(sampler, lambda refs: [reader.examples(ref) for ref in refs])
    settings = PackerConfig(capacity, window, streams=1, seed=0, shuffle=shuffle, pad_id=0)
    node = RecordedPacker(source, sampler, reader, 0, settings)
    node.reset()
    return node


def until_exhausted(node: Packer) -> list[Pack]:
    packs = []
    while not node.state.exhausted:
        packs.append(next(node))
    return packs


@given(st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(40, 100), st.integers(1, 50))
def test_every_conversation_leaves_in_one_pack(lengths: list[int], capacity: int, window: int) -> None:
    packs = until_exhausted(packer(lengths, capacity, window))
    assert sorted(segment.row for pack in packs for segment in pack.segments) == list(range(len(lengths)))
    assert [pack.exhausted for pack in packs] == [False] * (len(packs) - 1) + [True]
    assert all(pack.segments for pack in packs)
    require_own_tokens(packs)


def test_a_leftover_that_is_drawn_again_has_its_own_tokens_in_both_packs() -> None:
    """As when a file grew, and somebody accepted that."""
    node = packer([6, 4, 4], 10, 64, shuffle=False)
    leftovers = (Leftover(Segment(0, 0, 6, 0), 0),)
    edited = msgspec.structs.replace(node.state, leftovers=leftovers, digests=msgspec.UNSET)
    node.reset(msgspec.to_builtins(edited))
    packs = until_exhausted(node)
    assert [[segment.row for segment in pack.segments] for pack in packs] == [[0, 1], [0, 2]]
    require_own_tokens(packs)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(40, 100), st.integers(1, 50))
def test_no_conversation_waits_longer_than_promised(lengths: list[int], capacity: int, window: int) -> None:
    node = packer(lengths, capacity, window)
    while not node.state.exhausted:
        pack = next(node)
        planned_in = node.state.windows - 1
        read_in = [w for w, (first, end) in enumerate(itertools.pairwise(node.ends)) for _ in range(first, end)]
        assert all(planned_in - read_in[segment.row] <= MAX_WAIT for segment in pack.segments)
        assert all(
            leftover.waited == planned_in - read_in[leftover.segment.row] + 1 for leftover in node.state.leftovers
        )


def test_packs_leave_in_the_order_of_their_first_conversation_unless_shuffled() -> None:
    draw = random.Random(1)
    lengths = [draw.randint(5, 30) for _ in range(200)]
    orders = []
    for shuffle in (False, True):
        node = packer(lengths, 64, 200, shuffle=shuffle)
        packs = until_exhausted(node)
        rows = [[segment.row for segment in pack.segments] for pack in packs if pack.segments[-1].row >= 25]
        assert all(row == sorted(row) for row in rows)  # the window's first 25 rows may be leftovers of the one before
        orders.append([row[0] for row in rows])
    assert orders[0] == sorted(orders[0])
    assert orders[1] != sorted(orders[1])
    assert sorted(orders[1]) == orders[0]


PINNED = [(7 * i * i + 11 * i) % 37 + 4 for i in range(40)]


def test_the_plan_of_a_stream_never_changes_by_accident() -> None:
    packs = until_exhausted(packer(PINNED, 64, 8))
    assert [[segment.row for segment in pack.segments] for pack in packs] == [
        *([3, 4, 6], [1, 2, 8], [5, 14, 17, 22], [10, 20], [13, 21], [0, 7, 9, 19], [26, 29, 31], [16, 27, 32]),
        *([12, 18], [25, 33], [11, 15, 23, 30], [35, 36, 39], [24, 37, 38], [28, 34]),
    ]


def test_a_stream_begun_under_format_3_keeps_the_plan_of_that_format() -> None:
    node = packer(PINNED, 64, 24)
    node.reset(msgspec.to_builtins(msgspec.structs.replace(node.state, planning=msgspec.UNSET)))
    packs = until_exhausted(node)
    assert msgspec.convert(node.get_state(), StreamState).planning is msgspec.UNSET
    assert [[segment.row for segment in pack.segments] for pack in packs] == [
        *([10, 20], [3, 23], [2, 7, 8, 22], [13, 21], [0, 4, 5, 9, 11, 14, 24], [12, 25], [6, 16, 26]),
        *([15, 17, 18], [27, 38], [28, 33], [30, 31, 32, 34], [29, 37], [1, 19], [35, 36, 39]),
    ]


@pytest.mark.parametrize(("capacity", "fill"), [(2048, 0.997), (4096, 0.998), (8192, 0.999)])
def test_packs_of_common_lengths_are_almost_full(capacity: int, fill: float) -> None:
    draw = random.Random(0)
    lengths = [min(capacity, max(16, round(math.exp(draw.gauss(5.8, 0.9))))) for _ in range(12_000)]
    node = packer(lengths, capacity, 256, endless=True)
    while node.state.drawn[0] < len(lengths):
        next(node)
    assert node.state.tokens / (node.state.packs * capacity) >= fill


def test_many_short_conversations_fill_large_packs() -> None:
    """A window of 16 fills a third of a pack, so the stream reads more at a time, up to four windows."""
    node = packer([20 + i % 7 for i in range(3000)], 1000)
    packs = until_exhausted(node)
    assert len(packs) <= -(-sum(pack.tokens for pack in packs) // 1000) + 1
    assert max(end - first for first, end in itertools.pairwise(node.ends)) == 4 * 16


@pytest.mark.parametrize("count", [3, 30, 32, 40, 100])
def test_the_end_of_a_run_leaves_one_pack_partly_filled(count: int) -> None:
    """Conversations of a tenth of a pack: with the last ones planned alone several packs had room."""
    draw = random.Random(count)
    lengths = [draw.randint(10, 150) for _ in range(count)]
    packs = until_exhausted(packer(lengths, 1000))
    assert len(packs) == -(-sum(lengths) // 1000)


def test_a_small_stream_is_planned_as_a_whole() -> None:
    node = packer([30] * 32, 100)
    next(node)
    assert node.ends == [0, 32]


def test_a_stream_is_foreseen_as_it_is_packed() -> None:
    draw = random.Random(5)
    for _ in range(20):
        capacity, window, count = draw.choice([64, 200]), draw.choice([4, 16]), draw.randint(1, 300)
        lengths = [draw.randint(1, 40) for _ in range(count)]
        packed, foreseen = (
            len(until_exhausted(packer(lengths, capacity, window))),
            packs_of_stream(lengths, capacity, window),
        )
        assert abs(packed - foreseen) <= 1 + packed // 50


def test_a_window_of_few_short_conversations_waits_for_company() -> None:
    packs = until_exhausted(packer([10] * 64, 100, 8))
    assert sum(pack.tokens for pack in packs) / (100 * len(packs)) > 0.9


@pytest.mark.parametrize("lengths", [[50], [50, 60, 70]])
def test_an_endless_stream_of_refused_rows_gives_an_empty_pack_now_and_then(lengths: list[int]) -> None:
    """So a run comes to the border of a step, where refusals are judged."""
    node = packer(lengths, 40, endless=True)
    for number in range(1, 4):
        pack = next(node)
        assert (pack.segments, pack.exhausted, len(pack.refused)) == ((), False, MOST_REFUSED)
        assert node.state.refused == ({"longer than capacity": number * MOST_REFUSED},)


def test_a_window_ends_early_after_many_refused_rows() -> None:
    node = packer([50] * 999 + [40] * 2 + [50] * 2 + [40] * 20, 40, window=24, shuffle=False)
    packs = [next(node) for _ in range(3)]
    assert [len(pack.refused) for pack in packs] == [MOST_REFUSED, 0, 1]
    assert [pack.segments for pack in packs[:2]] == [(Segment(0, row, 40, 0),) for row in (999, 1000)]


def test_a_conversation_longer_than_a_pack_is_refused_and_counted() -> None:
    node = packer([10, 41, 40], 40)
    packs = until_exhausted(node)
    assert [pack.tokens for pack in packs] in ([10, 40], [40, 10])
    refused = (
        Refusal(
            0,
            1,
            0,
            "longer than capacity",
            "41 tokens do not fit into a pack of 40; raise data.capacity, or set data.overflow",
        ),
    )
    assert packs[0].refused == refused
    assert node.state.refused == ({"longer than capacity": 1},)


def test_a_stream_with_nothing_to_train_is_exhausted_after_one_empty_pack() -> None:
    node = packer([50, 60], 40)
    pack = next(node)
    assert (pack.segments, pack.exhausted, len(pack.refused)) == ((), True, 2)
    assert (node.state.exhausted, node.state.packs) == (True, 0)
    assert next(node).segments == ()


def test_an_exhausted_stream_gives_empty_packs_for_ever_and_its_state_stands_still() -> None:
    node = packer([10, 20], 40)
    until_exhausted(node)
    state = node.state
    for _ in range(3):
        pack = next(node)
        assert (pack.segments, pack.trained_tokens, pack.exhausted) == ((), 0, True)
    assert node.state == state


def test_a_planned_conversation_is_read_again_after_a_reset_and_must_be_the_same() -> None:
    lengths = [10, 20, 30, 15]
    state = packer(lengths, 40, 32)
    next(state)
    saved = msgspec.to_builtins(state.state)
    assert saved["planned"]
    changed = packer(lengths, 40, 32)
    lengths[:] = [11, 21, 31, 16]
    changed.reset(saved)
    with pytest.raises(
        ValueError, match=r"row \d of source 0 has \d\d tokens and had \d\d when its window was read: the source chan"
    ):
        next(changed)


def test_an_unread_state_is_a_fresh_value_each_time() -> None:
    node = packer([10, 20, 30, 15, 5, 5], 40, 2)
    states = []
    while not node.state.exhausted:
        states.append((node.get_state(), msgspec.json.encode(node.state)))
        next(node)
    assert all(msgspec.json.encode(state) == encoded for state, encoded in states)
    assert len({encoded for _, encoded in states}) == len(states)
