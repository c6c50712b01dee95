"""Lengths of a sample of rows, to choose the number of streams and to foresee the packs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sftstream.records import Conversation, Example, Ref, Refused
from sftstream.sources import Corpus, FileSet
from sftstream.streaming.example_reader import ExampleReader
from sftstream.streaming.order import permute, round_keys
from sftstream.tokenization.encoder import ChatEncoder

LEAST_ROWS = 4
"""Rows measured of each of many sources."""
ROWS_AT_ONCE = 16


class SampleSize(NamedTuple):
    """The size of a sample of all sources. A sample of long conversations has fewer rows."""

    rows: int
    tokens: int


TO_CHOOSE = SampleSize(128, 1 << 15)
"""Measured in about a tenth of a second before the first pack."""
TO_FORESEE = SampleSize(1024, 1 << 19)
"""A mean length is exact to 2 % if lengths vary by 50 %."""


class LengthSample(NamedTuple):
    """The examples of sampled rows of a source."""

    rows: int
    """Rows looked at, refused rows included."""
    lengths: tuple[int, ...]
    """Tokens of each example."""


def sample_lengths(corpus: Corpus, encoder: ChatEncoder, size: SampleSize) -> list[LengthSample] | None:
    """Return a sample of each source; None with a streamed source, of which no row is read ahead.

    Depends on the data and the encoder alone: all shards and all starts get equal samples.
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
