"""Build the graph of a logical stream: draw rows -> load -> template -> tokenize -> pack."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from torchdata.nodes import BaseNode

from sftstream.config import DataConfig
from sftstream.records import Refused
from sftstream.sources import Corpus
from sftstream.state import NO_PAST_ORDERS, PastOrders
from sftstream.streaming.example_reader import ExampleReader, SourceCheck
from sftstream.streaming.packer import Packer, PackerConfig
from sftstream.streaming.sampler import RowBatch, RowSampler, open_cursors
from sftstream.tokenization.encoder import ChatEncoder

X = TypeVar("X")
Y = TypeVar("Y")


_FINISHED = frozenset({Refused, list})
"""Types of values that need no further transform: a refusal, or the list of a row's examples."""


class Map(BaseNode[RowBatch[Y]], Generic[X, Y]):
    """Node that applies a function, the transform, to batches of rows. It has no state.

    Rows that an earlier node refused or finished pass through unchanged. Batches keep the code and
    tables of a transform in the CPU cache; row by row, the transforms would take twice as long.
    """

    def __init__(self, source: BaseNode[RowBatch[X]], transform: Callable[[list[X]], Iterable[Y | Refused]]) -> None:
        super().__init__()
        self.source = source
        self._transform = transform

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.source.reset(initial_state)

    def next(self) -> RowBatch[Y]:
        refs, values = next(self.source)
        if _FINISHED.isdisjoint(map(type, values)):
            return RowBatch(refs, list(self._transform(values)))
        results = iter(self._transform([value for value in values if type(value) not in _FINISHED]))
        return RowBatch(refs, [value if type(value) in _FINISHED else next(results) for value in values])

    def get_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.source.state_dict()
        return state


Watch = Callable[[str, BaseNode[Any]], BaseNode[Any]]
"""`watch(name, node)` returns the node, or a wrapper of the node that measures it."""


def build_stream(
    config: DataConfig,
    corpus: Corpus,
    encoder: ChatEncoder,
    stream: int,
    past: PastOrders = NO_PAST_ORDERS,
    check: SourceCheck | None = None,
    watch: Watch = lambda _, node: node,
) -> Packer:
    """Return the last node of the graph of logical stream number `stream`.

    Call `reset` before `next`. All streams of a process get the same `check`, so that each source
    is checked only once.
    """
    reader = ExampleReader.of(corpus, encoder)
    sampler = RowSampler(config, open_cursors(config, reader.corpus, stream, past))
    drawn = watch("draw", sampler)
    loaded = watch("load", Map(drawn, reader.load))
    rendered = watch("template", Map(loaded, encoder.renderer.render_conversations))
    tokenized = watch("tokenize", Map(rendered, encoder.tokenize_all))
    packer = PackerConfig(
        capacity=config.capacity,
        window=config.window,
        streams=config.stream_count,
        seed=config.seed,
        shuffle=bool(config.shuffle),
        pad_id=encoder.tokenizer.vocabulary.pad_id,
        in_parts=config.in_parts,
    )
    check = check or SourceCheck(corpus, encoder, config)
    return Packer(tokenized, sampler, reader, stream, packer, check)
