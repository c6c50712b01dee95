"""One logical stream as a graph of nodes: load -> template -> tokenize -> pack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
from torchdata.nodes import BaseNode

from sftstream.config import DataConfig, SourceConfig
from sftstream.encoder import ChatEncoder
from sftstream.formats import conversation
from sftstream.order import draws_of_stream, next_source, row_of_draw
from sftstream.packing import Packer, PackerConfig
from sftstream.records import Amount, Conversation, Example, Ref, Refusal, Refused
from sftstream.sources import BrokenRow, Corpus

X = TypeVar("X")
Y = TypeVar("Y")


class Drawn(NamedTuple, Generic[X]):
    """What a stage made of the row at `ref`."""

    ref: Ref
    value: X


class RowsState(msgspec.Struct, frozen=True, kw_only=True):
    """Where the rows of one logical stream stand."""

    drawn: tuple[int, ...]
    """Rows drawn from each source."""
    mixed: tuple[int, ...]
    """What the mixture counts of each source since the stage began."""
    stage: int = 0
    exhausted: bool = False


class Rows(BaseNode[Drawn[Ref]]):
    """The rows of one logical stream in their order, mixed by counters."""

    def __init__(self, config: DataConfig, sizes: Sequence[int], stream: int) -> None:
        super().__init__()
        self._config = config
        self._sizes = sizes
        self._stream = stream
        self._weights = [_weights(config, sizes), *(stage.weights for stage in config.stages)]
        self._limits = _limits(config, sizes, stream)

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        zeros = (0,) * len(self._sizes)
        state = msgspec.convert(initial_state, RowsState) if initial_state else RowsState(drawn=zeros, mixed=zeros)
        self._drawn, self._mixed, self._stage = list(state.drawn), list(state.mixed), state.stage

    def next(self) -> Drawn[Ref]:
        self._enter_stage()
        source = self._next_source()
        if source is None:
            raise StopIteration
        draw = self._stream + self._drawn[source] * self._config.streams
        keys = ("row", self._config.seed, source)
        row, epoch = row_of_draw(draw, self._sizes[source], keys, self._config.shuffle)
        self._drawn[source] += 1
        if self._config.mix_by == "conversations":
            self._mixed[source] += 1
        ref = Ref(source, row, epoch)
        return Drawn(ref, ref)

    def account(self, source: int, amount: Amount) -> None:
        """What the row just drawn turned out to hold: a mixture by tokens counts these."""
        if self._config.mix_by != "conversations":
            self._mixed[source] += amount.tokens if self._config.mix_by == "tokens" else amount.trained_tokens

    def get_state(self) -> dict[str, Any]:
        exhausted = self._next_source() is None
        state = RowsState(drawn=tuple(self._drawn), mixed=tuple(self._mixed), stage=self._stage, exhausted=exhausted)
        result: dict[str, Any] = msgspec.to_builtins(state)
        return result

    def _enter_stage(self) -> None:
        drawn = sum(self._drawn) * self._config.streams
        stage = sum(stage.after <= drawn for stage in self._config.stages)
        if stage != self._stage:
            self._stage, self._mixed = stage, [0] * len(self._sizes)

    def _next_source(self) -> int | None:
        ended = [limit is not None and drawn >= limit for drawn, limit in zip(self._drawn, self._limits, strict=True)]
        if self._config.ends_with == "first" and any(ended):
            return None
        return next_source(self._mixed, self._weights[self._stage], (i for i, end in enumerate(ended) if not end))


def _weights(config: DataConfig, sizes: Sequence[int]) -> list[float]:
    """The sources' own, or their sizes: then all end an epoch together."""
    pairs = zip(config.sources, sizes, strict=True)
    return [size * source.repeat if source.weight is None else source.weight for source, size in pairs]


def _limits(config: DataConfig, sizes: Sequence[int], stream: int) -> list[int | None]:
    """Rows that a finite stream draws from each source."""
    epochs = config.epochs
    if epochs is None:
        return [None] * len(sizes)
    pairs = zip(config.sources, sizes, strict=True)
    return [draws_of_stream(int(size * source.repeat * epochs), stream, config.streams) for source, size in pairs]


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
    return Packer(tokenized, stages.examples, rows.account, stream, packer)
