"""Compute the statistics of measured rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from sftstream.config import DataConfig
from sftstream.sources import Corpus
from sftstream.stats.measure import Measured, joined
from sftstream.streaming.forecast import choose_streams, foresee
from sftstream.streaming.length_sample import LengthSample
from sftstream.streaming.order import shuffled
from sftstream.streaming.packing import packs_of_stream

BINS = 40
"""Bars of a histogram."""
SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
"""Shares of the examples for which a length is told; 0 is the shortest, 1 the longest."""
FACTORS = (0.25, 0.5, 1, 2, 4)
"""Capacities that are judged, in multiples of `data.capacity`."""
PLANNED = 16_384
"""Largest number of examples that are divided into packs to judge a capacity."""
PAIRS = 10
"""Pairs of equal rows that are listed."""
LONGEST = 160
"""Characters of a refused row's detail in an error."""


class Histogram(msgspec.Struct, frozen=True):
    """Counts of values between equally spaced edges."""

    edges: tuple[float, ...]
    """One more than `counts`."""
    counts: tuple[int, ...]
    open_end: bool = False
    """True if the last bar holds a long tail, up to the largest value, the last edge."""


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """The distribution of a number over the examples."""

    mean: float
    quantiles: dict[str, float]
    """Share of the examples -> the value that this share does not exceed: {"0.5": 120, ...}."""
    histogram: Histogram


class CapacityFill(msgspec.Struct, frozen=True, kw_only=True):
    """The packs that a capacity would make."""

    capacity: int
    fill: float
    """Share of the slots with tokens, 0 to 1, in a run of one stream."""
    too_long: float
    """Share of the examples that do not fit, 0 to 1."""
    lost_tokens: float
    """Share of the tokens in these examples, 0 to 1."""


class Pair(msgspec.Struct, frozen=True):
    """Two equal rows."""

    place: str
    equal_to: str


class SourceStats(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of a source."""

    path: str
    rows: int | None
    """Rows of the source; None if it is streamed and was read in part."""
    read: int
    examples: int
    tokens: int
    trained: int
    refused: dict[str, int]
    """Reason -> rows, the most frequent first, without rows that are too long for a pack."""
    too_long: int
    """Examples longer than `data.capacity`; refused if `data.overflow` is "drop"."""
    share_of_tokens: float
    """Share of this source in the tokens of a run, as its weight and its size make it."""


class Refused(msgspec.Struct, frozen=True):
    """A refused row."""

    place: str
    reason: str
    detail: str


class Overlap(msgspec.Struct, frozen=True, kw_only=True):
    """Rows that occur more than once, found by digests."""

    duplicates: int
    """Training rows whose tokens equal those of an earlier training row."""
    pairs: tuple[Pair, ...]
    held_out: int
    """Held-out rows that were read."""
    held_out_refused: int
    """Held-out rows that were refused, and so are compared with nothing."""
    trained_too: int
    """Held-out rows whose tokens equal those of a training row."""
    trained_too_pairs: tuple[Pair, ...]
    asked_too: int
    """Held-out rows whose question equals that of a training row."""
    asked_too_pairs: tuple[Pair, ...]


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """The statistics of a config's data."""

    sampled: bool
    """True if a sample was measured; duplicates are then lower bounds."""
    sources: tuple[SourceStats, ...]
    lengths: Lengths
    trained_share: Lengths
    """Trained share of each example, from 0 to 1."""
    messages: Lengths
    capacities: tuple[CapacityFill, ...]
    refused: tuple[Refused, ...]
    """The first refused rows of each source."""
    overlap: Overlap
    capacity: int
    global_batch: int
    epochs: int | None
    streams: int
    packs: int | None
    """Packs of the run; None for an endless run, or with a streamed source."""
    steps: int | None
    fill: float | None
    seconds: float
    """Duration of the measurement."""


def summarize(
    config: DataConfig, corpus: Corpus, training: Sequence[Measured], held_out: Sequence[Measured], seconds: float
) -> Stats:
    """Return the statistics of measured training sources and held-out sources.

    `corpus` holds the training sources, then the held-out sources. Raises ValueError if no row of
    the training sources can be trained.
    """
    lengths, trained, messages = (
        np.concatenate([getattr(m.numbers, name) for m in training]) for name in ("lengths", "trained", "messages")
    )
    if not len(lengths):
        raise ValueError(
            f"none of {sum(m.read for m in training):,} rows can be trained: {_reasons(corpus, training)}; correct the rows, "
            "or name other sources in the config"
        )
    config, forecast = _forecast(config, training)
    return Stats(
        sampled=any(m.size is None or m.read < m.size for m in (*training, *held_out)),
        sources=_sources(config, training),
        lengths=_distribution(lengths),
        trained_share=_distribution(trained / np.maximum(lengths, 1), top=1.0),
        messages=_distribution(messages),
        capacities=tuple(_fill(lengths, int(config.capacity * factor), config.window) for factor in FACTORS),
        refused=tuple(
            Refused(corpus.locate_row(number, row), reason, detail)
            for number, m in enumerate((*training, *held_out))
            for row, reason, detail in m.examples
        ),
        overlap=_overlap(corpus, training, held_out),
        capacity=config.capacity,
        global_batch=config.global_batch,
        epochs=config.epochs,
        streams=config.stream_count,
        packs=forecast[0],
        steps=forecast[1],
        fill=forecast[2],
        seconds=seconds,
    )


def _reasons(corpus: Corpus, training: Sequence[Measured]) -> str:
    """Return each reason of a refusal, the most frequent first, with its rows and one of them."""
    counts = sum((m.refused for m in training), Counter[str]())
    places: dict[str, str] = {}
    for number, m in enumerate(training):
        for row, reason, detail in m.examples:
            shown = detail if len(detail) <= LONGEST else f"{detail[: LONGEST - 3]}..."
            places.setdefault(reason, f"{corpus.locate_row(number, row)}: {shown}")
    return ", ".join(f"{reason}: {count:,} (one is {places[reason]})" for reason, count in counts.most_common())


def _forecast(
    config: DataConfig, training: Sequence[Measured]
) -> tuple[DataConfig, tuple[int | None, int | None, float | None]]:
    """Return the config with a number of streams, and packs, steps and fill of the run."""
    own = Corpus(config.sources)
    samples = None
    if None not in own.sizes:
        samples = [
            LengthSample(max(m.read, 1), tuple(m.numbers.lengths[m.numbers.lengths <= config.capacity].tolist()))
            for m in training
        ]
    if config.streams == "auto":
        config = msgspec.structs.replace(config, streams=choose_streams(config, own, samples, 1))
    found = foresee(config, own, samples)
    return config, (found.packs, found.steps, found.fill)


def _sources(config: DataConfig, training: Sequence[Measured]) -> tuple[SourceStats, ...]:
    weights = [_weight(config, m) for m in training]
    total = sum(weights) or 1.0
    return tuple(
        SourceStats(
            path=m.source.path,
            rows=m.size,
            read=m.read,
            examples=len(m.numbers.lengths),
            tokens=int(m.numbers.lengths.sum()),
            trained=int(m.numbers.trained.sum()),
            refused=dict(m.refused.most_common()),
            too_long=int((m.numbers.lengths > config.capacity).sum()),
            share_of_tokens=weight / total,
        )
        for m, weight in zip(training, weights, strict=True)
    )


def _weight(config: DataConfig, m: Measured) -> float:
    """Return a number in proportion to the tokens that a run draws from a source."""
    fits = m.numbers.lengths <= config.capacity
    tokens, trained, rows = int(m.numbers.lengths[fits].sum()), int(m.numbers.trained[fits].sum()), max(m.read, 1)
    if m.source.weight is None:
        return tokens / rows * (m.size or m.read) * m.source.repeat
    unit = {"conversations": int(fits.sum()), "tokens": tokens, "trained_tokens": trained}[config.mix_by]
    return m.source.weight * tokens / max(unit, 1)


def _distribution(values: NDArray[np.int64] | NDArray[np.float64], top: float | None = None) -> Lengths:
    low = 0.0 if top is not None else float(values.min())
    high = float(values.max()) if top is None else top
    whole = top is None and high - low < BINS
    edges = np.arange(low, high + 2) if whole else np.linspace(low, high, BINS + 1)
    tail = float(np.quantile(values, 0.99, method="inverted_cdf"))
    open_end = not whole and top is None and high > 2 * tail
    if open_end:  # a few very long conversations would leave all others in one bar
        edges = np.append(np.linspace(low, tail + 1, BINS), high)
    counts, _ = np.histogram(values, edges)
    return Lengths(
        mean=float(values.mean()),
        quantiles={str(share): float(np.quantile(values, share, method="inverted_cdf")) for share in SHARES},
        histogram=Histogram(tuple(edges.tolist()), tuple(counts.tolist()), open_end),
    )


def _fill(lengths: NDArray[np.int64], capacity: int, window: int) -> CapacityFill:
    capacity = max(capacity, 1)
    fitting = lengths[lengths <= capacity].tolist()
    some = [fitting[index] for index in shuffled(len(fitting), "stats")[:PLANNED]] if fitting else []
    packs = packs_of_stream(some, capacity, window) if some else 0
    return CapacityFill(
        capacity=capacity,
        fill=sum(some) / (packs * capacity) if packs else 0.0,
        too_long=1 - len(fitting) / len(lengths),
        lost_tokens=1 - sum(fitting) / int(lengths.sum()),
    )


Positions: TypeAlias = NDArray[np.int64]
Digests: TypeAlias = NDArray[np.uint64]


class _Rows(msgspec.Struct, frozen=True):
    """The digests of the first examples of rows, with the sources and numbers of the rows."""

    sources: NDArray[np.int64]
    rows: NDArray[np.int64]
    digests: NDArray[np.uint64]
    questions: NDArray[np.uint64]


def _overlap(corpus: Corpus, training: Sequence[Measured], held_out: Sequence[Measured]) -> Overlap:
    ours, theirs = _rows(training, 0), _rows(held_out, len(training))
    first, index, inverse = np.unique(ours.digests, return_index=True, return_inverse=True)
    later = np.flatnonzero(index[inverse] != np.arange(len(inverse)))
    asked, asked_at = np.unique(ours.questions, return_index=True)
    trained_too = np.flatnonzero(np.isin(theirs.digests, first))
    asked_too = np.flatnonzero(np.isin(theirs.questions, asked[asked != 0]))

    def place(rows: _Rows, at: int) -> str:
        return corpus.locate_row(int(rows.sources[at]), int(rows.rows[at]))

    def pairs(found: Positions, digests: Digests, known: Digests, at: Positions) -> tuple[Pair, ...]:
        """Return rows of `theirs`, and rows of `ours` with equal digests: `known`, in rows `at`."""
        some = found[:PAIRS]
        equal = at[np.searchsorted(known, digests[some])]
        return tuple(Pair(place(theirs, i), place(ours, j)) for i, j in zip(some.tolist(), equal.tolist(), strict=True))

    return Overlap(
        duplicates=len(later),
        pairs=tuple(Pair(place(ours, i), place(ours, int(index[inverse[i]]))) for i in later[:PAIRS].tolist()),
        held_out=sum(m.read for m in held_out),
        held_out_refused=sum(m.refused.total() for m in held_out),
        trained_too=len(trained_too),
        trained_too_pairs=pairs(trained_too, theirs.digests, first, index),
        asked_too=len(asked_too),
        asked_too_pairs=pairs(asked_too, theirs.questions, asked, asked_at),
    )


def _rows(measured: Sequence[Measured], first: int) -> _Rows:
    """Return one entry for each accepted row; a row of several examples counts by its first."""
    begins = [np.flatnonzero(np.diff(m.numbers.rows, prepend=-1)) for m in measured]
    numbers = joined([m.numbers.at(begin) for m, begin in zip(measured, begins, strict=True)])
    sources = np.repeat(np.arange(first, first + len(measured)), [len(begin) for begin in begins])
    return _Rows(sources, numbers.rows, numbers.digests, numbers.questions)
