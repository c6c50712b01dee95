"""Examples -> packs: planned on lengths alone, a window at a time, then built."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from torchdata.nodes import BaseNode

from sftstream.records import Amount, Example, Pack, Ref, Refusal, Refused, Segment
from sftstream.state import Leftover, Position, StreamState
from sftstream.streaming.order import shuffled

MAX_WAIT = 2
"""Windows that a leftover waits at most. 2 fills as well as no bound, under which some waited for 41."""


def plan_packs(lengths: Sequence[int], capacity: int, urgent: Sequence[bool]) -> list[list[int]]:
    """Best-fit decreasing: the indices of each pack, where no length exceeds `capacity`. O(n log n).

    The longest goes first, into the fullest pack that still has room; `urgent` ones go before all others.
    """
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, pack), sorted
    ranks = [length + (capacity if first else 0) for length, first in zip(lengths, urgent, strict=True)]
    for index in sorted(range(len(lengths)), key=ranks.__getitem__, reverse=True):
        length = lengths[index]
        at = bisect_left(free, (length, -1))
        if at < len(free):
            room, pack = free.pop(at)
            packs[pack].append(index)
        else:
            room, pack = capacity, len(packs)
            packs.append([index])
        insort(free, (room - length, pack))
    return packs


def joined(examples: Sequence[Example]) -> Example:
    """Several side by side."""
    return Example(
        np.concatenate([example.tokens for example in examples]),
        np.concatenate([example.loss_mask for example in examples]),
        sum([example.targets for example in examples]),
    )


def build_pack(
    examples: Sequence[Example],
    segments: Sequence[Segment],
    capacity: int,
    pad_id: int,
    refused: Sequence[Refusal] = (),
    exhausted: bool = False,
) -> Pack:
    """The segments' tokens side by side, which the examples hold in order; what is free becomes a padding segment."""
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


def window_size(window: int, windows: int, stream: int, streams: int) -> int:
    """Conversations that a stream reads at once, having planned `windows`.

    The first window is an eighth, so that the first packs come soon; the second differs from stream to stream, so that
    they do not all fill their windows during the same step.
    """
    if windows == 0:
        return max(1, window // 8)
    if windows == 1:
        return max(1, window // 8 + (window - window // 8) * (stream + 1) // streams)
    return window


class Reread(Protocol):
    """Gives again what was read before a state was taken."""

    def expect(self, ref: Ref) -> None:
        """This conversation will be asked for."""

    def examples(self, ref: Ref) -> list[Example]:
        """Raises `Refused` where the source changed."""


class Draws(Protocol):
    """The node at which the graph begins."""

    wanted: int

    def account(self, source: int, tokens: int, trained_tokens: int) -> None:
        """What a row that was drawn turned out to hold."""


class Window(NamedTuple):
    """What was read at once."""

    segments: list[Segment]
    examples: list[Example]
    """Theirs."""
    refused: list[Refusal]
    accepted: list[list[int]]
    """The fields of an `Amount` for each source, together with what was read before."""
    notes: Counter[str]
    """Likewise."""


class PackerConfig(NamedTuple):
    """What a packer needs to know of the run."""

    capacity: int
    window: int
    streams: int
    seed: int
    shuffle: bool
    pad_id: int
    rows: int


class Packer(BaseNode[Pack]):
    """Reads a window of examples, plans it into packs, gives them one by one; the emptiest pack is dissolved and its
    conversations are planned again with the next window, twice at most.

    Its state holds references. After a reset nothing is tokenized: `stages` gives a planned conversation's tokens when its
    pack is given, a leftover's with the next window. A stream that has run dry gives empty packs for ever.
    """

    def __init__(
        self,
        source: BaseNode[Any],
        stages: Reread,
        draws: Draws,
        stream: int,
        config: PackerConfig,
    ) -> None:
        super().__init__()
        self.source = source
        self._stages = stages
        self._draws = draws
        self._stream = stream
        self._config = config

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start at a state that `get_state` gave."""
        super().reset(initial_state)
        self.source.reset(initial_state)
        source = self.source.state_dict()
        fresh = StreamState(
            **_position(source), exhausted=source["exhausted"], accepted=(Amount(),) * len(source["drawn"])
        )
        self.state = msgspec.convert(initial_state, StreamState) if initial_state else fresh
        self._left: dict[Segment, Example] = {}  # those of leftovers
        # Those of planned packs, the next last; none of what was planned before a reset.
        self._joined: list[Example] = []
        for segment in self.state.waiting:
            self._stages.expect(segment.ref)

    def get_state(self) -> dict[str, Any]:
        # Builtins made anew from a frozen Struct: a live object would compare equal to itself in StatefulDataLoader's
        # deltas, and the change would be lost.
        result: dict[str, Any] = msgspec.to_builtins(self.state)
        return result

    def next(self) -> Pack:
        """The next pack, empty where nothing is left."""
        refused = list(self.state.unlisted)
        while not self.state.planned and not self.state.exhausted:
            refused += self._plan_window()
        segments, *planned = self.state.planned or ((),)
        examples = self._examples_of(segments)
        self._advance(segments, tuple(planned))
        config = self._config
        return build_pack(examples, segments, config.capacity, config.pad_id, refused, self.state.exhausted)

    def _advance(self, segments: Sequence[Segment], planned: tuple[tuple[Segment, ...], ...]) -> None:
        state = self.state
        self.state = msgspec.structs.replace(
            state,
            unlisted=(),
            planned=planned,
            exhausted=not planned and not state.leftovers and self.source.state_dict()["exhausted"],
            packs=state.packs + bool(segments),
            conversations=state.conversations + [segment.part for segment in segments].count(0),
            tokens=state.tokens + sum([segment.length for segment in segments]),
        )

    def _examples_of(self, segments: Sequence[Segment]) -> list[Example]:
        """Those of a planned pack."""
        return [self._joined.pop()] if self._joined else [self._take(segment) for segment in segments]

    def _take(self, segment: Segment) -> Example:
        example = self._left.get(segment)
        if example is None:
            try:
                example = self._stages.examples(segment.ref)[segment.part]
            except (Refused, IndexError) as error:
                raise ValueError(
                    f"row {segment.row} of source {segment.source} was planned before and is refused now ({error}): the "
                    "source changed; restore it"
                ) from None
        if len(example.tokens) != segment.length:
            raise ValueError(
                f"row {segment.row} of source {segment.source} has {len(example.tokens)} tokens, had {segment.length} when it "
                "was planned: the source changed; restore it"
            )
        return example

    def _plan_window(self) -> list[Refusal]:
        """Read the next window and plan it together with the leftovers."""
        state = self.state
        read = self._read(window_size(self._config.window, state.windows, self._stream, self._config.streams))
        source = self.source.state_dict()
        segments = [*(leftover.segment for leftover in state.leftovers), *read.segments]
        waited = [*(leftover.waited for leftover in state.leftovers), *[0] * len(read.segments)]
        examples = [*(self._take(leftover.segment) for leftover in state.leftovers), *read.examples]
        packs, left = self._plan([segment.length for segment in segments], waited, keep_all=source["exhausted"])
        self.state = msgspec.structs.replace(
            state,
            **_position(source),
            windows=state.windows + 1,
            planned=tuple([tuple([segments[i] for i in pack]) for pack in packs]),
            leftovers=tuple([Leftover(segments[i], waited[i] + 1) for i in left]),
            exhausted=not packs and not left and source["exhausted"],
            refused=dict(Counter(state.refused) + Counter(refusal.reason for refusal in read.refused)),
            notes=dict(read.notes),
            accepted=tuple(Amount(*amount) for amount in read.accepted),
        )
        # Copies, lest these few keep all that was read with them.
        self._left = {segments[i]: joined([examples[i]]) for i in left}
        # Now, while they are in the core's cache: what waits is then copied from one place.
        self._joined = [joined([examples[i] for i in pack]) for pack in reversed(packs)]
        return read.refused

    def _read(self, size: int) -> Window:
        accepted = [list(msgspec.structs.astuple(amount)) for amount in self.state.accepted]
        read = Window([], [], [], accepted, Counter(self.state.notes))
        in_a_row = 0
        while len(read.segments) < size:
            self._draws.wanted = size - len(read.segments)
            try:
                drawn = next(self.source)
            except StopIteration:
                break
            for ref, value in zip(*drawn, strict=True):
                refused = value if isinstance(value, Refused) else _too_long(value, self._config.capacity)
                if refused is None:
                    self._keep(ref, value, read)
                    in_a_row = 0
                else:
                    read.refused.append(Refusal.at(ref, refused.reason, refused.detail))
                    in_a_row += 1
                    self._require_progress(in_a_row, read.refused)
        return read

    def _keep(self, ref: Ref, examples: Sequence[Example], read: Window) -> None:
        source, row, epoch = ref
        accepted = read.accepted[source]
        accepted[0] += 1
        for part, example in enumerate(examples):
            length = len(example.tokens)
            segment = Segment(source, row, length, epoch, part)
            read.segments.append(segment)
            read.examples.append(example)
            accepted[1] += length
            accepted[2] += example.targets
            if example.notes:
                read.notes.update(example.notes)
            self._draws.account(source, length, example.targets)

    def _require_progress(self, in_a_row: int, refused: list[Refusal]) -> None:
        """An endless stream that refuses every row would read for ever."""
        if in_a_row > 2 * self._config.rows:
            reasons = ", ".join(
                f"{reason}: {count}" for reason, count in Counter(r.reason for r in refused).most_common()
            )
            raise ValueError(
                f"stream {self._stream} refused {in_a_row} rows in a row and found none to train ({reasons}); the last: "
                f"row {refused[-1].row} of source {refused[-1].source}, {refused[-1].detail}"
            )

    def _plan(
        self, lengths: Sequence[int], waited: Sequence[int], *, keep_all: bool
    ) -> tuple[list[list[int]], list[int]]:
        """The packs, and what is left for the next window."""
        urgent = [windows >= MAX_WAIT for windows in waited]
        packs = [sorted(pack) for pack in plan_packs(lengths, self._config.capacity, urgent)]
        left: list[int] = []
        patient = [pack for pack in packs if not any([urgent[i] for i in pack])]
        if patient and not keep_all:
            left = min(patient, key=lambda pack: sum([lengths[i] for i in pack]))
            packs.remove(left)
        return self._ordered(packs), left

    def _ordered(self, packs: list[list[int]]) -> list[list[int]]:
        """Packs leave in the order of their first conversation; shuffled, lest long conversations always come first."""
        packs = sorted(packs)
        if not self._config.shuffle:
            return packs
        order = shuffled(len(packs), "window", self._config.seed, self._stream, self.state.windows)
        return [packs[position] for position in order]


def _position(rows: dict[str, Any]) -> dict[str, Any]:
    return msgspec.structs.asdict(msgspec.convert(rows, Position))


def _too_long(examples: Sequence[Example], capacity: int) -> Refused | None:
    for example in examples:
        if len(example.tokens) > capacity:
            length = len(example.tokens)
            detail = f"{length} tokens do not fit into a pack of {capacity}; raise data.capacity, or set data.overflow"
            return Refused("longer than capacity", detail)
    return None
