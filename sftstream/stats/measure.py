"""Read, render and tokenize the rows of a config, in several processes, and keep their numbers."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from sftstream.config import MOST, DataConfig, SourceConfig
from sftstream.records import Conversation, Example, Ref, Refused
from sftstream.sources import Corpus, FileSet
from sftstream.start import open_encoder
from sftstream.streaming.assignment import WHOLE
from sftstream.streaming.example_reader import ExampleReader
from sftstream.streaming.order import permute, round_keys
from sftstream.tokenization.encoder import ChatEncoder

ROWS_AT_ONCE = 128
"""Rows of a task, which are rendered and tokenized together."""
FEW_ROWS = 2048
"""Rows up to which one process measures them sooner than others are started."""
EXAMPLES = 20
"""Refused rows of each source that are listed, beside the first row of each reason."""


class RefusedRow(NamedTuple):
    """A refused row."""

    row: int
    reason: str
    detail: str


class RowNumbers(NamedTuple):
    """The numbers of measured rows, one entry for each example."""

    rows: NDArray[np.int64]
    """Number of the row of each example."""
    lengths: NDArray[np.int64]
    """Tokens of each example."""
    trained: NDArray[np.int64]
    """Trained tokens of each example."""
    messages: NDArray[np.int64]
    """Messages of the conversation of each example; 0 for plain text."""
    digests: NDArray[np.uint64]
    """Digest of the tokens of each example."""
    questions: NDArray[np.uint64]
    """Digest of the texts before the first answer; 0 for plain text."""

    def at(self, places: NDArray[np.int64]) -> RowNumbers:
        """Return the entries at some places."""
        return RowNumbers(
            self.rows[places],
            self.lengths[places],
            self.trained[places],
            self.messages[places],
            self.digests[places],
            self.questions[places],
        )


class Measured(NamedTuple):
    """The measured rows of a source."""

    source: SourceConfig
    size: int | None
    """Rows of the source; None if it is streamed and was read only in part."""
    read: int
    """Rows that were read."""
    numbers: RowNumbers
    refused: Counter[str]
    """Reason -> rows."""
    examples: tuple[RefusedRow, ...]
    """The first refused rows, and the first row of each reason, in the order of reading."""


class _Chunk(NamedTuple):
    read: int
    numbers: RowNumbers
    refused: Counter[str]
    examples: list[RefusedRow]


Advance = Callable[[int, int], None]
"""Function that is told the number of a source, and of its rows that were measured further."""


class Meter:
    """Measures the rows of sources with the template, mask and tokenizer of a config.

    A row longer than a pack is measured whole if `overflow` is "drop", so that other capacities can
    be judged.
    """

    def __init__(self, config: DataConfig, sources: Sequence[SourceConfig]) -> None:
        capacity = MOST["capacity"] if config.overflow == "drop" else config.capacity
        self.config = config
        self.encoder = open_encoder(msgspec.structs.replace(config, capacity=capacity), None, WHOLE)
        self.corpus = Corpus(tuple(sources))
        self._sources = tuple(sources)
        self._reader = ExampleReader.of(self.corpus, self.encoder)

    def measure(self, sample: int | None, workers: int, advance: Advance) -> list[Measured]:
        """Return the measured rows of each source, in order.

        `sample` is the number of rows drawn from each source; None for every row. Of a streamed
        source, a sample is its first rows.
        """
        result = []
        with self._processes(sample, workers) as run:
            for number, source in enumerate(self._sources):
                chunks = []
                for chunk in run(self._tasks(number, sample)):
                    advance(number, chunk.read)
                    chunks.append(chunk)
                result.append(self._measured(number, source, chunks, sample))
        return result

    def rows_to_read(self, sample: int | None) -> list[int | None]:
        """Return the number of rows to measure of each source; None if unknown."""
        return [sample if size is None else size if sample is None else min(sample, size) for size in self.corpus.sizes]

    @contextmanager
    def _processes(
        self, sample: int | None, workers: int
    ) -> Iterator[Callable[[Iterable[list[Ref]]], Iterator[_Chunk]]]:
        streamed = not all(isinstance(source, FileSet) for source in self.corpus.sources)
        rows = sum(count or 0 for count in self.rows_to_read(sample))
        # A streamed source is read forward by one reader; few rows are measured sooner alone.
        if workers < 2 or streamed or rows <= FEW_ROWS:
            task = _Task(self._reader)
            yield lambda tasks: map(task, tasks)
            return
        # fork: the processes inherit the row index, the tokenizer and the compiled template.
        with multiprocessing.get_context("fork").Pool(workers, _begin, (self.corpus, self.encoder)) as pool:
            yield lambda tasks: pool.imap(_in_process, tasks)

    def _tasks(self, number: int, sample: int | None) -> Iterator[list[Ref]]:
        source = self.corpus.sources[number]
        if isinstance(source, FileSet):
            count = len(source) if sample is None else min(sample, len(source))
            keys = round_keys("stats", number)
            for first in range(0, count, ROWS_AT_ONCE):
                rows = np.arange(first, min(first + ROWS_AT_ONCE, count))
                chosen = rows if count == len(source) else permute(rows, len(source), keys)
                yield [Ref(number, row, 0) for row in chosen.tolist()]
            return
        rows_of_stream = itertools.islice(self._streamed(number), sample)
        while refs := list(itertools.islice(rows_of_stream, ROWS_AT_ONCE)):
            yield refs

    def _streamed(self, number: int) -> Iterator[Ref]:
        """Yield references to the rows of a streamed source, file after file."""
        opened = self._reader.corpus.sources[number]
        assert not isinstance(opened, FileSet)
        for file in range(opened.source.file_count):
            for index in itertools.count():
                ref = Ref(number, opened.source.number(file, index), 0)
                if not opened.reaches(ref):
                    break
                yield ref

    def _measured(self, number: int, source: SourceConfig, chunks: list[_Chunk], sample: int | None) -> Measured:
        read = sum(chunk.read for chunk in chunks)
        size = self.corpus.sizes[number]
        whole = size is None and (sample is None or read < sample)
        return Measured(
            source,
            read if whole else size,
            read,
            joined([chunk.numbers for chunk in chunks]),
            sum((chunk.refused for chunk in chunks), Counter[str]()),
            tuple(_listed(row for chunk in chunks for row in chunk.examples)),
        )


def _listed(refused: Iterable[RefusedRow]) -> Iterator[RefusedRow]:
    """Yield the first refused rows, and after them the first row of each further reason."""
    seen = set[str]()
    for number, row in enumerate(refused):
        if number < EXAMPLES or row.reason not in seen:
            yield row
        seen.add(row.reason)


class _Task:
    """Measures the rows of a task."""

    def __init__(self, reader: ExampleReader) -> None:
        self._reader = reader

    def __call__(self, refs: list[Ref]) -> _Chunk:
        encoder = self._reader.encoder
        loaded = list(self._reader.load(refs))
        conversations = [row for row in loaded if isinstance(row, Conversation)]
        rendered = list(encoder.renderer.render_conversations(conversations))
        encoded = iter(encoder.tokenize_all([text for text in rendered if not isinstance(text, Refused)]))
        results = iter([text if isinstance(text, Refused) else next(encoded) for text in rendered])
        chunk = _Chunk(len(refs), _EMPTY, Counter(), [])
        numbers: list[tuple[int, int, int, int, int, int]] = []
        for ref, row in zip(refs, loaded, strict=True):
            found = next(results) if isinstance(row, Conversation) else row
            if isinstance(found, Refused):
                chunk.refused[found.reason] += 1
                chunk.examples.append(RefusedRow(ref.row, found.reason, found.detail))
                continue
            conversation = row if isinstance(row, Conversation) else None
            numbers += [_numbers(ref, conversation, example) for example in found]
        return chunk._replace(numbers=_columns(numbers))


def _numbers(ref: Ref, conversation: Conversation | None, example: Example) -> tuple[int, int, int, int, int, int]:
    messages = conversation.messages if conversation else ()
    digest = xxhash.xxh3_64_intdigest(example.tokens.tobytes())
    return ref.row, len(example.tokens), example.targets, len(messages), digest, _question(conversation)


def _question(conversation: Conversation | None) -> int:
    """Return the digest of the texts before the first answer, without the system prompt."""
    if conversation is None:
        return 0
    before = itertools.takewhile(lambda message: message.role != "assistant", conversation.messages)
    texts = [(message.content or "").strip() for message in before if message.role != "system"]
    return xxhash.xxh3_64_intdigest("\0".join(texts).encode("utf-8", "surrogatepass")) if any(texts) else 0


def _columns(numbers: Sequence[tuple[int, int, int, int, int, int]]) -> RowNumbers:
    rows, lengths, trained, messages, digests, questions = list(zip(*numbers, strict=True)) or [()] * 6
    return RowNumbers(
        np.array(rows, np.int64),
        np.array(lengths, np.int64),
        np.array(trained, np.int64),
        np.array(messages, np.int64),
        np.array(digests, np.uint64),
        np.array(questions, np.uint64),
    )


_EMPTY = _columns([])


def joined(parts: Sequence[RowNumbers]) -> RowNumbers:
    """Return the numbers of several parts as one."""
    return RowNumbers(*map(np.concatenate, zip(*parts, strict=True))) if parts else _EMPTY


_task: _Task | None = None
"""The task of a process of the pool."""


def _begin(corpus: Corpus, encoder: ChatEncoder) -> None:
    global _task
    _task = _Task(ExampleReader.of(corpus, encoder))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends the pool


def _in_process(refs: list[Ref]) -> _Chunk:
    assert _task is not None
    return _task(refs)
