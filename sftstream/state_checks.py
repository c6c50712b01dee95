"""Check a state when it is loaded: an error names the first contradiction in a damaged state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sftstream.config import DataConfig
from sftstream.identity import Identity
from sftstream.records import Amount, Ref
from sftstream.sources import Corpus, FileSet
from sftstream.state import DataState, StreamState
from sftstream.streaming.order import RowOrder, draws_of_stream
from sftstream.streaming.packer import MOST_REFUSED
from sftstream.streaming.packing import LONGEST_WINDOW
from sftstream.streaming.sampler import row_order

LARGEST = 1 << 53
"""Limit of all counters: JSON readers represent integers exactly up to this number."""
WINDOWS_OF_WAITING_ROWS = 4
"""Waiting rows were drawn for at most this number of windows: `MAX_WAIT` windows, the current
window, and a margin."""
MOST_DRAWS_CHECKED = 20_000
"""Largest number of draws compared with the waiting rows; the check is skipped above."""


def require_sound(state: DataState, config: DataConfig, corpus: Corpus) -> None:
    """Raise ValueError naming the first contradiction in a state, or with `config` and `corpus`.

    Counters of a stream are compared with each other only if the state was never rebased: a rebase
    may divide the draws among other streams, and reads waiting rows again.
    """
    if not 0 <= state.packs < LARGEST:
        raise ValueError(f"the state is damaged: packs = {state.packs}; use another state")
    for number, stream in state.streams.items():
        for problem in _problems(state, number, stream, config, corpus):
            raise ValueError(f"the state is damaged: stream {number}: {problem}; use another state")


def _problems(state: DataState, number: int, stream: StreamState, config: DataConfig, corpus: Corpus) -> Iterator[str]:
    if not 0 <= number < state.identity.streams:
        yield f"the run has {state.identity.streams} streams"
    yield from _bad_shapes(stream, state.identity)
    yield from _bad_bookmarks(stream, state.identity)
    yield from _bad_segments(stream, state.identity)
    orders = _orders(state, config, corpus)
    yield from _bad_positions(number, stream, config, orders)
    if not state.rebased:
        yield from _bad_counters(state, number, stream)
        yield from _foreign_rows(number, stream, config, orders)


def _orders(state: DataState, config: DataConfig, corpus: Corpus) -> dict[int, RowOrder]:
    """Return source number -> order of rows, without streamed sources."""
    return {
        source: row_order(files.file_sizes, config, source, state.orders.get(source, ()))
        for source, files in enumerate(corpus.sources)
        if isinstance(files, FileSet)
    }


def _bad_shapes(stream: StreamState, identity: Identity) -> Iterator[str]:
    sources = len(identity.sources)
    for name in ("drawn", "mixed", "accepted", "refused"):
        if len(values := getattr(stream, name)) != sources:
            yield f"{name} has {len(values)} entries for {sources} sources"
    counters = {
        "drawn": stream.drawn,
        "mixed": stream.mixed,
        "accepted": [number for a in stream.accepted for number in (a.conversations, a.tokens, a.trained_tokens)],
        "refused": [number for reasons in stream.refused for number in reasons.values()],
        "notes": stream.notes.values(),
        "waited": [leftover.waited for leftover in stream.leftovers],
        "places": [number for place in stream.stripe_positions.values() for number in (place.stripes, place.rows)],
    }
    for name in ("windows", "packs", "conversations", "tokens"):
        counters[name] = [getattr(stream, name)]
    for name, numbers in counters.items():
        if bad := [number for number in numbers if not 0 <= number < LARGEST]:
            yield f"{name} holds {bad[0]}"
    if isinstance(stream.digests, tuple) and len(stream.digests) != len(stream.planned) + len(stream.leftovers):
        yield f"{len(stream.digests)} digests for {len(stream.planned)} packs and {len(stream.leftovers)} rows waiting"
    if not 0 <= stream.stage <= len(identity.stages):
        yield f"stage = {stream.stage}, but the config has {len(identity.stages)} mixture stages"
    if unknown := [s for s in stream.stripe_positions if not 0 <= s < sources or identity.sources[s].shards is None]:
        yield f"source {unknown[0]} is not streamed but has a position in a file"
    if stream.exhausted and (stream.planned or stream.leftovers or stream.unlisted):
        yield "the stream is exhausted, but rows are waiting"


def _bad_bookmarks(stream: StreamState, identity: Identity) -> Iterator[str]:
    for source, bookmarks in stream.known_bookmarks.items():
        files = identity.sources[source].shards or 0 if 0 <= source < len(identity.sources) else 0
        for bookmark in bookmarks:
            if not 0 <= bookmark.file < files:
                yield f"a bookmark is in file {bookmark.file} of source {source}, which has {files} streamed files"
            if bad := [n for n in (bookmark.row, bookmark.offset, bookmark.skipped) if not 0 <= n < LARGEST]:
                yield f"a bookmark of source {source} holds {bad[0]}"


def _bad_segments(stream: StreamState, identity: Identity) -> Iterator[str]:
    segments = stream.waiting
    for segment in segments:
        if not 0 <= segment.source < len(identity.sources):
            yield f"a row of source {segment.source} waits, but the config has {len(identity.sources)} sources"
            return
        rows = identity.sources[segment.source].rows
        if not 0 <= segment.row < (LARGEST if rows is None else rows):
            yield f"row {segment.row} waits, but source {segment.source} has {rows} rows"
        if not 0 < segment.length <= identity.capacity:
            yield f"a part of {segment.length} tokens waits, outside 1 to {identity.capacity}"
        if not 0 <= segment.epoch < LARGEST or not 0 <= segment.part < LARGEST:
            yield f"epoch {segment.epoch}, part {segment.part} of a row waits"
    parts = [(segment.ref, segment.part) for segment in segments]
    if len(set(parts)) < len(parts):
        yield "a part of a row waits twice"
    for pack in stream.planned:
        if not 0 < sum(segment.length for segment in pack) <= identity.capacity:
            yield f"a pack of {sum(segment.length for segment in pack)} tokens is planned, outside 1 to {identity.capacity}"


def _bad_positions(number: int, stream: StreamState, config: DataConfig, orders: dict[int, RowOrder]) -> Iterator[str]:
    if config.epochs is None:
        return
    for source, order in orders.items():
        draws = order.draws(config.sources[source].repeat, config.epochs)
        most = draws_of_stream(draws, number, config.stream_count)
        if stream.drawn[source] > most and config.sources[source].repeat >= 1:
            yield f"{stream.drawn[source]} rows of source {source} were drawn, but all epochs have {most}"


def _bad_counters(state: DataState, number: int, stream: StreamState) -> Iterator[str]:
    given = draws_of_stream(state.packs, number, state.identity.streams)
    refused = [sum(reasons.values()) for reasons in stream.refused]
    # After many refused rows a stream returns an empty pack, which it does not count.
    empty = given if stream.exhausted else sum(refused) // MOST_REFUSED
    if not given - empty <= stream.packs <= given:
        yield f"packs = {stream.packs}, but the first {state.packs} packs of the run have {given} of this stream"
    for source, (drawn, amount) in enumerate(zip(stream.drawn, stream.accepted, strict=True)):
        if drawn != amount.conversations + refused[source]:
            yield (
                f"{drawn} rows of source {source} were read, but {amount.conversations} are accepted and "
                f"{refused[source]} refused"
            )
    accepted, waiting = sum(stream.accepted, Amount()), stream.waiting
    amounts = {
        "conversations": (accepted.conversations, stream.conversations + sum(s.part == 0 for s in waiting)),
        "tokens": (accepted.tokens, stream.tokens + sum(s.length for s in waiting)),
    }
    for name, (read, known) in amounts.items():
        if read != known:
            yield f"{read} {name} were read, but {known} are returned or waiting"
    if not state.identity.stages:
        yield from _bad_mixture(state.identity, stream, refused)


def _bad_mixture(identity: Identity, stream: StreamState, refused: Sequence[int]) -> Iterator[str]:
    by = {"conversations": stream.drawn, "tokens": [amount.tokens for amount in stream.accepted]}
    expected: Sequence[int] = by.get(identity.mix_by, [amount.trained_tokens for amount in stream.accepted])
    for source, (mixed, amount) in enumerate(zip(stream.mixed, expected, strict=True)):
        # Refused rows count with a share in a mixture by tokens, and did not count in format 3.
        if mixed < amount or (mixed > amount and not (refused[source] and identity.mix_by != "conversations")):
            yield f"mixed = {mixed} for source {source}, but the {identity.mix_by} read are {amount}"


def _foreign_rows(number: int, stream: StreamState, config: DataConfig, orders: dict[int, RowOrder]) -> Iterator[str]:
    """Yield a problem if a waiting row is not among the stream's last draws."""
    most = WINDOWS_OF_WAITING_ROWS * LONGEST_WINDOW * config.window
    most += sum(sum(reasons.values()) for reasons in stream.refused)
    if most > MOST_DRAWS_CHECKED:
        return
    for source, order in orders.items():
        foreign = {segment.ref for segment in stream.waiting if segment.source == source}
        end = stream.drawn[source]
        least = max(0, end - most)
        # From the last window backwards: few rows wait for longer.
        while foreign and end > least:
            draw, begun = max(least, end - config.window), end
            end = draw
            while draw < begun:
                rows, epoch = order.stretch(number + draw * config.stream_count, config.stream_count, begun - draw)
                foreign.difference_update(Ref(source, row, epoch) for row in rows)
                draw += len(rows)
        if foreign:
            yield f"row {min(foreign).row} of source {source} waits, but the stream has not drawn it recently"
