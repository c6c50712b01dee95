"""A state carried over to other data or settings, because somebody said so by name; what changed stays on record.

What was given stays given and is not given again. What was read and waits is read again under the new settings, and
what other numbers of streams would leave between them is read now and waits as well: nothing is lost.
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
from sftstream.streaming.order import RowOrder, draws_of_stream
from sftstream.streaming.sampler import RowSampler, open_cursors
from sftstream.streaming.stream import ExampleReader
from sftstream.tokenization.encoder import ChatEncoder

FIXED = re.compile(r"data\.(format|seed|(sources\[\d+\]\.)?(shuffle|shards))")
"""What the order of rows hangs on: nobody could say which rows are still to come."""


class Waiting(NamedTuple):
    """A conversation that was drawn and not given, or those of its parts that were not."""

    ref: Ref
    parts: tuple[int, ...] | None
    """None: all that it has."""


def rebase(
    saved: DataState,
    identity: Identity,
    config: DataConfig,
    corpus: Corpus,
    encoder: ChatEncoder,
    changed: Sequence[str],
) -> DataState:
    """The state of all streams under `identity`; `changed` are the differences that were accepted.

    Raises ValueError where the change cannot be made without losing or repeating something.
    """
    _require_possible(saved, identity, changed)
    streams = (
        _other_streams(saved, identity, config, corpus)
        if identity.streams != saved.identity.streams
        else _same_streams(saved, identity)
    )
    rebased = {
        number: _reread(stream, waiting, config, ExampleReader.of(corpus, encoder), number)
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
                f"a change of {name} cannot be accepted, since the order of rows hangs on it; start a new run"
            )
    if identity.streams != before.streams and any(source.shards for source in (*before.sources, *identity.sources)):
        raise ValueError("a change of data.streams cannot be accepted where a source is streamed; start a new run")
    if missing := before.streams - len(saved.streams):
        raise ValueError(
            f"the state lacks {missing} of {before.streams} streams, and a change needs all; merge the shards' states"
        )
    if saved.packs % before.global_batch:
        raise ValueError(
            f"the state stands at pack {saved.packs}, inside a step of {before.global_batch}; take it at a step's border"
        )
    if len(identity.sources) < len(before.sources):
        raise ValueError("a source that was read from cannot be taken away; give it weight and repeat instead")
    policy = (identity.capacity, identity.overflow, identity.history)
    if policy != (before.capacity, before.overflow, before.history) and (
        before.overflow == "split" or before.history == "per_turn"
    ):
        raise ValueError(
            "conversations that were split may have been given in part, so a change of capacity, overflow or history cannot be "
            "accepted; start a new run"
        )


def _same_streams(saved: DataState, identity: Identity) -> dict[int, tuple[StreamState, list[Waiting]]]:
    return {
        number: (_add_sources(stream, identity), list(_waiting(stream))) for number, stream in saved.streams.items()
    }


def _other_streams(
    saved: DataState, identity: Identity, config: DataConfig, corpus: Corpus
) -> dict[int, tuple[StreamState, list[Waiting]]]:
    """Another number of streams: what was drawn is cut off evenly, and what lies below the cut is dealt out to wait."""
    olds = [_add_sources(saved.streams[number], identity) for number in sorted(saved.streams)]
    ends = [_end(olds, source) for source in range(len(identity.sources))]
    waiting = sorted(
        [*_undrawn_rows(olds, ends, config, corpus), *(item for stream in olds for item in _waiting(stream))]
    )
    count = identity.streams
    return {number: (_split_counters(olds, ends, number, identity), waiting[number::count]) for number in range(count)}


def _waiting(stream: StreamState) -> Iterator[Waiting]:
    segments = stream.waiting
    for ref in dict.fromkeys(segment.ref for segment in segments):
        yield Waiting(ref, tuple(sorted(segment.part for segment in segments if segment.ref == ref)))


def _end(olds: Sequence[StreamState], source: int) -> int:
    """The first draw of a source that no stream has made, nor any later one."""
    return max(
        number + (stream.drawn[source] - 1) * len(olds) + 1 if stream.drawn[source] else 0
        for number, stream in enumerate(olds)
    )


def _undrawn_rows(
    olds: Sequence[StreamState], ends: Sequence[int], config: DataConfig, corpus: Corpus
) -> Iterator[Waiting]:
    """Draws below the end that their stream has not come to."""
    for source, end in enumerate(ends):
        files = corpus.sources[source]
        assert isinstance(files, FileSet)
        order = RowOrder(files.shards, config.seed, source, config.shuffle_of(config.sources[source]))
        for number, stream in enumerate(olds):
            for draw in range(number + stream.drawn[source] * len(olds), end, len(olds)):
                row, epoch = order.at(draw)
                yield Waiting(Ref(source, row, epoch), None)


def _split_counters(olds: Sequence[StreamState], ends: Sequence[int], number: int, identity: Identity) -> StreamState:
    """A new stream's counters. What all streams gave so far is booked on the first, so that sums stay what they were."""
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
    return msgspec.structs.replace(
        stream,
        packs=sum(old.packs for old in olds),
        conversations=sum(old.conversations for old in olds),
        tokens=sum(old.tokens for old in olds),
        refused=_summed(old.refused for old in olds),
        notes=_summed(old.notes for old in olds),
        accepted=tuple(sum(amounts, Amount()) for amounts in zip(*(old.accepted for old in olds), strict=True)),
    )


def _summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for key, value in one.items():
            total[key] = total.get(key, 0) + value
    return total


def _add_sources(stream: StreamState, identity: Identity) -> StreamState:
    """Room for sources that were added."""
    more = len(identity.sources) - len(stream.drawn)
    zeros = (0,) * more
    return msgspec.structs.replace(
        stream, drawn=stream.drawn + zeros, mixed=stream.mixed + zeros, accepted=stream.accepted + (Amount(),) * more
    )


def _reread(
    stream: StreamState, waiting: Sequence[Waiting], config: DataConfig, stages: ExampleReader, number: int
) -> StreamState:
    """What waits, as it is under the new settings: planned anew with the next window."""
    leftovers: list[Leftover] = []
    refused: list[Refusal] = []
    for item in waiting:
        stages.expect(item.ref)
    for item in waiting:
        try:
            leftovers += [Leftover(segment, 0) for segment in _segments(item, config, stages)]
        except Refused as reason:
            refused.append(Refusal.at(item.ref, reason.reason, reason.detail))
        except RuntimeError as gone:
            raise ValueError(f"a conversation that was read and waits must stay where it was: {gone}") from None
    rows = RowSampler(config, open_cursors(config, stages.reading, number))
    rows.reset(msgspec.to_builtins(stream))
    exhausted = not leftovers and rows.state_dict()["exhausted"]
    return msgspec.structs.replace(
        stream,
        planned=(),
        leftovers=tuple(leftovers),
        refused=_summed([stream.refused, Counter(refusal.reason for refusal in refused)]),
        unlisted=tuple(refused),
        exhausted=exhausted,
    )


def _segments(item: Waiting, config: DataConfig, stages: ExampleReader) -> Iterator[Segment]:
    examples = stages.examples(item.ref)
    if (longest := max(len(example.tokens) for example in examples)) > config.capacity:
        raise Refused("longer than capacity", f"{longest} tokens do not fit into a pack of {config.capacity}")
    for part, example in enumerate(examples):
        if item.parts is None or part in item.parts:
            yield Segment(item.ref.source, item.ref.row, len(example.tokens), item.ref.epoch, part)
