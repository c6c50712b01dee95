"""One logical stream as a graph of nodes: load -> template -> tokenize -> pack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from torchdata.nodes import BaseNode

from sftstream.config import DataConfig, SourceConfig
from sftstream.encoder import ChatEncoder
from sftstream.formats import conversation
from sftstream.order import draws_of_stream, next_source, row_of_draw
from sftstream.packing import Packer, PackerConfig
from sftstream.records import Conversation, Example, Ref, Refusal, Refused
from sftstream.sources import BrokenRow, Corpus

X = TypeVar("X")
Y = TypeVar("Y")


class Drawn(NamedTuple, Generic[X]):
    """What a stage made of the row at `ref`."""

    ref: Ref
    value: X


class Rows(BaseNode[Drawn[Ref]]):
    """The rows of one logical stream in their order. Its state: how many were drawn from each source."""

    def __init__(self, config: DataConfig, sizes: Sequence[int], stream: int) -> None:
        super().__init__()
        self._config = config
        self._sizes = sizes
        self._stream = stream
        weights = [source.weight for source in config.sources]
        self._weights = [size if weight is None else weight for size, weight in zip(sizes, weights, strict=True)]
        self._limits: list[int] | None = None
        if config.epochs is not None:
            self._limits = [draws_of_stream(size, config.epochs, stream, config.streams) for size in sizes]

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self._drawn = list(initial_state["drawn"]) if initial_state else [0] * len(self._sizes)

    def next(self) -> Drawn[Ref]:
        source = next_source(self._drawn, self._weights, self._limits)
        if source is None:
            raise StopIteration
        draw = self._stream + self._drawn[source] * self._config.streams
        keys = ("row", self._config.seed, source)
        row, epoch = row_of_draw(draw, self._sizes[source], keys, self._config.shuffle)
        self._drawn[source] += 1
        ref = Ref(source, row, epoch)
        return Drawn(ref, ref)

    def get_state(self) -> dict[str, Any]:
        exhausted = next_source(self._drawn, self._weights, self._limits) is None
        return {"drawn": list(self._drawn), "exhausted": exhausted}


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


class Stages(NamedTuple):
    """The pure stages that all streams of a process share."""

    corpus: Corpus
    encoder: ChatEncoder

    def load(self, ref: Ref) -> Conversation:
        """The conversation at `ref`; raises `Refused`."""
        try:
            return conversation(self.corpus.read(ref.source, ref.row))
        except BrokenRow as error:
            raise Refused("broken row", str(error)) from None

    def examples(self, ref: Ref) -> list[Example]:
        """All stages at once; raises `Refused`."""
        return self.encoder.tokenize(self.encoder.draft(self.load(ref)))


def read_conversations(path: str) -> Iterator[Conversation]:
    """All conversations of a file or glob, in order; raises ValueError naming the row that is none."""
    corpus = Corpus((SourceConfig(path=path),))
    for row in range(corpus.sizes[0]):
        try:
            yield conversation(corpus.read(0, row))
        except (BrokenRow, Refused) as error:
            raise ValueError(f"{corpus.place(0, row)}: {error}") from None


def build_stream(config: DataConfig, stages: Stages, stream: int) -> Packer:
    """The graph of logical stream number `stream`, to be reset before it is read."""
    rows = Rows(config, stages.corpus.sizes, stream)
    loaded = Map(rows, stages.load)
    rendered = Map(loaded, stages.encoder.draft)
    tokenized = Map(rendered, stages.encoder.tokenize)
    packer = PackerConfig(
        capacity=config.capacity,
        window=config.window,
        streams=config.streams,
        seed=config.seed,
        shuffle=config.shuffle,
        pad_id=stages.encoder.tokenizer.pad_id,
        rows=sum(stages.corpus.sizes),
    )
    return Packer(tokenized, stages.examples, stream, packer)
