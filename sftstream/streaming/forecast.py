"""Choose the number of streams of a new run, and estimate the packs, steps and fill of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from sftstream.config import DataConfig
from sftstream.sources import Corpus, StreamedSource
from sftstream.streaming.length_sample import LengthSample
from sftstream.streaming.order import draws_of_source, shuffled
from sftstream.streaming.packing import packs_of_stream

MOST_STREAMS = 64
"""Largest number of streams that is chosen, unless there are more shards."""
PACKS_OF_A_STREAM = 64
"""`choose_streams` leaves each stream at least this number of packs, unless the shards need more
streams. The last pack of a stream is half empty on average, which costs less than 1 % of the slots
of 64 packs."""
WINDOWS_OF_A_STREAM = 4
"""`choose_streams` also leaves each stream at least this number of windows, unless the shards need
more streams."""
PLANNED_EXAMPLES = 4096
"""Largest number of examples that a forecast divides into packs."""
FEW_STEPS = 10
"""`Forecast.describe` mentions the empty packs of the last step if they are more than 1 /
`FEW_STEPS` of all packs."""


class Content(NamedTuple):
    """Number of examples of a source in a run, and of their tokens, estimated from a sample."""

    examples: int
    tokens: int


def estimate_content(config: DataConfig, corpus: Corpus, samples: Sequence[LengthSample]) -> list[Content]:
    """Return the estimated content of each source in all epochs; in one epoch of an endless run."""
    contents = []
    for source, size, sample in zip(config.sources, corpus.sizes, samples, strict=True):
        draws = draws_of_source(size or 0, source.repeat, config.epochs or 1)
        contents.append(Content(draws * len(sample.lengths) // sample.rows, draws * sum(sample.lengths) // sample.rows))
    return contents


def choose_streams(config: DataConfig, corpus: Corpus, samples: Sequence[LengthSample] | None, shards: int) -> int:
    """Return the number of streams of a new run on `shards` data-parallel shards.

    The number is the largest of `shards`, 2 * `shards`, 4 * `shards`, ... that is at most
    `MOST_STREAMS` and leaves each stream at least `PACKS_OF_A_STREAM` packs and
    `WINDOWS_OF_A_STREAM` windows. If even `shards` streams are too many, the number is `shards`.
    `samples` is None if a source is streamed. The amount of data is then unknown and counts as
    large, but the number is at most the number of files, so that each stream reads whole files.

    1,000 rows of 200 tokens in 3 epochs fill 73 packs of 8192 tokens and 12 windows of 256
    examples: the number is 1 for one shard, and 8 for 8 shards. For 100,000 rows of 360 tokens the
    number is 64 for one shard and for 8 shards.
    """
    if samples is None:
        files = min(source.file_count for source in corpus.sources if isinstance(source, StreamedSource))
        most = min(MOST_STREAMS, files)
    else:
        contents = estimate_content(config, corpus, samples)
        packs = sum(content.tokens for content in contents) // config.capacity
        examples = sum(content.examples for content in contents)
        most = min(MOST_STREAMS, packs // PACKS_OF_A_STREAM, examples // (WINDOWS_OF_A_STREAM * config.window))
    streams = shards
    while 2 * streams <= most:
        streams *= 2
    return streams


class Forecast(NamedTuple):
    """The packs of a run, estimated from a sample of rows."""

    streams: int
    global_batch: int
    capacity: int
    packs: int | None
    """Packs with conversations; None for an endless run, or with a streamed source."""
    fill: float | None
    """Share of the packs' slots filled by conversations; None with a streamed source."""

    @property
    def steps(self) -> int | None:
        """Steps until the data ends; None if the data is endless or its size unknown."""
        return None if self.packs is None else max(1, -(-self.packs // self.global_batch))

    def describe(self, most_steps: int | None = None) -> str:
        """Return the forecast as a line of text.

        `most_steps` is the step at which the run ends even if rows are left; None for no such step.
        """
        steps = self.steps if most_steps is None else min(most_steps, self.steps or most_steps)
        full = "" if self.fill is None else f", about {self.fill:.1%} full"
        end = f"{full}; {_counted(self.streams, 'logical stream')}"
        if steps is None:
            return f"packs of {self.capacity:,} tokens{end}"
        if steps != self.steps or self.packs is None:
            return f"{steps * self.global_batch:,} packs of {self.capacity:,} tokens in {_counted(steps, 'step')}{end}"
        line = f"about {self.packs:,} packs of {self.capacity:,} tokens in {_counted(steps, 'step')}{end}"
        empty = steps * self.global_batch - self.packs
        if empty > steps * self.global_batch // FEW_STEPS:
            line += (
                f"; about {empty} of the {self.global_batch} packs of the last step are empty: "
                "a smaller data.global_batch leaves fewer packs empty"
            )
        return line


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def foresee(config: DataConfig, corpus: Corpus, samples: Sequence[LengthSample] | None) -> Forecast:
    """Estimate the packs of a run, by dividing a part of a stream's examples into packs."""
    streams, batch, capacity = config.stream_count, config.global_batch, config.capacity
    if samples is None:
        return Forecast(streams, batch, capacity, None, None)
    contents = estimate_content(config, corpus, samples)
    examples, tokens = (sum(numbers) for numbers in zip(*contents, strict=True))
    if not tokens:
        return Forecast(streams, batch, capacity, 0, 0.0)
    per_stream = max(1, examples // streams)
    planned = min(per_stream, PLANNED_EXAMPLES)
    lengths = _drawn(contents, samples, planned)
    full = Fraction(sum(lengths), capacity)
    packs = packs_of_stream(lengths, capacity, config.window)
    # Number of packs made, divided by the number that a packing without free slots would make. The
    # divisor is rounded up, so that the partly filled last pack of the planned part does not count
    # as a loss.
    warm = Fraction(packs, math.ceil(full))
    if config.epochs is None:
        return Forecast(streams, batch, capacity, None, float(1 / warm))
    ideal = Fraction(tokens, capacity)
    whole = streams == 1 and planned == per_stream
    total = packs if whole else max(min(streams, examples), math.ceil(ideal * warm + Fraction(streams, 2)))
    return Forecast(streams, batch, capacity, total, float(ideal / total))


def _drawn(contents: Sequence[Content], samples: Sequence[LengthSample], count: int) -> list[int]:
    """Return about `count` sampled lengths in random order, from each source in proportion to its
    number of examples."""
    examples = sum(content.examples for content in contents)
    lengths: list[int] = []
    for content, sample in zip(contents, samples, strict=True):
        share = -(-count * content.examples // examples)
        lengths += [sample.lengths[i % len(sample.lengths)] for i in range(share if sample.lengths else 0)]
    return [lengths[i] for i in shuffled(len(lengths), "forecast")]
