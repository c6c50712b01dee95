"""Rows -> examples: all stages before packing, as functions on batches and on a single row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sftstream.config import SourceConfig
from sftstream.formats import decode_row, parse_row
from sftstream.records import Conversation, Example, Ref, Refused
from sftstream.sources import BrokenRow, Corpus, CorpusReader, FileSet
from sftstream.tokenization.encoder import ChatEncoder


@dataclass(frozen=True)
class ExampleReader:
    """Reads, renders and tokenizes the rows of a logical stream."""

    corpus: CorpusReader
    encoder: ChatEncoder

    @classmethod
    def of(cls, corpus: Corpus, encoder: ChatEncoder) -> ExampleReader:
        """Return a reader with its own position in each streamed source of `corpus`."""
        return cls(CorpusReader(corpus, decode_row), encoder)

    def expect(self, ref: Ref) -> None:
        """Announce a row read before a state was taken: the row will be read again."""
        self.corpus.expect(ref)

    def load(self, refs: Iterable[Ref]) -> Iterator[Conversation | Refused]:
        """Yield the conversation of each row, or the reason for a refusal."""
        read = self.corpus.read
        for ref in refs:
            try:
                yield parse_row(read(ref))
            except Refused as refused:
                yield refused
            except BrokenRow as error:
                yield Refused("broken row", str(error))

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
        except (BrokenRow, Refused) as error:
            raise ValueError(f"{rows.locate_row(row)}: {error}") from None
