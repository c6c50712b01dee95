"""Check a state when it is loaded: an error names the first contradiction in a damaged state."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftstream.config import DataConfig
from sftstream.identity import Identity
from sftstream.records import Amount
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
Integers = NDArray[np.int64]


class _Waiting(NamedTuple):
    """The waiting segments of all streams, with an entry for each segment in every array."""

    streams: Integers
    source: Integers
    row: Integers
    epoch: Integers
    part: Integers
    length: Integers


Problem = tuple[int, str]
"""Number of a stream, and the contradiction in its state."""


def require_sound(state: DataState, config: DataConfig, corpus: Corpus) -> None:
    """Raise ValueError naming the first contradiction in a state, or with `config` and `corpus`.

    Counters of a stream are compared with each other only if the state was never rebased: a rebase
    may divide the draws among other streams, and reads waiting rows again.
    """
    if not 0 <= state.packs < LARGEST:
        raise ValueError(f"the state is damaged: packs = {state.packs}; use another state")
    for number, problem in _problems(state, config, corpus):
        raise ValueError(f"the state is damaged: stream {number}: {problem}; use another state")


def _problems(state: DataState, config: DataConfig, corpus: Corpus) -> Iterator[Problem]:
    for number, stream in state.streams.items():
        if not 0 <= number < state.identity.streams:
            yield number, f"the run has {state.identity.streams} streams"
        yield from ((number, problem) for problem in _bad_shapes(stream, state.identity))
        yield from ((number, problem) for problem in _bad_bookmarks(stream, state.identity))
    waiting = _waiting(state)
    yield from _bad_segments(waiting, state.identity)
    orders = _orders(state, config, corpus)
    had_more_draws = _had_more_draws(state)
    for number, stream in state.streams.items():
        yield from ((number, problem) for problem in _bad_packs(stream, state.identity))
        if not had_more_draws:
            yield from ((number, problem) for problem in _bad_positions(number, stream, config, orders))
        if not state.rebased:
            yield from ((number, problem) for problem in _bad_counters(state, number, stream))
    if not state.rebased:
        yield from _foreign_rows(waiting, state, config, orders)


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


def _bad_packs(stream: StreamState, identity: Identity) -> Iterator[str]:
    for pack in stream.planned:
        if not 0 < (tokens := sum([segment.length for segment in pack])) <= identity.capacity:
            yield f"a pack of {tokens} tokens is planned, outside 1 to {identity.capacity}"


def _waiting(state: DataState) -> _Waiting:
    segments = [(number, segment) for number, stream in state.streams.items() for segment in stream.waiting]
    rows = [(number, s.source, s.row, s.epoch, s.part, s.length) for number, s in segments]
    try:
        table = np.array(rows, np.int64)
    except OverflowError:
        number = next(row[0] for row in rows if max(map(abs, row)) >= LARGEST)
        raise ValueError(
            f"the state is damaged: stream {number}: a number of a waiting row is above {LARGEST}; use another state"
        ) from None
    return _Waiting(*table.reshape(-1, len(_Waiting._fields)).T)


def _bad_segments(waiting: _Waiting, identity: Identity) -> Iterator[Problem]:
    sources = len(identity.sources)
    if (at := _first((waiting.source < 0) | (waiting.source >= sources))) is not None:
        source = waiting.source[at]
        yield int(waiting.streams[at]), f"a row of source {source} waits, but the config has {sources} sources"
        return
    rows = np.array([LARGEST if source.rows is None else source.rows for source in identity.sources], np.int64)
    if (at := _first((waiting.row < 0) | (waiting.row >= rows[waiting.source]))) is not None:
        source = waiting.source[at]
        problem = f"row {waiting.row[at]} waits, but source {source} has {identity.sources[source].rows} rows"
        yield int(waiting.streams[at]), problem
    if (at := _first((waiting.length < 1) | (waiting.length > identity.capacity))) is not None:
        problem = f"a part of {waiting.length[at]} tokens waits, outside 1 to {identity.capacity}"
        yield int(waiting.streams[at]), problem
    outside = [(values < 0) | (values >= LARGEST) for values in (waiting.epoch, waiting.part)]
    if (at := _first(outside[0] | outside[1])) is not None:
        yield int(waiting.streams[at]), f"epoch {waiting.epoch[at]}, part {waiting.part[at]} of a row waits"
    order = np.lexsort([waiting.part, waiting.epoch, waiting.row, waiting.source])
    names = (waiting.source, waiting.row, waiting.epoch, waiting.part)
    twice = np.logical_and.reduce([values[order[1:]] == values[order[:-1]] for values in names])
    if (at := _first(twice)) is not None:
        yield int(waiting.streams[order[at + 1]]), "a part of a row waits twice"


def _first(wrong: NDArray[np.bool_]) -> int | None:
    """Return the index of the first True, or None."""
    at = np.flatnonzero(wrong)
    return int(at[0]) if len(at) else None


def _had_more_draws(state: DataState) -> bool:
    """Return True if an accepted change lowered the number of draws, perhaps below those made."""
    changed = re.compile(r"data\.(?:epochs|sources\[\d+\]\.repeat): (None|[\d.e+-]+) -> (None|[\d.e+-]+)")
    found = [changed.fullmatch(difference) for change in state.history for difference in change.differences]
    # None is an endless run.
    ends = [[math.inf if end == "None" else float(end) for end in match.groups()] for match in found if match]
    return any(after < before for before, after in ends)


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


def _foreign_rows(
    waiting: _Waiting, state: DataState, config: DataConfig, orders: dict[int, RowOrder]
) -> Iterator[Problem]:
    """Yield a problem if a waiting row is not among the last draws of its stream."""
    count = config.stream_count
    recent = WINDOWS_OF_WAITING_ROWS * LONGEST_WINDOW * config.window
    refused = {number: sum(sum(r.values()) for r in stream.refused) for number, stream in state.streams.items()}
    for source, order in orders.items():
        end = np.zeros(count, np.int64)
        least = np.zeros(count, np.int64)
        for number, stream in state.streams.items():
            end[number] = stream.drawn[source]
            least[number] = stream.drawn[source] - recent - refused[number]
        own = np.flatnonzero(waiting.source == source)
        for epoch in np.unique(waiting.epoch[own]).tolist():
            at = own[waiting.epoch[own] == epoch]
            if epoch * order.rows >= LARGEST:
                yield int(waiting.streams[at[0]]), f"a row of epoch {epoch} waits"
            streams, draws = waiting.streams[at], order.draws_of(waiting.row[at], epoch)
            mine = (draws % count == streams) & (draws // count < end[streams]) & (draws // count >= least[streams])
            if (first := _first(~mine)) is not None:
                problem = (
                    f"row {waiting.row[at[first]]} of source {source} waits, but the stream has not drawn it recently"
                )
                yield int(streams[first]), problem
