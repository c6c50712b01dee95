"""Carry a state over to changed data or settings, accepted by name and recorded in the state.

Conversations given before the change are not given again. Conversations read and still waiting are
read again under the new settings. If the number of
streams changes, the draws are divided anew: see `_divide_streams`. Nothing is lost or repeated.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from sftstream.config import DataConfig
from sftstream.identity import Identity
from sftstream.records import Amount, Ref, Refusal, Refused, Segment
from sftstream.sources import Corpus, FileSet
from sftstream.state import Change, DataState, Leftover, StreamState
from sftstream.streaming.example_reader import ExampleReader
from sftstream.streaming.order import RowOrder, draws_of_stream
from sftstream.streaming.sampler import RowSampler, open_cursors
from sftstream.tokenization.encoder import ChatEncoder

FIXED = re.compile(r"data\.(format|seed|(sources\[\d+\]\.)?(shuffle|shards))")
"""Paths of settings with an effect on the order of rows: after a change nobody could tell the rows
still to come."""


class Waiting(NamedTuple):
    """A conversation drawn and not yet given, or the parts not yet given."""

    ref: Ref
    parts: tuple[int, ...] | None
    """Numbers of the waiting parts; None for all parts."""


def rebase(
    saved: DataState,
    identity: Identity,
    config: DataConfig,
    corpus: Corpus,
    encoder: ChatEncoder,
    changed: Sequence[str],
) -> DataState:
    """Return the state of all streams under `identity`; `changed` are the accepted differences.

    Raises ValueError if the change would lose or repeat a conversation.
    """
    _require_possible(saved, identity, changed)
    streams = (
        _divide_streams(saved, identity, config, corpus)
        if identity.streams != saved.identity.streams
        else _keep_streams(saved, identity)
    )
    rebased = {
        number: _read_again(stream, waiting, config, ExampleReader.of(corpus, encoder), number)
        for number, (stream, waiting) in streams.items()
    }
    steps = saved.packs // saved.identity.global_batch
    change = Change(packs=saved.packs, differences=tuple(changed))
    return DataState(
        identity=identity,
        packs=steps * identity.global_batch,
        streams=rebased,
        history=(*saved.history, change),
    )


def _require_possible(saved: DataState, identity: Identity, changed: Sequence[str]) -> None:
    before = saved.identity
    for difference in changed:
        if FIXED.fullmatch(name := difference.split(":")[0]):
            raise ValueError(
                f"a change of {name} cannot be accepted, since it decides the order of rows; start a new run"
            )
    streamed = any(source.shards for source in (*before.sources, *identity.sources))
    if identity.streams != before.streams and streamed:
        raise ValueError("a change of data.streams cannot be accepted with a streamed source; start a new run")
    if missing := before.streams - len(saved.streams):
        raise ValueError(
            f"the state lacks {missing} of {before.streams} streams, and a change needs all; merge the shards' states"
        )
    if saved.packs % before.global_batch:
        raise ValueError(
            f"the state stands at pack {saved.packs}, inside a step of {before.global_batch}; take "
            "the state at a step's border"
        )
    if len(identity.sources) < len(before.sources):
        raise ValueError("a source that was read from cannot be removed; set its weight and repeat instead")
    policy = (identity.capacity, identity.overflow, identity.history)
    if policy != (before.capacity, before.overflow, before.history) and (
        before.overflow == "split" or before.history == "per_turn"
    ):
        raise ValueError(
            "a part of a split conversation may have been given already, so a change of capacity, "
            "overflow or history cannot be accepted; start a new run"
        )


def _keep_streams(saved: DataState, identity: Identity) -> dict[int, tuple[StreamState, list[Waiting]]]:
    return {
        number: (_add_sources(stream, identity), list(_waiting(stream))) for number, stream in saved.streams.items()
    }


def _divide_streams(
    saved: DataState, identity: Identity, config: DataConfig, corpus: Corpus
) -> dict[int, tuple[StreamState, list[Waiting]]]:
    """Divide the draws of each source over another number of streams.

    Draws below the highest draw count as drawn; draws skipped by the old streams wait like
    leftovers. Two streams of a source made the draws 0, 2, 4 and 1: the end is 5, the draw 3
    waits, and three new streams have made 2, 2 and 1 draws.
    """
    olds = [_add_sources(saved.streams[number], identity) for number in sorted(saved.streams)]
    ends = [_end(olds, source) for source in range(len(identity.sources))]
    waiting = sorted(
        [
            *_undrawn_rows(olds, ends, config, corpus),
            *(item for stream in olds for item in _waiting(stream)),
        ]
    )
    count = identity.streams
    return {number: (_split_counters(olds, ends, number, identity), waiting[number::count]) for number in range(count)}


def _waiting(stream: StreamState) -> Iterator[Waiting]:
    segments = stream.waiting
    for ref in dict.fromkeys(segment.ref for segment in segments):
        parts = sorted(segment.part for segment in segments if segment.ref == ref)
        yield Waiting(ref, tuple(parts))


def _end(olds: Sequence[StreamState], source: int) -> int:
    """Return the first draw of a source above all draws made by any stream."""
    return max(
        number + (stream.drawn[source] - 1) * len(olds) + 1 if stream.drawn[source] else 0
        for number, stream in enumerate(olds)
    )


def _undrawn_rows(
    olds: Sequence[StreamState], ends: Sequence[int], config: DataConfig, corpus: Corpus
) -> Iterator[Waiting]:
    """Yield the draws below each source's end, skipped by the old streams."""
    for source, end in enumerate(ends):
        files = corpus.sources[source]
        assert isinstance(files, FileSet)
        shuffle = config.shuffle_of(config.sources[source])
        order = RowOrder(files.shards, config.seed, source, shuffle)
        for number, stream in enumerate(olds):
            for draw in range(number + stream.drawn[source] * len(olds), end, len(olds)):
                row, epoch = order.at(draw)
                yield Waiting(Ref(source, row, epoch), None)


def _split_counters(olds: Sequence[StreamState], ends: Sequence[int], number: int, identity: Identity) -> StreamState:
    """Return a new stream's counters. Stream 0 carries the totals of all old streams."""
    count = identity.streams
    mixed = tuple(sum(stream.mixed[source] for stream in olds) // count for source in range(len(ends)))
    fresh = StreamState(
        drawn=tuple(draws_of_stream(end, number, count) for end in ends),
        mixed=mixed,
        stage=max(stream.stage for stream in olds),
        windows=max(stream.windows for stream in olds),
        accepted=(Amount(),) * len(ends),
    )
    return fresh if number else _carry_totals(fresh, olds)


def _carry_totals(stream: StreamState, olds: Sequence[StreamState]) -> StreamState:
    accepted = zip(*(old.accepted for old in olds), strict=True)
    return msgspec.structs.replace(
        stream,
        packs=sum(old.packs for old in olds),
        conversations=sum(old.conversations for old in olds),
        tokens=sum(old.tokens for old in olds),
        refused=_sum_counts(old.refused for old in olds),
        notes=_sum_counts(old.notes for old in olds),
        accepted=tuple(sum(amounts, Amount()) for amounts in accepted),
    )


def _sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    return dict(sum(map(Counter, counts), Counter[str]()))


def _add_sources(stream: StreamState, identity: Identity) -> StreamState:
    """Return the stream with counters of 0 for added sources."""
    more = len(identity.sources) - len(stream.drawn)
    zeros = (0,) * more
    return msgspec.structs.replace(
        stream,
        drawn=stream.drawn + zeros,
        mixed=stream.mixed + zeros,
        accepted=stream.accepted + (Amount(),) * more,
    )


def _read_again(
    stream: StreamState,
    waiting: Sequence[Waiting],
    config: DataConfig,
    reader: ExampleReader,
    number: int,
) -> StreamState:
    """Return the stream with all waiting conversations as leftovers under the new settings."""
    leftovers: list[Leftover] = []
    refused: list[Refusal] = []
    for item in waiting:
        reader.expect(item.ref)
    for item in waiting:
        try:
            leftovers += [Leftover(segment, 0) for segment in _segments(item, config, reader)]
        except Refused as reason:
            refused.append(Refusal.at(item.ref, reason.reason, reason.detail))
        except RuntimeError as gone:
            raise ValueError(f"a conversation that was read and waits must stay in its source: {gone}") from None
    sampler = RowSampler(config, open_cursors(config, reader.corpus, number))
    sampler.reset(msgspec.to_builtins(stream))
    return msgspec.structs.replace(
        stream,
        planned=(),
        leftovers=tuple(leftovers),
        refused=_sum_counts([stream.refused, Counter(refusal.reason for refusal in refused)]),
        unlisted=tuple(refused),
        exhausted=not leftovers and sampler.exhausted,
    )


def _segments(item: Waiting, config: DataConfig, reader: ExampleReader) -> Iterator[Segment]:
    examples = reader.examples(item.ref)
    if (longest := max(len(example.tokens) for example in examples)) > config.capacity:
        raise Refused(
            "longer than capacity",
            f"{longest} tokens do not fit into a pack of {config.capacity}",
        )
    for part, example in enumerate(examples):
        if item.parts is None or part in item.parts:
            source, row, epoch = item.ref
            yield Segment(source, row, len(example.tokens), epoch, part)
