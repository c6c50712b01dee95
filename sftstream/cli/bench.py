"""What a config's data and this machine give: how soon the first pack is there, how fast they come, where the time goes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table
from torchdata.nodes import BaseNode

from sftstream.config import DataConfig
from sftstream.loader import PackLoader
from sftstream.records import Pack
from sftstream.streaming.stream import build_stream

DOES = {
    "draw": "which row comes next",
    "load": "reads and decodes the row, recognizes its layout",
    "template": "prints the conversation, finds what is trained in it",
    "tokenize": "token ids, and the loss mask by their borders",
    "pack": "plans windows of conversations, builds packs",
}

EPOCHS = 1_000_000
"""An end would come too soon: what is measured is a run under way."""


class Speed(NamedTuple):
    """Packs that came in a while."""

    workers: int
    first: float
    """Seconds from the loader's construction to the first pack."""
    tokens: float
    """Tokens a second after that."""
    conversations: float
    fill: float
    """Share of the packs' slots that hold tokens."""
    private: int
    """Bytes of memory that only the fullest worker has, or 0 where there is none or the system does not say."""


class ExampleReader(NamedTuple):
    """Where the time of one stream goes, in one process."""

    seconds: dict[str, float]
    conversations: int
    planned: float
    """Share of conversations that needed no run of the template."""
    refused: dict[str, int]
    tokenizer: str


class Stopwatch(BaseNode[Any]):
    """Adds the time that a node takes, without that of the nodes before it, to `seconds`."""

    def __init__(self, name: str, node: BaseNode[Any], seconds: dict[str, float], running: list[float]) -> None:
        super().__init__()
        self._name, self._node, self._seconds, self._running = name, node, seconds, running

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self._node.reset(initial_state)

    def next(self) -> Any:
        began = time.perf_counter()
        self._running.append(0.0)
        try:
            return next(self._node)
        finally:
            spent = time.perf_counter() - began
            self._seconds[self._name] = self._seconds.get(self._name, 0.0) + spent - self._running.pop()
            if self._running:
                self._running[-1] += spent

    def get_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._node.state_dict()
        return state


def bench(config: DataConfig, seconds: float) -> tuple[list[Speed], ExampleReader]:
    """Packs as fast as they come: one stream stage by stage, then the loader without workers and with the config's.

    Each is measured for so many seconds, the loaders after as many of warming up.
    """
    config = msgspec.structs.replace(config, epochs=EPOCHS, max_refused=1.0)
    stages = _by_stage(config, seconds)
    return [_speed(config, workers, seconds) for workers in sorted({0, config.workers})], stages


def _by_stage(config: DataConfig, seconds: float) -> ExampleReader:
    loader = PackLoader(config, workers=0)
    encoder = loader.encoder
    if encoder.tokenizer.fast_tokenizer:
        encoder.tokenizer.fast_tokenizer.load()
    spent: dict[str, float] = {}
    running: list[float] = []
    node = build_stream(config, loader.corpus, encoder, 0, lambda name, node: Stopwatch(name, node, spent, running))
    node.reset()
    for _ in _for(seconds, Stopwatch("pack", node, spent, running)):
        pass
    read = node.state.accepted
    conversations = sum(amount.conversations for amount in read)
    return ExampleReader(
        {name: spent[name] for name in DOES},
        conversations,
        encoder.renderer.planned / max(encoder.renderer.rendered, 1),
        node.state.refused,
        encoder.tokenizer.fast or "tokenizers",
    )


def _speed(config: DataConfig, workers: int, seconds: float) -> Speed:
    began = time.perf_counter()
    loader = PackLoader(config, workers=workers)
    try:
        next(loader)
        first = time.perf_counter() - began
        for _ in _for(seconds, loader):  # until tokenizers are loaded, plans made, and what was read ahead is used up
            pass
        began = time.perf_counter()
        packs = [(pack.tokens, pack.conversations) for pack in _for(seconds, loader)]
        took = time.perf_counter() - began
        private = max((_private_memory(worker.pid) for worker in active_children()), default=0)
    finally:
        loader.close()
    tokens = sum(count for count, _ in packs)
    fill = tokens / (len(packs) * config.capacity)
    return Speed(workers, first, tokens / took, sum(count for _, count in packs) / took, fill, private)


def _for(seconds: float, packs: Iterable[Pack]) -> Iterator[Pack]:
    """Packs until the time is over, one at least."""
    end = time.perf_counter() + seconds
    for pack in packs:
        yield pack
        if time.perf_counter() >= end:
            return


def _private_memory(process: int | None) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(kilobytes) << 10 for kilobytes in re.findall(r"^Private_\w+: +(\d+) kB", lines, re.MULTILINE))


def show(speeds: list[Speed], stages: ExampleReader, console: Console) -> None:
    """Two tables, and what else explains them."""
    table = Table("workers", "first pack, s", "tokens/s", "conversations/s", "full", "memory of a worker")
    for speed in speeds:
        private = f"{speed.private / 2**20:,.0f} MB" if speed.private else "-"
        table.add_row(
            str(speed.workers),
            f"{speed.first:.2f}",
            f"{speed.tokens:,.0f}",
            f"{speed.conversations:,.0f}",
            f"{speed.fill:.2%}",
            private,
        )
    console.print(table)
    whole = sum(stages.seconds.values())
    table = Table("stage", "us a conversation", "share", "what it does")
    for name, does in DOES.items():
        spent = stages.seconds[name]
        table.add_row(name, f"{spent / max(stages.conversations, 1) * 1e6:,.1f}", f"{spent / whole:.0%}", does)
    console.print(table)
    console.print(
        f"{stages.planned:.1%} of {stages.conversations:,} conversations had a shape whose plan was known; "
        f"ids by {stages.tokenizer}"
    )
    for reason, count in sorted(stages.refused.items(), key=lambda item: -item[1]):
        console.print(f"refused, {reason}: {count:,}")
