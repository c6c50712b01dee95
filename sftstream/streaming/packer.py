"""Pack examples, one window at a time: the last node of the graph of a logical stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType
from torchdata.nodes import BaseNode

from sftstream.records import Amount, Example, Pack, Ref, Refusal, Refused, Segment
from sftstream.state import Leftover, RowParts, StreamState, add_refusals
from sftstream.streaming.example_reader import ExampleReader, SourceCheck
from sftstream.streaming.order import shuffled
from sftstream.streaming.packing import (
    WindowPlan,
    WindowSize,
    build_pack,
    copied,
    example_digest,
    joined,
    plan_last_window,
    plan_packs,
    plan_window,
    plan_window_of_format_3,
    ramped,
    window_size,
)
from sftstream.streaming.sampler import RowBatch, RowSampler
from sftstream.tokenization.unverified import NOTE

MAX_WAIT = 2
"""Largest number of windows that a leftover waits. A larger number did not fill packs better.
Without a limit, some leftovers waited 41 windows."""
MOST_REFUSED = 1000
"""Number of refused rows after which a window ends early. So a run soon reaches the end of a step,
where refusals are judged, even if nearly all rows of a source are refused."""
REFUSED_SHARE = 16
"""In a mixture by tokens, a refused row counts as a sixteenth of the stream's mean conversation. So
if all rows of a source are refused, the stream soon draws from the other sources again. If a tenth
of a source is refused, the mixture differs from the weights by less than 0.2 %."""
PLANNING: Final = 4
"""The state format whose rules plan the windows of a new stream (see `StreamState.planning`)."""


class PackerConfig(NamedTuple):
    """The settings of a run that decide the packing."""

    capacity: int
    window: int
    streams: int
    seed: int
    shuffle: bool
    pad_id: int
    in_parts: bool = False
    """True if the settings may make several examples from one row."""


class Window(NamedTuple):
    """The rows read for a window."""

    segments: list[Segment]
    examples: list[Example]
    """The example of each segment, in the same order."""
    refused: list[Refusal]
    accepted: list[list[int]]
    """For each source, the fields of an `Amount`: conversations, tokens and trained tokens that the
    stream accepted since its beginning."""
    notes: Counter[str]
    """Number of examples with each modification since the beginning of the stream:
    `{"truncated": 3}`."""


class Packer(BaseNode[Pack]):
    """Reads a window of examples, divides them into packs by length, and returns one pack per call.

    The emptiest packs of a window are dissolved (see `plan_window`). The examples that are left
    become leftovers, which are divided into packs again together with the next window, at most
    `MAX_WAIT` times. Example: a window of 4 examples of 60, 30, 50 and 40 tokens, and capacity 100.
    The packs are 60 + 40 and 50 + 30. The second pack is dissolved, so the examples of 50 and 30
    tokens are leftovers.

    The state holds segments, never tokens. A reset tokenizes nothing: `reader` reads the rows of a
    planned pack when the pack is due, and the row of a leftover with the next window. After the
    last pack, the stream is exhausted, and `next` returns empty packs without end.
    """

    def __init__(
        self,
        source: BaseNode[RowBatch[list[Example]]],
        sampler: RowSampler,
        reader: ExampleReader,
        stream: int,
        config: PackerConfig,
        check: SourceCheck | None = None,
    ) -> None:
        """Make the last node of a graph. The node before the packer is `source`, and the first node
        of the graph is `sampler`."""
        super().__init__()
        self.source = source
        self._sampler = sampler
        self._reader = reader
        self._stream = stream
        self._config = config
        self._check = check
        self._mixed_by_content = sampler.mixes_by_content

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start at `initial_state`, as returned by `get_state`, or at the beginning of the
        stream."""
        super().reset(initial_state)
        self.source.reset(initial_state)
        self.state = msgspec.convert(initial_state, StreamState) if initial_state else self._first_state()
        self._left: dict[Segment, Example] = {}
        """Segment of a leftover -> its example."""
        self._joined: list[Example] = []
        """The concatenated examples of each planned pack, in reverse order: the pack to return next
        is at the end of the list. Empty after a reset, so rows of planned packs are read again."""
        self._reader.remember(self.state.known_bookmarks)
        for segment in self.state.waiting:
            self._reader.expect(segment.ref)

    def get_state(self) -> dict[str, Any]:
        # A new dict at each call: the caller may keep or change it.
        result: dict[str, Any] = msgspec.to_builtins(self.state)
        return result

    def next(self) -> Pack:
        """Return the next pack, or an empty pack if nothing is left or many rows were refused."""
        refused = list(self.state.unlisted)
        while not self.state.planned and not self.state.exhausted and len(refused) < MOST_REFUSED:
            refused += self._plan_window()
        segments, *planned = self.state.planned or ((),)
        examples = self._examples_of(segments)
        self._advance(segments, tuple(planned))
        config = self._config
        exhausted = self.state.exhausted
        return build_pack(examples, segments, config.capacity, config.pad_id, refused, exhausted)

    def _first_state(self) -> StreamState:
        position = self._sampler.position
        return StreamState(
            **msgspec.structs.asdict(position),
            exhausted=self._sampler.exhausted,
            accepted=(Amount(),) * len(position.drawn),
            refused=({},) * len(position.drawn),
            digests=(),
            row_parts=() if self._config.in_parts else UNSET,
            planning=PLANNING,
        )

    def _advance(self, segments: Sequence[Segment], planned: tuple[tuple[Segment, ...], ...]) -> None:
        state = self.state
        digests = state.digests
        self.state = msgspec.structs.replace(
            state,
            unlisted=(),
            planned=planned,
            digests=digests[bool(segments) :] if isinstance(digests, tuple) else UNSET,
            exhausted=not planned and not state.leftovers and self._sampler.exhausted,
            packs=state.packs + bool(segments),
            conversations=state.conversations + [segment.part for segment in segments].count(0),
            tokens=state.tokens + sum([segment.length for segment in segments]),
        )

    def _examples_of(self, segments: Sequence[Segment]) -> list[Example]:
        """Return the concatenated examples of the next planned pack as one example, or none if
        `segments` is empty."""
        if not segments:
            return []
        if self._joined:
            return [self._joined.pop()]
        return [self._as_planned(0, segments, [self._read_again(segment) for segment in segments])]

    def _leftover(self, number: int) -> Example:
        """Return the example of a leftover; all planned packs were returned."""
        segment = self.state.leftovers[number].segment
        example = self._read_again(segment)
        return example if segment in self._left else self._as_planned(number, [segment], [example])

    def _as_planned(self, number: int, segments: Sequence[Segment], examples: Sequence[Example]) -> Example:
        """Return the concatenation of examples that were read again.

        Raises ValueError if the result lacks digest `number` of the state.
        """
        digests, found = self.state.digests, joined(examples)
        if isinstance(digests, tuple) and example_digest(found) != digests[number]:
            rows = ", ".join(f"row {segment.row} of source {segment.source}" for segment in segments)
            raise ValueError(
                f"the tokens or the mask of {rows} differ from those when the window was read: the source changed; restore it"
            )
        return found

    def _read_again(self, segment: Segment) -> Example:
        """Return the example of a leftover, or of a pack that was planned before a reset.

        Raises ValueError if the row now has another length or is refused.
        """
        example = self._left.get(segment)
        if example is not None and len(example.tokens) == segment.length:
            return example
        row = f"row {segment.row} of source {segment.source}"
        if example is None:
            try:
                example = self._reader.examples(segment.ref)[segment.part]
            except (Refused, IndexError) as error:
                raise ValueError(
                    f"{row} was accepted when its window was read, and is refused now ({error}): the source changed; restore it"
                ) from None
        if len(example.tokens) != segment.length:
            raise ValueError(
                f"{row} has {len(example.tokens)} tokens and had {segment.length} when its window was read: "
                "the source changed; restore it"
            )
        return example

    def _plan_window(self) -> list[Refusal]:
        """Read a window, divide it and the leftovers into packs, and return the refusals."""
        state = self.state
        read = self._read(self._window_size())
        exhausted = self._sampler.exhausted
        segments = [*(leftover.segment for leftover in state.leftovers), *read.segments]
        waited = [*(leftover.waited for leftover in state.leftovers), *[0] * len(read.segments)]
        examples = [
            *map(self._leftover, range(len(state.leftovers))),
            *read.examples,
        ]
        lengths = [segment.length for segment in segments]
        packs, left = self._plan(lengths, waited, last=exhausted)
        # Concatenated now, while the examples are in the CPU cache.
        packed = [joined([examples[i] for i in pack]) for pack in packs]
        self._joined = packed[::-1]
        # Copied once: a view of an example would keep the array of its whole batch in memory.
        before = len(state.leftovers)
        new = [i for i in left if i >= before]
        self._left = {segments[i]: examples[i] for i in left if i < before}
        self._left |= zip([segments[i] for i in new], copied([examples[i] for i in new]), strict=True)
        self.state = msgspec.structs.replace(
            state,
            **msgspec.structs.asdict(self._sampler.position),
            windows=state.windows + 1,
            planned=tuple([tuple([segments[i] for i in pack]) for pack in packs]),
            leftovers=tuple([Leftover(segments[i], waited[i] + 1) for i in left]),
            digests=tuple(map(example_digest, [*packed, *(self._left[segments[i]] for i in left)])),
            exhausted=not packs and not left and exhausted,
            refused=add_refusals(state.refused, read.refused) if read.refused else state.refused,
            notes=dict(read.notes),
            accepted=tuple(Amount(*amount) for amount in read.accepted),
            row_parts=self._row_parts(read.segments) if self._config.in_parts else UNSET,
        )
        if (streamed := self._sampler.last_streamed) is not None:
            refs = [*streamed, *(segment.ref for segment in self.state.waiting)]
            bookmarks = {source: tuple(found) for source, found in self._reader.bookmarks(refs).items()}
            self.state = msgspec.structs.replace(self.state, bookmarks=bookmarks or UNSET)
        return read.refused

    def _row_parts(self, read: Sequence[Segment]) -> tuple[RowParts, ...]:
        """For each row of a planned pack or a leftover, return the number of its examples if there
        are several.

        `read` holds the segments of the window, with all parts of each row.
        """
        leftovers = dict.fromkeys(leftover.segment.ref for leftover in self.state.leftovers)
        before = self.state.row_parts
        if isinstance(before, UnsetType):
            old = [RowParts(*ref, 0) for ref in leftovers]
        else:
            old = [parts for parts in before if parts.ref in leftovers]
        counts = Counter(segment.ref for segment in read)
        return *old, *(RowParts(*ref, count) for ref, count in counts.items() if count > 1)

    def _window_size(self) -> WindowSize:
        config, windows = self._config, self.state.windows
        if self.state.planning is UNSET:
            size = ramped(config.window, windows, self._stream, config.streams)
            return WindowSize(size, 0, size)
        return window_size(
            config.window, config.capacity, windows, self._stream, config.streams, self._sampler.rows_left
        )

    def _read(self, size: WindowSize) -> Window:
        """Read rows until the window has its size, `MOST_REFUSED` rows are refused, or the sampler
        is exhausted."""
        accepted = [list(msgspec.structs.astuple(amount)) for amount in self.state.accepted]
        read = Window([], [], [], accepted, Counter(self.state.notes))
        before = sum([tokens for _, tokens, _ in accepted])
        while len(read.refused) < MOST_REFUSED:
            missing = size.missing(len(read.segments), sum([tokens for _, tokens, _ in accepted]) - before)
            if not missing:
                break
            self._sampler.request(min(missing, MOST_REFUSED - len(read.refused)))
            try:
                batch = next(self.source)
            except StopIteration:
                break
            self._accept(batch, read)
        return read

    def _accept(self, batch: RowBatch[list[Example]], read: Window) -> None:
        """Add the rows of a batch to the window. One loop without calls: it runs for each row."""
        capacity, mixed_by_content = self._config.capacity, self._mixed_by_content
        add_segment, add_example = read.segments.append, read.examples.append
        for ref, value in zip(*batch, strict=True):
            if isinstance(value, Refused):
                self._refuse(ref, value, read)
                continue
            longest = len(value[0].tokens) if len(value) == 1 else max([len(example.tokens) for example in value])
            if longest > capacity:
                self._refuse(ref, _too_long(longest, capacity, verified=NOTE not in value[0].notes), read)
                continue
            source, row, epoch = ref
            amount = read.accepted[source]
            amount[0] += 1
            for part, example in enumerate(value):
                length = len(example.tokens)
                add_segment(Segment(source, row, length, epoch, part))
                add_example(example)
                amount[1] += length
                amount[2] += example.targets
                if example.notes:
                    read.notes.update(example.notes)
                if mixed_by_content:
                    self._sampler.count_tokens(source, length, example.targets)

    def _refuse(self, ref: Ref, refused: Refused, read: Window) -> None:
        read.refused.append(Refusal.at(ref, refused.reason, refused.detail))
        if self._check and not read.accepted[ref.source][0]:
            self._check.require_conversation(ref.source)
        if self._mixed_by_content:
            conversations, tokens, trained_tokens = map(sum, zip(*read.accepted, strict=True))
            parts = REFUSED_SHARE * max(conversations, 1)
            self._sampler.count_tokens(ref.source, max(tokens // parts, 1), max(trained_tokens // parts, 1))

    def _plan(self, lengths: Sequence[int], waited: Sequence[int], *, last: bool) -> WindowPlan:
        """Return the plan of a window and its leftovers, with the packs in the order of return.

        `waited` holds the number of windows that each example has waited. If the window is the
        `last` of the stream, no example is left.
        """
        urgent = [windows >= MAX_WAIT for windows in waited]
        capacity, of_format_3 = self._config.capacity, self.state.planning is UNSET
        if last:
            plan_all = plan_packs if of_format_3 else plan_last_window
            plan = WindowPlan(plan_all(lengths, capacity, urgent), [])
        else:
            plan = (plan_window_of_format_3 if of_format_3 else plan_window)(lengths, capacity, urgent)
        return WindowPlan(self._ordered([sorted(pack) for pack in plan.packs]), plan.left)

    def _ordered(self, packs: list[list[int]]) -> list[list[int]]:
        """Return the packs in the order in which their first rows were read, or shuffled.

        In the order in which packs are planned, packs with long examples would come first.
        """
        packs = sorted(packs)
        if not self._config.shuffle:
            return packs
        order = shuffled(len(packs), "window", self._config.seed, self._stream, self.state.windows)
        return [packs[index] for index in order]


def _too_long(length: int, capacity: int, *, verified: bool) -> Refused:
    remedy = "raise data.capacity, or set data.overflow" if verified else "raise data.capacity, or shorten the row"
    return Refused("longer than capacity", f"{length} tokens do not fit into a pack of {capacity}; {remedy}")
