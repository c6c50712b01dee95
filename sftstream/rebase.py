"""Convert a state to changed data or settings, which the user accepted by name.

Rows returned in packs before the change are not returned again. Waiting rows (read, but not yet
returned) are read again under the new settings. If the number of streams changes, the draws are
divided among the new streams: see `_divide_streams`. No row is lost or repeated, and the new state
records the change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from sftstream.config import DataConfig, Policy
from sftstream.identity import FIXED, Identity
from sftstream.records import Amount, Example, Ref, Refusal, Refused, Segment
from sftstream.source_changes import follow_sources
from sftstream.sources import Corpus, FileSet
from sftstream.state import Change, DataState, Leftover, PastOrders, RowParts, StreamState, add_refusals
from sftstream.streaming.example_reader import ExampleReader
from sftstream.streaming.order import draws_of_stream
from sftstream.streaming.packer import PLANNING
from sftstream.streaming.sampler import RowSampler, open_cursors, row_order
from sftstream.streaming.skip import require_steps_to_come
from sftstream.tokenization.encoder import ChatEncoder


class Waiting(NamedTuple):
    """A row of which at least one part is not yet returned in a pack."""

    ref: Ref
    lengths: Mapping[int, int] | None
    """Waiting parts: number of the part -> its tokens. None if the row was never read."""
    known_parts: int = 0
    """Number of parts of the row when it was read; 0 if unknown, in states of version 0.1.0."""


def rebase(
    saved: DataState,
    identity: Identity,
    config: DataConfig,
    corpus: Corpus,
    encoder: ChatEncoder,
    changed: Sequence[str],
) -> DataState:
    """Return the state of all streams under the new `identity`.

    `changed` holds the accepted differences, as returned by `accepted_changes`. Raises ValueError
    if the change would lose or repeat a conversation.
    """
    _require_possible(saved, identity, changed)
    change = Change(packs=saved.packs, differences=tuple(changed))
    if change.only_skips:
        # Applied to finished packs: no draw and no waiting row changes.
        return msgspec.structs.replace(saved, identity=identity, history=(*saved.history, change))
    _require_whole(saved)
    saved = follow_sources(saved, identity, config, corpus)
    streams = (
        _divide_streams(saved, identity, config, corpus)
        if identity.streams != saved.identity.streams
        else _keep_streams(saved, identity)
    )
    rebased = {
        number: _read_again(stream, waiting, config, ExampleReader.of(corpus, encoder), number, saved.orders)
        for number, (stream, waiting) in streams.items()
    }
    steps = saved.packs // saved.identity.global_batch
    return DataState(
        identity=identity,
        packs=steps * identity.global_batch,
        streams=rebased,
        history=(*saved.history, change),
        past_orders=saved.past_orders,
    )


def is_possible(
    saved: DataState, identity: Identity, config: DataConfig, corpus: Corpus, changed: Sequence[str]
) -> bool:
    """Return True if the differences `changed` can be accepted, at the end of a step."""
    try:
        _require_possible(saved, identity, changed)
        follow_sources(saved, identity, config, corpus)
    except ValueError:
        return False
    return True


def _require_whole(saved: DataState) -> None:
    """Raise ValueError unless the state holds all streams at the end of a step."""
    before = saved.identity
    if missing := before.streams - len(saved.streams):
        raise ValueError(
            f"the state lacks {missing} of {before.streams} streams, and a change needs all; merge the shards' states"
        )
    if saved.packs % before.global_batch:
        raise ValueError(
            f"the state was saved after {saved.packs} packs, inside a step of {before.global_batch} packs; save "
            "a state at the end of a step"
        )


def _require_possible(saved: DataState, identity: Identity, changed: Sequence[str]) -> None:
    before = saved.identity
    require_steps_to_come(before.skip or None, identity.skip or None, saved.packs // before.global_batch)
    for difference in changed:
        if FIXED.fullmatch(name := difference.split(":")[0]):
            raise ValueError(
                f"a change of {name} cannot be accepted, since it decides the order of rows; start a new run"
            )
    streamed = any(source.shards for source in (*before.sources, *identity.sources))
    if identity.streams != before.streams and streamed:
        raise ValueError("a change of data.streams cannot be accepted with a streamed source; start a new run")
    if len(identity.sources) < len(before.sources):
        raise ValueError("a source that was read from cannot be removed; set its weight and repeat instead")
    # A part without a trained token is dropped: the trained roles and turns decide the parts too.
    policy = [name for name in Policy.__struct_fields__ if getattr(identity, name) != getattr(before, name)]
    if policy and before.in_parts:
        raise ValueError(
            "a part of a split conversation may have been returned already, so a change of "
            f"{', '.join(policy)} cannot be accepted; restore the setting, or start a new run"
        )


def _keep_streams(saved: DataState, identity: Identity) -> dict[int, tuple[StreamState, list[Waiting]]]:
    return {
        number: (
            _for_mixture(_add_sources(stream, identity), saved.identity, identity),
            list(_waiting(stream, saved.identity)),
        )
        for number, stream in saved.streams.items()
    }


def _for_mixture(stream: StreamState, before: Identity, identity: Identity) -> StreamState:
    """Return the stream with amounts of 0 if the settings of the mixture changed.

    The new weights hold from here on. With the amounts from before, a source with a larger weight
    than before, or an added source, would be drawn alone until its amount has caught up.
    """
    if _mixture(before) == _mixture(identity):
        return stream
    return msgspec.structs.replace(stream, mixed=(0,) * len(identity.sources))


def _mixture(identity: Identity) -> tuple[object, ...]:
    return identity.mix_by, identity.stages, [source.weight for source in identity.sources]


def _divide_streams(
    saved: DataState, identity: Identity, config: DataConfig, corpus: Corpus
) -> dict[int, tuple[StreamState, list[Waiting]]]:
    """Divide the draws of each source among another number of streams.

    All draws below the highest draw count as made; a draw below it that no old stream made waits
    like a leftover. Example: stream 0 of 2 made the draws 0, 2 and 4, stream 1 made draw 1. The
    highest draw is 4, so the draws 0 to 4 count as made. Draw 3 waits. Of 3 new streams, stream 0
    has made the draws 0 and 3, stream 1 the draws 1 and 4, stream 2 draw 2.
    """
    olds = [_add_sources(saved.streams[number], identity) for number in sorted(saved.streams)]
    ends = [_end(olds, source) for source in range(len(identity.sources))]
    waiting = sorted(
        [
            *_undrawn_rows(olds, ends, config, corpus, saved.orders),
            *(item for stream in olds for item in _waiting(stream, saved.identity)),
        ],
        key=lambda item: item.ref,
    )
    count = identity.streams
    streams = {number: _split_counters(olds, ends, number, identity) for number in range(count)}
    return {
        number: (_for_mixture(stream, saved.identity, identity), waiting[number::count])
        for number, stream in streams.items()
    }


def _waiting(stream: StreamState, identity: Identity) -> Iterator[Waiting]:
    recorded = stream.row_parts
    counts = {} if isinstance(recorded, UnsetType) else {parts.ref: parts.count for parts in recorded}
    # States of version 0.1.0 have no record of rows in several parts.
    otherwise = 0 if identity.in_parts and isinstance(recorded, UnsetType) else 1
    lengths: dict[Ref, dict[int, int]] = {}
    for segment in stream.waiting:
        lengths.setdefault(segment.ref, {})[segment.part] = segment.length
    for ref, parts in lengths.items():
        yield Waiting(ref, parts, counts.get(ref, otherwise))


def _end(olds: Sequence[StreamState], source: int) -> int:
    """Return the number of a source's first draw after all draws made by any stream."""
    return max(
        number + (stream.drawn[source] - 1) * len(olds) + 1 if stream.drawn[source] else 0
        for number, stream in enumerate(olds)
    )


def _undrawn_rows(
    olds: Sequence[StreamState], ends: Sequence[int], config: DataConfig, corpus: Corpus, past: PastOrders
) -> Iterator[Waiting]:
    """Yield the rows of draws below the end of each source that no old stream made."""
    for source, end in enumerate(ends):
        files = corpus.sources[source]
        assert isinstance(files, FileSet)
        order = row_order(files.file_sizes, config, source, past.get(source, ()))
        for number, stream in enumerate(olds):
            for draw in range(number + stream.drawn[source] * len(olds), end, len(olds)):
                row, epoch = order.at(draw)
                yield Waiting(Ref(source, row, epoch), None)


def _split_counters(olds: Sequence[StreamState], ends: Sequence[int], number: int, identity: Identity) -> StreamState:
    """Return a new stream's counters. Stream 0 gets the totals of all old streams."""
    count = identity.streams
    mixed = tuple(sum(stream.mixed[source] for stream in olds) // count for source in range(len(ends)))
    fresh = StreamState(
        drawn=tuple(draws_of_stream(end, number, count) for end in ends),
        mixed=mixed,
        stage=max(stream.stage for stream in olds),
        windows=max(stream.windows for stream in olds),
        accepted=(Amount(),) * len(ends),
        refused=({},) * len(ends),
    )
    return fresh if number else _carry_totals(fresh, olds)


def _carry_totals(stream: StreamState, olds: Sequence[StreamState]) -> StreamState:
    accepted = zip(*(old.accepted for old in olds), strict=True)
    return msgspec.structs.replace(
        stream,
        packs=sum(old.packs for old in olds),
        conversations=sum(old.conversations for old in olds),
        tokens=sum(old.tokens for old in olds),
        refused=tuple(_sum_counts(reasons) for reasons in zip(*(old.refused for old in olds), strict=True)),
        notes=_sum_counts(old.notes for old in olds),
        unlisted=tuple(refusal for old in olds for refusal in old.unlisted),
        accepted=tuple(sum(amounts, Amount()) for amounts in accepted),
    )


def _sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    return dict(sum(map(Counter, counts), Counter[str]()))


def _add_sources(stream: StreamState, identity: Identity) -> StreamState:
    """Return the stream with counters of 0 for the sources that were added."""
    more = len(identity.sources) - len(stream.drawn)
    zeros = (0,) * more
    return msgspec.structs.replace(
        stream,
        drawn=stream.drawn + zeros,
        mixed=stream.mixed + zeros,
        accepted=stream.accepted + (Amount(),) * more,
        refused=stream.refused + ({},) * more,
    )


def _read_again(
    stream: StreamState,
    waiting: Sequence[Waiting],
    config: DataConfig,
    reader: ExampleReader,
    number: int,
    past: PastOrders,
) -> StreamState:
    """Return the stream with all waiting rows as leftovers, read again under the new settings.

    New refusals go to `unlisted`; the stream's next pack lists them.
    """
    leftovers: list[Leftover] = []
    refused: list[Refusal] = []
    row_parts: list[RowParts] = []
    reader.remember(stream.known_bookmarks)
    for item in waiting:
        reader.expect(item.ref)
    for item in waiting:
        try:
            examples = _examples(item, config, reader)
        except Refused as reason:
            refused.append(Refusal.at(item.ref, reason.reason, reason.detail))
            continue
        except RuntimeError as gone:
            raise ValueError(
                f"a row that was read but not yet trained is needed: {gone}; restore the row, or start a new run"
            ) from None
        due, lost = _parts_due(item, [len(example.tokens) for example in examples])
        leftovers += [Leftover(_segment(item.ref, part, examples[part]), 0) for part in due]
        refused += lost
        if due and len(examples) > 1:
            row_parts.append(RowParts(*item.ref, len(examples)))
    sampler = RowSampler(config, open_cursors(config, reader.corpus, number, past))
    sampler.reset(msgspec.to_builtins(stream))
    unlisted = (*stream.unlisted, *refused)
    return msgspec.structs.replace(
        stream,
        planned=(),
        leftovers=tuple(leftovers),
        digests=UNSET,
        refused=add_refusals(stream.refused, refused),
        unlisted=unlisted,
        # A stream with unlisted refusals is not exhausted: its next pack must list them.
        exhausted=not leftovers and not unlisted and sampler.exhausted,
        row_parts=tuple(row_parts) if config.in_parts else UNSET,
        planning=PLANNING,
    )


def _examples(item: Waiting, config: DataConfig, reader: ExampleReader) -> list[Example]:
    examples = reader.examples(item.ref)
    if (longest := max(len(example.tokens) for example in examples)) > config.capacity:
        raise Refused(
            "longer than capacity",
            f"{longest} tokens do not fit into a pack of {config.capacity}",
        )
    return examples


def _parts_due(item: Waiting, lengths: Sequence[int]) -> tuple[list[int], list[Refusal]]:
    """Return the parts of a row that are still due, and refusals for parts that no longer exist.

    `lengths` holds the tokens of each part that the row has under the new settings. Example: the
    row had 3 parts, and part 0 was returned before the change. If the row has 3 parts now, the
    parts 1 and 2 are due. If it has 4 parts now, the parts 1, 2 and 3 are due. If it has 2 parts
    now, part 1 is due, and part 2 is refused.
    """
    if item.lengths is None:
        return list(range(len(lengths))), []
    known = item.known_parts or max(item.lengths) + 1
    given = set(range(known)) - item.lengths.keys()
    lost: list[Refusal] = []
    if gone := [part for part in item.lengths if part >= len(lengths)]:
        detail = f"the parts {sorted(gone)} waited, but the row has {len(lengths)} parts now"
        lost.append(Refusal.at(item.ref, "part no longer there", detail))
    if item.known_parts == 0 and len(lengths) > known:
        # A state of version 0.1.0: the last parts may have been returned already.
        given |= set(range(known, len(lengths)))
        if any(lengths[part] != length for part, length in item.lengths.items()):
            detail = f"the state does not say if the parts {known} to {len(lengths) - 1} were returned"
            lost.append(Refusal.at(item.ref, "part perhaps given", detail))
    return [part for part in range(len(lengths)) if part not in given], lost


def _segment(ref: Ref, part: int, example: Example) -> Segment:
    return Segment(ref.source, ref.row, len(example.tokens), ref.epoch, part)
