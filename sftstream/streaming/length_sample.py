"""Measure the lengths of sampled rows, to choose the number of streams and to forecast packs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sftstream.records import Conversation, Example, Ref, Refused
from sftstream.sources import Corpus, FileSet
from sftstream.streaming.example_reader import ExampleReader
from sftstream.streaming.order import permute, round_keys
from sftstream.tokenization.encoder import ChatEncoder

LEAST_ROWS = 4
"""Number of rows sampled from each source even if the config has very many sources."""
ROWS_AT_ONCE = 16
"""Number of rows read and tokenized together."""


class SampleSize(NamedTuple):
    """Limits of a sample of all sources together, divided evenly among the sources. Sampling a
    source ends at the limit that is reached first."""

    rows: int
    tokens: int


TO_CHOOSE = SampleSize(128, 1 << 15)
"""Sample from which the number of streams is chosen, in about a tenth of a second before the first
pack."""
TO_FORESEE = SampleSize(1024, 1 << 19)
"""Sample for a forecast. If the standard deviation of the lengths is half of their mean, the mean
length is exact to about 2 %."""


class LengthSample(NamedTuple):
    """The lengths of the examples in a sample of a source."""

    rows: int
    """Number of sampled rows, refused rows included."""
    lengths: tuple[int, ...]
    """Number of tokens of each example made from the sampled rows."""


def sample_lengths(corpus: Corpus, encoder: ChatEncoder, size: SampleSize) -> list[LengthSample] | None:
    """Return a sample of each source, or None if any source is streamed.

    A streamed source cannot be sampled, because its rows are read only in stored order. The result
    depends on nothing but the data, the encoder and `size`, so it is equal on all shards.
    """
    reader = ExampleReader.of(corpus, encoder)
    sources = [source for source in corpus.sources if isinstance(source, FileSet)]
    if len(sources) < len(corpus.sources):
        return None
    most = SampleSize(max(LEAST_ROWS, size.rows // len(sources)), size.tokens // len(sources))
    return [_sample(reader, number, len(source), most) for number, source in enumerate(sources)]


def _sample(reader: ExampleReader, source: int, count: int, most: SampleSize) -> LengthSample:
    keys = round_keys("sample", source)
    order = permute(np.arange(min(count, most.rows)), count, keys).tolist()
    lengths: list[int] = []
    rows = 0
    while rows < len(order) and sum(lengths) < most.tokens:
        refs = [Ref(source, row, 0) for row in order[rows : rows + ROWS_AT_ONCE]]
        rows += len(refs)
        for examples in _encode(reader, refs):
            parts = [len(example.tokens) for example in examples]
            if max(parts) <= reader.encoder.policy.capacity:
                lengths += parts
    return LengthSample(rows, tuple(lengths))


def _encode(reader: ExampleReader, refs: list[Ref]) -> list[list[Example]]:
    """Return the examples of each row that is not refused."""
    loaded = list(reader.load(refs))
    finished = [row for row in loaded if isinstance(row, list)]
    rendered = reader.encoder.renderer.render_conversations([row for row in loaded if isinstance(row, Conversation)])
    texts = [text for text in rendered if not isinstance(text, Refused)]
    encoded = [row for row in reader.encoder.tokenize_all(texts) if not isinstance(row, Refused)]
    return finished + encoded
