"""Divide examples into packs by their lengths, and build a pack from examples: pure functions."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import xxhash

from sftstream.records import Example, Pack, Refusal, Segment

SPARE = 64
"""Examples that a window leaves for the next window, as a rule: enough to make nearly every room of
up to four short examples exactly. With 16 the packs of real conversations hold up to 0.2 % less."""
SHARE_LEFT = 3
"""A window leaves at most one in `SHARE_LEFT` of its packs."""
EXCHANGED = 4
"""Most examples that leave a pack in an exchange."""
MOST_TOKENS_EXCHANGED = 1 << 15
"""Most tokens that an exchange brings in: sums of left examples are the bits of an integer."""
CAPACITIES_OF_A_WINDOW = 4
"""Capacities that a window fills at least, so that a pack of many short examples finds company."""
LONGEST_WINDOW = 4
"""Largest number of examples in a window, in multiples of `window`."""


def plan_packs(lengths: Sequence[int], capacity: int, urgent: Sequence[bool]) -> list[list[int]]:
    """Divide the indices of `lengths` into packs: best-fit decreasing, O(n log n).

    Examples are placed from the longest to the shortest, `urgent` examples before all others. Each
    example goes into the fullest pack that has enough room, or else opens a new pack. No length may
    exceed `capacity`.

    Example: for the lengths `[60, 30, 50, 40]`, capacity 100 and no urgent examples, the result is
    `[[0, 3], [2, 1]]`. 60 opens the first pack, and 50 the second. 40 fills the first. 30 goes into
    the second.
    """
    packs, _ = _best_fit(lengths, capacity, urgent)
    return packs


def _best_fit(
    lengths: Sequence[int], capacity: int, urgent: Sequence[bool]
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Return the packs of `plan_packs`, and each pack's room and number, sorted."""
    count = len(lengths)
    packs: list[list[int]] = []
    free: list[int] = []  # room * count + pack, sorted: comparing integers is faster than tuples
    order = sorted(range(count), key=lengths.__getitem__, reverse=True)
    if True in urgent:
        order = [index for index in order if urgent[index]] + [index for index in order if not urgent[index]]
    for index in order:
        length = lengths[index]
        at = bisect_left(free, length * count)
        if at < len(free):
            room, pack = divmod(free.pop(at), count)
            packs[pack].append(index)
        else:
            room, pack = capacity, len(packs)
            packs.append([index])
        insort(free, (room - length) * count + pack)
    return packs, [divmod(code, count) for code in free]


class WindowPlan(NamedTuple):
    """The plan of a window: the packs' indices, and the indices left for the next window."""

    packs: list[list[int]]
    left: list[int]


def plan_window(lengths: Sequence[int], capacity: int, urgent: Sequence[bool]) -> WindowPlan:
    """Plan almost full packs, and leave the rest for the next window.

    The emptiest packs of `plan_packs` are dissolved until `SPARE` examples are left; packs with an
    urgent example stay. Then each pack with room exchanges its shortest examples, up to
    `EXCHANGED`, for left examples that fill the room exactly, or else as far as possible.

    For lengths `[6, 3, 5, 2, 2]` and capacity 10 the packs of `plan_packs` are 6 + 3 and 5 + 2 + 2.
    The second is dissolved, and the first exchanges 3 for 2 + 2. The plan: `([[0, 4, 3]], [1, 2])`.
    """
    packs, rooms = _best_fit(lengths, capacity, urgent)
    dissolved = _emptiest(packs, rooms, urgent)
    left = sorted((index for pack in dissolved for index in packs[pack]), key=lengths.__getitem__, reverse=True)
    for room, pack in rooms:
        if room and pack not in dissolved:
            _exchange(packs[pack], room, left, lengths, urgent)
    return WindowPlan([pack for number, pack in enumerate(packs) if number not in dissolved], sorted(left))


def plan_last_window(lengths: Sequence[int], capacity: int, urgent: Sequence[bool]) -> list[list[int]]:
    """Plan all examples: as `plan_window`, with the left examples in the last packs."""
    packs, left = plan_window(lengths, capacity, urgent)
    rest = plan_packs([lengths[index] for index in left], capacity, [False] * len(left))
    return [*packs, *([left[index] for index in pack] for pack in rest)]


def plan_window_of_format_3(lengths: Sequence[int], capacity: int, urgent: Sequence[bool]) -> WindowPlan:
    """Plan a window of a stream that began under format 3: only the emptiest pack is left."""
    packs = plan_packs(lengths, capacity, urgent)
    patient = [pack for pack in packs if not any([urgent[index] for index in pack])]
    left = min(patient, key=lambda pack: sum([lengths[index] for index in pack]), default=[])
    return WindowPlan([pack for pack in packs if pack is not left], sorted(left))


def _emptiest(packs: Sequence[Sequence[int]], rooms: Sequence[tuple[int, int]], urgent: Sequence[bool]) -> set[int]:
    """Return the numbers of the packs to dissolve."""
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


def _exchange(pack: list[int], room: int, left: list[int], lengths: Sequence[int], urgent: Sequence[bool]) -> None:
    """Exchange the last examples of `pack` for examples of `left` that fill `room`."""
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
        return
    sums = _sums(left, lengths, goals)
    # The largest sum up to each goal: the highest bit.
    reached = [(sums[-1] & (2 << goal) - 1).bit_length() - 1 for goal in goals]
    gains = [total - goal for total, goal in zip(reached, goals, strict=True)]
    gain = max(gains)
    if gain <= -room:
        return
    count = gains.index(gain) + 1
    taken = _summands(left, lengths, sums, reached[count - 1])
    moved = pack[-count:]
    pack[-count:] = [left[at] for at in taken]
    for at in taken:
        del left[at]
    left += moved


def _sums(left: Sequence[int], lengths: Sequence[int], goals: Sequence[int]) -> list[int]:
    """Return the sums of the first 0, 1, 2, ... left lengths, until a goal is among the sums.

    The sums are the bits of an integer: bit 7 is set if some lengths have the sum 7.
    """
    mask, wanted = (2 << goals[-1]) - 1, 0
    for goal in goals:
        wanted |= 1 << goal
    bits = 1
    sums = [bits]
    for index in left:
        bits |= bits << lengths[index] & mask
        sums.append(bits)
        if bits & wanted:
            break
    return sums


def _summands(left: Sequence[int], lengths: Sequence[int], sums: Sequence[int], total: int) -> list[int]:
    """Return the places in `left`, last first, of lengths with the sum `total`."""
    taken: list[int] = []
    for at in range(len(sums) - 2, -1, -1):
        if not sums[at] >> total & 1:
            taken.append(at)
            total -= lengths[left[at]]
    return taken


def copied(examples: Sequence[Example]) -> list[Example]:
    """Return examples with the same content in arrays of their own."""
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
    """Return a 32-bit digest of an example's tokens and loss mask, in a microsecond for a pack."""
    seed = xxhash.xxh3_64_intdigest(np.ascontiguousarray(example.tokens).data)
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(example.loss_mask).data, seed) & 0xFFFFFFFF


def build_pack(
    examples: Sequence[Example],
    segments: Sequence[Segment],
    capacity: int,
    pad_id: int,
    refused: Sequence[Refusal] = (),
    exhausted: bool = False,
) -> Pack:
    """Return a pack with the tokens of `examples`, padded to `capacity` with `pad_id`.

    `examples` concatenated are the tokens of `segments`. An item of `examples` may be the joined
    tokens of several segments (see `joined`). For segments of 3 and 2 tokens and capacity 8, the
    borders are `[0, 3, 5, 8]`.
    """
    lengths = [segment.length for segment in segments]
    used = sum(lengths)
    if used < capacity:
        lengths.append(capacity - used)
    ids = np.full(capacity, pad_id, np.int32)
    trained = np.zeros(capacity, bool)
    if examples:
        np.concatenate([example.tokens for example in examples], out=ids[:used])
        np.concatenate([example.loss_mask for example in examples], out=trained[:used])
    borders = np.array([0, *accumulate(lengths)], np.int32)
    return Pack(ids, trained, borders, tuple(segments), tuple(refused), exhausted)


class WindowSize(NamedTuple):
    """The end of a window: after `most` examples, or `least` examples that hold `tokens` tokens."""

    least: int
    tokens: int
    most: int

    def missing(self, examples: int, tokens: int) -> int:
        """Return about how many examples a window of `examples` with `tokens` still takes."""
        if examples < self.least:
            return self.least - examples
        if tokens >= self.tokens or examples >= self.most:
            return 0
        return min(self.most - examples, -(-(self.tokens - tokens) * examples // tokens))


def window_size(
    window: int, capacity: int, windows: int, stream: int, streams: int, rows_left: int | None
) -> WindowSize:
    """Return the size of a stream's next window, after `windows` planned windows.

    A stream's last `rows_left` rows, up to two windows, are planned at once. The first window is an
    eighth of `window`, for an early first pack. The second window differs from stream to stream:
    otherwise all streams would read a window during a single step.
    """
    if rows_left is not None and rows_left <= 2 * window:
        return WindowSize(2 * window, 0, 2 * window)
    size = ramped(window, windows, stream, streams)
    if windows < 2:
        return WindowSize(size, 0, size)
    return WindowSize(size, CAPACITIES_OF_A_WINDOW * capacity, LONGEST_WINDOW * window)


def ramped(window: int, windows: int, stream: int, streams: int) -> int:
    """Return the number of examples in a stream's next window without regard to its tokens."""
    if windows == 0:
        return max(1, window // 8)
    if windows == 1:
        return max(1, window // 8 + (window - window // 8) * (stream + 1) // streams)
    return window


def packs_of_stream(lengths: Sequence[int], capacity: int, window: int) -> int:
    """Return the packs of a run's only stream with examples of `lengths`, from start to end."""
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
