"""Read rows and turn them into examples, in batches or one at a time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import inf

import numpy as np

from sftstream import formats
from sftstream.config import DataConfig, RowSettings, SourceConfig
from sftstream.formats import parse_row, parse_unverified
from sftstream.records import BrokenRow, Conversation, Example, Ref, Refused
from sftstream.sources import Bookmarks, Corpus, CorpusReader, FileSet, ReadRow, StreamedSource
from sftstream.streaming.order import permute, round_keys
from sftstream.tokenization.encoder import ChatEncoder
from sftstream.tokenization.unverified import encode_unverified

_SAMPLED = 100
"""Largest number of rows of a source that are examined for unread columns."""

SEARCHED, SEARCHED_IN_A_FILE = 10_000, 500
"""Limits of the search for a row that can be trained: rows tried in a source, and rows tried in
each file of a streamed source in the first pass over its files."""
CHECKED_AT_ONCE = 64
"""Number of row numbers that the search in random order computes at once."""


@dataclass(frozen=True)
class ExampleReader:
    """Reads, renders and tokenizes the rows of a logical stream."""

    corpus: CorpusReader
    encoder: ChatEncoder

    @classmethod
    def of(cls, corpus: Corpus, encoder: ChatEncoder) -> ExampleReader:
        """Return a reader with its own position in each streamed source of `corpus`."""
        return cls(CorpusReader(corpus), encoder)

    def expect(self, ref: Ref) -> None:
        """Announce that a row will be read again, because a loaded state refers to it."""
        self.corpus.expect(ref)

    def remember(self, bookmarks: Bookmarks) -> None:
        """Add bookmarks of a loaded state: rows of streamed files from which reading can begin."""
        self.corpus.remember(bookmarks)

    def bookmarks(self, refs: Sequence[Ref]) -> Bookmarks:
        """Return the bookmarks from which the rows `refs` can be read again.

        All of `refs` must have been read.
        """
        return self.corpus.bookmarks(refs)

    def load(self, refs: Iterable[Ref]) -> Iterator[Conversation | list[Example] | Refused]:
        """Yield the conversation of each row, or a Refused if the row cannot be trained.

        For a row of plain text or token ids, which needs a source with `verified = false`, yields
        the list of the row's examples instead.

        Raises RuntimeError at the end if the content of a file has changed.
        """
        read, settings, refs = self.corpus.read, self.corpus.settings, list(refs)
        for ref in refs:
            try:
                row = read(ref)
                if not settings[ref.source].verified and (plain := parse_unverified(row, settings[ref.source])):
                    yield [encode_unverified(plain, self.encoder.tokenizer)]
                    continue
                conversation = parse_row(row, settings[ref.source])
                self._require_fitting(conversation)
                yield conversation
            except Refused as refused:
                yield refused
            except BrokenRow as broken:
                yield Refused("broken row", f"{self.corpus.locate_broken(ref)} {broken}")
        self.corpus.require_unchanged(refs)  # after the reads, so that it covers every row read

    @cached_property
    def _most_letters(self) -> float:
        """Number of characters in a pack if every token were the vocabulary's longest token.

        Infinite if long conversations are shortened, or if the template may leave out text.
        """
        policy, lengths = self.encoder.policy, self.encoder.tokenizer.vocabulary.byte_lengths
        if policy.overflow != "drop" or lengths is None or self.encoder.report.rewrites_history:
            return inf
        return policy.capacity * int(lengths.max())

    def _require_fitting(self, conversation: Conversation) -> None:
        """Raise Refused if the texts cannot fit into a pack, since rendering megabytes takes
        minutes."""
        letters = sum([len(message.content) for message in conversation.messages if message.content])
        if letters > self._most_letters:
            capacity = self.encoder.policy.capacity
            raise Refused(
                "longer than capacity",
                f"its texts of {letters:,} characters do not fit into {capacity} tokens; "
                "raise data.capacity, or set data.overflow",
            )

    def examples(self, ref: Ref) -> list[Example]:
        """Return the examples of a row; raises Refused if the row cannot be trained."""
        (loaded,) = self.load([ref])
        if isinstance(loaded, Refused):
            raise loaded
        if isinstance(loaded, list):
            return loaded
        return self.encoder.encode_conversation(loaded)


class SourceCheck:
    """Finds sources in which every row is refused: a stream without a limit of epochs would read
    such a source forever and never return a pack.

    A stream calls the check when it refuses a row of a source before it has accepted any row of
    that source. The check tries the rows of an indexed source in random order, and those of a
    streamed source in stored order, some rows of each file in turn. It stops at the first good row
    or after `SEARCHED` rows. If `max_refused` or `max_too_long` is 1, good rows may be
    arbitrarily rare, and the check tries all rows.
    """

    def __init__(self, corpus: Corpus, encoder: ChatEncoder, config: DataConfig) -> None:
        self._corpus = corpus
        self._encoder = encoder
        self._capacity = config.capacity
        self._most = None if max(config.max_refused, config.max_too_long) == 1 else SEARCHED
        self._good: set[int] = set()

    def require_conversation(self, source: int) -> None:
        """Raise ValueError if every row of a source is refused."""
        if source in self._good:
            return
        reasons: Counter[str] = Counter()
        last = ""
        reader = ExampleReader.of(self._corpus, self._encoder)
        for ref in itertools.islice(self._rows(source, reader.corpus), self._most):
            try:
                examples = reader.examples(ref)
            except Refused as refused:
                reasons[refused.reason] += 1
                last = f"; the last: row {ref.row}, {refused.detail}"
                continue
            if max(len(example.tokens) for example in examples) <= self._capacity:
                self._good.add(source)
                return
            reasons["longer than capacity"] += 1
        counts = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common())
        rows = reasons.total()
        found = (
            f"holds no conversation to train: each of its {rows:,} rows is refused"
            if rows != self._most
            else f"holds no conversation to train among {rows:,} rows tried"
        )
        raise ValueError(f"source {source} {found} ({counts}{last}); correct the source, or remove it")

    def _rows(self, source: int, reader: CorpusReader) -> Iterator[Ref]:
        opened = reader.sources[source]
        if isinstance(opened, FileSet):
            keys = round_keys("check", source)
            for first in range(0, len(opened), CHECKED_AT_ONCE):
                indices = np.arange(first, min(first + CHECKED_AT_ONCE, len(opened)))
                yield from (Ref(source, row, 0) for row in permute(indices, len(opened), keys).tolist())
            return
        # Some rows of each file in turn, so that a short search meets many files.
        files, first, end = list(range(opened.source.file_count)), 0, SEARCHED_IN_A_FILE
        while files:
            for file in tuple(files):
                rows = (Ref(source, opened.source.number(file, index), 0) for index in range(first, end))
                for ref in rows:
                    if not opened.reaches(ref):
                        files.remove(file)
                        break
                    yield ref
            # More rows from turn to turn: at each turn a file is read again from its beginning.
            first, end = end, 4 * end


def read_conversations(path: str) -> Iterator[Conversation]:
    """Yield all conversations of a file or glob, in order.

    Raises ValueError naming the first row without a valid conversation.
    """
    rows = FileSet(SourceConfig(path=path))
    for row in range(len(rows)):
        try:
            yield parse_row(rows.read(row))
        except BrokenRow as broken:
            rows.require_intact(row)
            raise ValueError(f"{rows.locate_row(row)} {broken}") from None
        except Refused as refused:
            raise ValueError(f"{rows.locate_row(row)}: {refused}") from None


def unread_columns(corpus: Corpus, *, prints_tools: bool = True) -> list[set[str]]:
    """Return for each source the columns, and keys of messages, that no layout reads.

    `prints_tools` tells whether the chat template prints tool definitions; a column of definitions
    counts as unread if not. Examines up to `_SAMPLED` rows of each source: evenly spread rows, or
    the first rows of a streamed source. Columns that the config ignores are not returned.
    """
    return [
        set[str]().union(*(_unread(read, source.settings, prints_tools) for read in _sample(source)))
        for source in corpus.sources
    ]


def _sample(source: FileSet | StreamedSource) -> Iterator[ReadRow]:
    if isinstance(source, StreamedSource):
        return itertools.islice(source.open(0, 0).rows, _SAMPLED)
    step = -(-len(source) // _SAMPLED)
    return (partial(source.read, row) for row in range(0, len(source), step))


def _unread(read: ReadRow, settings: RowSettings, prints_tools: bool) -> set[str]:
    try:
        row = read()
        unread = formats.unread_columns(row, settings)
        return unread if prints_tools or not parse_row(row, settings).tools else {*unread, "tools"}
    except (BrokenRow, Refused):
        return set()
