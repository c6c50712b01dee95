"""Divide examples into packs by their lengths, and build a pack from examples: pure functions."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from sftstream.records import Example, Pack, Refusal, Segment

SPARE = 64
"""Number of leftovers at which a window stops dissolving packs (see `plan_window`). Among 64
examples there are nearly always some whose lengths add up to exactly the tokens that an exchange
must bring into a pack. With 16 instead of 64, the fill of packs of real conversations is lower, by
at most 0.2 %."""
SHARE_LEFT = 3
"""At most 1 / `SHARE_LEFT` of a window's packs are dissolved; of fewer than `SHARE_LEFT` packs, at
most one."""
MOST_USEFUL = 8
"""Number of packs in a window, those with the most free slots, that always exchange. Further packs
exchange only while the window has more than one free slot per pack."""
EXCHANGED = 4
"""Largest number of examples that leave a pack in an exchange."""
MOST_TOKENS_EXCHANGED = 1 << 15
"""Largest number of tokens that an exchange brings into a pack. The limit bounds the time:
`_gaps` computes with integers of this many bits."""
CAPACITIES_OF_A_WINDOW = 4
"""Tokens that a window should hold, in multiples of the capacity. A window of short examples reads
further examples until it holds these tokens, and so has several packs to plan."""
LONGEST_WINDOW = 4
"""Largest number of examples in a window, in multiples of `data.window`."""


def plan_packs(lengths: Sequence[int], capacity: int, urgent: Sequence[bool]) -> list[list[int]]:
    """Divide the indices of `lengths` into packs: best-fit decreasing, O(n log n).

    Examples are placed from the longest to the shortest, `urgent` examples (leftovers that have
    waited for the longest time allowed) before all others. Each
    example goes into the fullest pack that has enough room, or else opens a new pack. No length may
    exceed `capacity`.

    Example: for the lengths `[60, 30, 50, 40]`, capacity 100 and no urgent examples, the result is
    `[[0, 3], [2, 1]]`. The example of 60 tokens opens the first pack, 50 opens the second, 40 fills
    the first, and 30 goes into the second.
    """
    packs, _ = _best_fit(lengths, capacity, urgent)
    return packs


def _best_fit(
    lengths: Sequence[int], capacity: int, urgent: Sequence[bool]
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Return the packs of `plan_packs`, and `(room, pack)` for each pack, the fullest pack first.

    `room` is the number of free slots, and `pack` the index of the pack.
    """
    count = len(lengths)
    packs: list[list[int]] = []
    # For each pack the code `room * count + pack`, sorted: integers compare faster than tuples.
    free: list[int] = []
    order = sorted(range(count), key=lengths.__getitem__, reverse=True)
    if True in urgent:
        order = [index for index in order if urgent[index]] + [index for index in order if not urgent[index]]
    for index in order:
        needed = lengths[index] * count
        at = bisect_left(free, needed)
        if at < len(free):
            code = free.pop(at)
            packs[code % count].append(index)
        else:
            code = capacity * count + len(packs)
            packs.append([index])
        insort(free, code - needed)
    return packs, [divmod(code, count) for code in free]


class WindowPlan(NamedTuple):
    """The plan of a window: for each pack the indices of its examples, and the indices of the
    examples left for the next window."""

    packs: list[list[int]]
    left: list[int]


def plan_window(lengths: Sequence[int], capacity: int, urgent: Sequence[bool]) -> WindowPlan:
    """Plan almost full packs, and leave the other examples for the next window.

    The emptiest packs of `plan_packs` are dissolved: their examples become leftovers. Dissolving
    stops at `SPARE` leftovers, or when 1 / `SHARE_LEFT` of the packs are dissolved. Full packs and
    packs with an `urgent` example are never dissolved. Then the other packs, the emptiest first,
    exchange up to `EXCHANGED` of their shortest examples for left examples that together fill the
    pack exactly, or else as far as possible. Exchanges end when they are of little use
    (see `MOST_USEFUL`).

    Example: for the lengths `[6, 3, 5, 2, 2]` and capacity 10, the packs of `plan_packs` are 6 + 3
    and 5 + 2 + 2. The second pack is dissolved, and the first pack exchanges 3 for 2 + 2. The
    result is `([[0, 4, 3]], [1, 2])`.
    """
    packs, rooms = _best_fit(lengths, capacity, urgent)
    dissolved = _emptiest(packs, rooms, urgent)
    left = sorted([index for pack in dissolved for index in packs[pack]])
    kept = [(room, pack) for room, pack in reversed(rooms) if pack not in dissolved]
    free = sum([room for room, _ in kept])
    for number, (room, pack) in enumerate(kept):
        if not room or (number >= MOST_USEFUL and free <= len(kept)):
            break
        free -= _exchange(packs[pack], room, left, lengths, urgent)
    return WindowPlan([pack for number, pack in enumerate(packs) if number not in dissolved], sorted(left))


def plan_last_window(lengths: Sequence[int], capacity: int, urgent: Sequence[bool]) -> list[list[int]]:
    """Return packs of all examples: the packs of `plan_window`, then packs of the left examples."""
    packs, left = plan_window(lengths, capacity, urgent)
    rest = plan_packs([lengths[index] for index in left], capacity, [False] * len(left))
    return [*packs, *([left[index] for index in pack] for pack in rest)]


def plan_window_of_format_3(lengths: Sequence[int], capacity: int, urgent: Sequence[bool]) -> WindowPlan:
    """Plan a window by the rules of format 3, for a stream that began under format 3.

    Only the examples of the emptiest pack without an urgent example are left, without exchanges.
    """
    packs = plan_packs(lengths, capacity, urgent)
    patient = [pack for pack in packs if not any([urgent[index] for index in pack])]
    left = min(patient, key=lambda pack: sum([lengths[index] for index in pack]), default=[])
    return WindowPlan([pack for pack in packs if pack is not left], sorted(left))


def _emptiest(packs: Sequence[Sequence[int]], rooms: Sequence[tuple[int, int]], urgent: Sequence[bool]) -> set[int]:
    """Return the indices of the packs to dissolve; `rooms` is the second result of `_best_fit`."""
    dissolved: set[int] = set()
    examples = 0
    most = max(1, len(packs) // SHARE_LEFT)
    for room, pack in reversed(rooms):
        if not room or examples >= SPARE or len(dissolved) == most:
            break
        if not any([urgent[index] for index in packs[pack]]):
            dissolved.add(pack)
            examples += len(packs[pack])
    return dissolved


def _exchange(pack: list[int], room: int, left: list[int], lengths: Sequence[int], urgent: Sequence[bool]) -> int:
    """Exchange the last examples of `pack` for examples of `left`, to fill its `room` free slots.

    Modifies `pack` and `left`, and returns the number of slots filled. Does nothing if no exchange
    makes the pack fuller.
    """
    # goals[n]: the free slots of the pack without its last n + 1 examples.
    goals: list[int] = []
    goal = room
    for index in pack[: -EXCHANGED - 1 : -1]:
        if urgent[index]:
            break
        goal += lengths[index]
        if goal > MOST_TOKENS_EXCHANGED:
            break
        goals.append(goal)
    if not goals:
        return 0
    gaps = _gaps(left, lengths, goals)
    gap = (gaps[-1] & -gaps[-1]).bit_length() - 1  # the lowest bit
    if gap >= room:
        return 0
    taken = _summands(left, lengths, gaps, gap)
    count = 1 + goals.index(gap + sum([lengths[left[at]] for at in taken]))
    moved = pack[-count:]
    pack[-count:] = [left[at] for at in taken]
    for at in taken:
        del left[at]
    left += moved
    return room - gap


def _gaps(left: Sequence[int], lengths: Sequence[int], goals: Sequence[int]) -> list[int]:
    """Return how many slots may stay free with the first 0, 1, 2, ... examples of `left`.

    The counts for the first `n` examples are the bits of an integer: bit 7 is set if the lengths
    of some of the `n` examples have a sum that is 7 below a goal. The result ends with the first
    integer that has bit 0: the sum is equal to a goal.
    """
    gaps = 0
    for goal in goals:
        gaps |= 1 << goal
    result = [gaps]
    for index in left:
        gaps |= gaps >> lengths[index]
        result.append(gaps)
        if gaps & 1:
            break
    return result


def _summands(left: Sequence[int], lengths: Sequence[int], gaps: Sequence[int], gap: int) -> list[int]:
    """Return indices in `left`, the highest first, of examples that leave `gap` slots free.

    `gaps` is the result of `_gaps`.
    """
    taken: list[int] = []
    for at in range(len(gaps) - 2, -1, -1):
        if not gaps[at] >> gap & 1:
            taken.append(at)
            gap += lengths[left[at]]
    return taken


def copied(examples: Sequence[Example]) -> list[Example]:
    """Return copies of `examples` in new arrays, so that the arrays of `examples` can be freed."""
    if not examples:
        return []
    whole = joined(examples)
    ends = list(accumulate([len(example.tokens) for example in examples]))
    return [
        Example(whole.tokens[start:end], whole.loss_mask[start:end], example.targets)
        for example, start, end in zip(examples, [0, *ends], ends, strict=False)
    ]


def joined(examples: Sequence[Example]) -> Example:
    """Return one example with the tokens of all `examples`, in order."""
    return Example(
        np.concatenate([example.tokens for example in examples]),
        np.concatenate([example.loss_mask for example in examples]),
        sum([example.targets for example in examples]),
    )


def example_digest(example: Example) -> int:
    """Return a 32-bit digest of an example's tokens and loss mask.

    An example that fills a pack takes a microsecond.
    Raises ValueError if an array is not contiguous in memory.
    """
    # xxhash accepts any object with a buffer, but its type hints name bytes only.
    tokens: Any = example.tokens
    mask: Any = example.loss_mask
    return xxhash.xxh3_64_intdigest(mask, xxhash.xxh3_64_intdigest(tokens)) & 0xFFFFFFFF


def build_pack(
    examples: Sequence[Example],
    segments: Sequence[Segment],
    capacity: int,
    pad_id: int,
    refused: Sequence[Refusal] = (),
    exhausted: bool = False,
) -> Pack:
    """Return a pack with the tokens of `examples`, padded to `capacity` with `pad_id`.

    The tokens of `examples`, concatenated, are the tokens of `segments` in order. A single example
    may hold the tokens of several segments (see `joined`). For segments of 3 and 2 tokens and
    capacity 8, the borders are `[0, 3, 5, 8]`.
    """
    lengths = [segment.length for segment in segments]
    used = sum(lengths)
    if used < capacity:
        lengths.append(capacity - used)
    borders = np.array([0, *accumulate(lengths)], np.int32)
    ids, trained = _filled(examples, used, capacity, pad_id)
    return Pack(ids, trained, borders, tuple(segments), tuple(refused), exhausted)


def _filled(
    examples: Sequence[Example], used: int, capacity: int, pad_id: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Return the tokens and the loss mask of a pack. A single example that fills the pack is not
    copied."""
    if used == capacity and len(examples) == 1:
        return examples[0].tokens, examples[0].loss_mask
    ids = np.full(capacity, pad_id, np.int32)
    trained = np.zeros(capacity, bool)
    if examples:
        np.concatenate([example.tokens for example in examples], out=ids[:used])
        np.concatenate([example.loss_mask for example in examples], out=trained[:used])
    return ids, trained


class WindowSize(NamedTuple):
    """The size at which a window ends: `most` examples, or at least `least` examples with together
    at least `tokens` tokens."""

    least: int
    tokens: int
    most: int

    def missing(self, examples: int, tokens: int) -> int:
        """Return the estimated number of examples missing from a window; 0 if it is complete.

        The window has `examples` examples with together `tokens` tokens.
        """
        if examples < self.least:
            return self.least - examples
        if tokens >= self.tokens or examples >= self.most:
            return 0
        return min(self.most - examples, -(-(self.tokens - tokens) * examples // tokens))


def window_size(
    window: int, capacity: int, windows: int, stream: int, streams: int, rows_left: int | None
) -> WindowSize:
    """Return the size of a stream's next window, after `windows` planned windows.

    If at most `2 * window` rows are left, the window holds them all. The first window is an eighth
    of `window`, for an early first pack. The second window differs from stream to stream, since
    otherwise all streams would read their windows during the same step.
    """
    if rows_left is not None and rows_left <= 2 * window:
        return WindowSize(2 * window, 0, 2 * window)
    size = ramped(window, windows, stream, streams)
    if windows < 2:
        return WindowSize(size, 0, size)
    return WindowSize(size, CAPACITIES_OF_A_WINDOW * capacity, LONGEST_WINDOW * window)


def ramped(window: int, windows: int, stream: int, streams: int) -> int:
    """Return the least number of examples in a stream's next window: an eighth of `window` in the
    first, a number that rises from stream to stream in the second, `window` in all others."""
    if windows == 0:
        return max(1, window // 8)
    if windows == 1:
        return max(1, window // 8 + (window - window // 8) * (stream + 1) // streams)
    return window


def packs_of_stream(lengths: Sequence[int], capacity: int, window: int) -> int:
    """Return the number of packs that a run with a single stream makes of examples of `lengths`."""
    packs = windows = at = 0
    left: list[int] = []
    while at < len(lengths):
        size = window_size(window, capacity, windows, 0, 1, len(lengths) - at)
        begun = at
        while at < len(lengths) and (missing := size.missing(at - begun, sum(lengths[begun:at]))):
            at = min(len(lengths), at + missing)
        planned = [*left, *lengths[begun:at]]
        plan = plan_window(planned, capacity, [False] * len(planned))
        packs, windows = packs + len(plan.packs), windows + 1
        left = [planned[index] for index in plan.left]
    return packs + len(plan_packs(left, capacity, [False] * len(left)))
