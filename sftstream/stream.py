"""One logical stream as a graph of nodes: load -> template -> tokenize -> pack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torchdata.nodes import BaseNode

from sftstream.config import DataConfig, SourceConfig
from sftstream.draw import Drawn, Rows, open_cursors
from sftstream.encoder import ChatEncoder
from sftstream.formats import conversation
from sftstream.packing import Packer, PackerConfig
from sftstream.records import Conversation, Example, Ref, Refusal, Refused
from sftstream.sources import BrokenRow, Corpus, FileSet, Reading

X = TypeVar("X")
Y = TypeVar("Y")

ROWS_OF_A_STREAMED_SOURCE = 1_000_000
"""Taken for those of a source that cannot say: a stream that refuses twice as many in a row is hopeless."""


class Map(BaseNode[Drawn[Y] | Refusal], Generic[X, Y]):
    """Applies a stage to what was drawn. Rows that a stage refuses go on as `Refusal`. Its state is its source's."""

    def __init__(self, source: BaseNode[Drawn[X] | Refusal], stage: Callable[[X], Y]) -> None:
        super().__init__()
        self.source = source
        self._stage = stage

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.source.reset(initial_state)

    def next(self) -> Drawn[Y] | Refusal:
        item = next(self.source)
        if isinstance(item, Refusal):
            return item
        try:
            return Drawn(item.ref, self._stage(item.value))
        except Refused as refused:
            return Refusal.at(item.ref, refused.reason, refused.detail)

    def get_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.source.state_dict()
        return state


@dataclass(frozen=True)
class Stages:
    """The pure stages of one stream."""

    reading: Reading
    encoder: ChatEncoder

    def expect(self, ref: Ref) -> None:
        """This conversation was read before the state was taken, and will be asked for."""
        self.reading.expect(ref)

    def load(self, ref: Ref) -> Conversation:
        """The conversation at `ref`; raises `Refused`."""
        try:
            return conversation(self.reading.read(ref))
        except BrokenRow as error:
            raise Refused("broken row", str(error)) from None

    def examples(self, ref: Ref) -> list[Example]:
        """All stages at once; raises `Refused`."""
        return self.encoder.tokenize(self.encoder.draft(self.load(ref)))


def read_conversations(path: str) -> Iterator[Conversation]:
    """All conversations of a file or glob, in order; raises ValueError naming the row that is none."""
    rows = FileSet(SourceConfig(path=path))
    for row in range(len(rows)):
        try:
            yield conversation(rows.read(row))
        except (BrokenRow, Refused) as error:
            raise ValueError(f"{rows.place(row)}: {error}") from None


def build_stream(config: DataConfig, corpus: Corpus, encoder: ChatEncoder, stream: int) -> Packer:
    """The graph of logical stream number `stream`, to be reset before it is read."""
    stages = Stages(Reading(corpus), encoder)
    rows = Rows(config, open_cursors(config, stages.reading, stream))
    loaded = Map(rows, stages.load)
    rendered = Map(loaded, encoder.draft)
    tokenized = Map(rendered, encoder.tokenize)
    packer = PackerConfig(
        capacity=config.capacity,
        window=config.window,
        streams=config.streams,
        seed=config.seed,
        shuffle=bool(config.shuffle),
        pad_id=encoder.tokenizer.pad_id,
        rows=sum(ROWS_OF_A_STREAMED_SOURCE if size is None else size for size in corpus.sizes),
    )
    return Packer(tokenized, stages, rows.account, stream, packer)
