"""Rows -> examples: all stages before packing, as functions on batches and on a single row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from math import inf

from sftstream import formats
from sftstream.config import RowSettings, SourceConfig
from sftstream.formats import parse_row
from sftstream.records import BrokenRow, Conversation, Example, Ref, Refused
from sftstream.sources import Corpus, CorpusReader, FileSet, ReadRow, StreamedSource
from sftstream.tokenization.encoder import ChatEncoder

_SAMPLED = 100
"""Rows of a source in which columns that nothing reads are looked for."""


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
        """Announce a row read before a state was taken: the row will be read again."""
        self.corpus.expect(ref)

    def load(self, refs: Iterable[Ref]) -> Iterator[Conversation | Refused]:
        """Yield the conversation of each row, or the reason for a refusal."""
        read, settings = self.corpus.read, self.corpus.settings
        for ref in refs:
            try:
                conversation = parse_row(read(ref), settings[ref.source])
                self._require_fitting(conversation)
                yield conversation
            except Refused as refused:
                yield refused
            except BrokenRow as broken:
                yield Refused("broken row", f"{self.corpus.locate_broken(ref)} {broken}")

    @cached_property
    def _most_letters(self) -> float:
        """Number of letters that fit into a pack of the tokenizer's longest tokens.

        Infinite if long conversations are shortened, or if the template may leave letters out.
        """
        policy, lengths = self.encoder.policy, self.encoder.tokenizer.vocabulary.byte_lengths
        if policy.overflow != "drop" or lengths is None or self.encoder.report.rewrites_history:
            return inf
        return policy.capacity * int(lengths.max())

    def _require_fitting(self, conversation: Conversation) -> None:
        """Raise Refused if the texts cannot fit into a pack: rendering megabytes takes minutes."""
        letters = sum([len(message.content) for message in conversation.messages if message.content])
        if letters > self._most_letters:
            capacity = self.encoder.policy.capacity
            raise Refused(
                "longer than capacity",
                f"its texts of {letters:,} characters do not fit into {capacity} tokens; raise capacity, or set overflow",
            )

    def examples(self, ref: Ref) -> list[Example]:
        """Return the examples of a row; raises `Refused`."""
        (loaded,) = self.load([ref])
        if isinstance(loaded, Refused):
            raise loaded
        return self.encoder.encode_conversation(loaded)


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


def unread_columns(corpus: Corpus) -> list[set[str]]:
    """Return for each source the columns, and keys of messages, that nothing reads.

    Looks at up to `_SAMPLED` rows of each source: evenly spread rows, or the first rows of a
    streamed source. Columns left out by the config do not count.
    """
    return [
        set[str]().union(*(_unread(read, source.settings) for read in _sample(source))) for source in corpus.sources
    ]


def _sample(source: FileSet | StreamedSource) -> Iterator[ReadRow]:
    if isinstance(source, StreamedSource):
        return islice(source.open(0, 0).rows, _SAMPLED)
    step = -(-len(source) // _SAMPLED)
    return (partial(source.read, row) for row in range(0, len(source), step))


def _unread(read: ReadRow, settings: RowSettings) -> set[str]:
    try:
        return formats.unread_columns(read(), settings)
    except (BrokenRow, Refused):
        return set()
