"""One logical stream as a graph of nodes: load -> template -> tokenize -> pack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torchdata.nodes import BaseNode

from sftstream.config import DataConfig, SourceConfig
from sftstream.formats import parse_row
from sftstream.records import BrokenRow, Conversation, Example, Ref, Refused
from sftstream.sources import Corpus, CorpusReader, FileSet
from sftstream.streaming.packing import Packer, PackerConfig
from sftstream.streaming.sampler import RowBatch, RowSampler, open_cursors
from sftstream.tokenization.encoder import ChatEncoder

X = TypeVar("X")
Y = TypeVar("Y")

ROWS_OF_A_STREAMED_SOURCE = 1_000_000
"""Taken for those of a source that cannot say: a stream that refuses twice as many in a row is hopeless."""


class Map(BaseNode[RowBatch[Y]], Generic[X, Y]):
    """Applies a stage to what was drawn. What a stage refuses goes on as its refusal. Its state is its source's.

    A stage is given several at a time, so that its code and tables stay in the core's cache: conversation by conversation
    the same stages take twice as long.
    """

    def __init__(self, source: BaseNode[RowBatch[X]], stage: Callable[[list[X]], Iterable[Y | Refused]]) -> None:
        super().__init__()
        self.source = source
        self._stage = stage

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.source.reset(initial_state)

    def next(self) -> RowBatch[Y]:
        refs, values = next(self.source)
        if Refused not in set(map(type, values)):
            return RowBatch(refs, list(self._stage(values)))
        results = iter(self._stage([value for value in values if not isinstance(value, Refused)]))
        return RowBatch(refs, [value if isinstance(value, Refused) else next(results) for value in values])

    def get_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.source.state_dict()
        return state


@dataclass(frozen=True)
class ExampleReader:
    """The pure stages of one stream."""

    reading: CorpusReader
    encoder: ChatEncoder

    @classmethod
    def of(cls, corpus: Corpus, encoder: ChatEncoder) -> ExampleReader:
        """With places of their own in what is streamed."""
        return cls(CorpusReader(corpus), encoder)

    def expect(self, ref: Ref) -> None:
        """This conversation was read before the state was taken, and will be asked for."""
        self.reading.expect(ref)

    def load_all(self, refs: Iterable[Ref]) -> Iterator[Conversation | Refused]:
        """The conversations at `refs`, or why not."""
        read, columns = self.reading.read, self.reading.columns
        for ref in refs:
            try:
                yield parse_row(read(ref), columns[ref.source])
            except Refused as refused:
                yield refused
            except BrokenRow as broken:
                yield Refused("broken row", f"{self.reading.locate_broken(ref)} {broken}")

    def examples(self, ref: Ref) -> list[Example]:
        """All stages at once; raises `Refused`."""
        (loaded,) = self.load_all([ref])
        if isinstance(loaded, Refused):
            raise loaded
        return self.encoder.tokenize(self.encoder.render_conversation(loaded))


def read_conversations(path: str) -> Iterator[Conversation]:
    """All conversations of a file or glob, in order; raises ValueError naming the row that is none."""
    rows = FileSet(SourceConfig(path=path))
    for row in range(len(rows)):
        try:
            yield parse_row(rows.read(row))
        except BrokenRow as broken:
            rows.require_intact(row)
            raise ValueError(f"{rows.locate_row(row)} {broken}") from None
        except Refused as refused:
            raise ValueError(f"{rows.locate_row(row)}: {refused}") from None


Watch = Callable[[str, BaseNode[Any]], BaseNode[Any]]
"""Puts something around a node of the graph, whose name it is given."""


def build_stream(
    config: DataConfig, corpus: Corpus, encoder: ChatEncoder, stream: int, watch: Watch = lambda _, node: node
) -> Packer:
    """The graph of logical stream number `stream`, to be reset before it is read."""
    stages = ExampleReader.of(corpus, encoder)
    rows = RowSampler(config, open_cursors(config, stages.reading, stream))
    drawn = watch("draw", rows)
    loaded = watch("load", Map(drawn, stages.load_all))
    rendered = watch("template", Map(loaded, encoder.render_conversations))
    tokenized = watch("tokenize", Map(rendered, encoder.tokenize_all))
    packer = PackerConfig(
        capacity=config.capacity,
        window=config.window,
        streams=config.streams,
        seed=config.seed,
        shuffle=bool(config.shuffle),
        pad_id=encoder.tokenizer.vocabulary.pad_id,
        rows=sum(ROWS_OF_A_STREAMED_SOURCE if size is None else size for size in corpus.sizes),
    )
    return Packer(tokenized, stages, rows, stream, packer)
