"""Measure a data config on this machine: time to the first pack, packs a second, time per stage."""

from __future__ import annotations

import re
import time
from collections import Counter
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
from sftstream.streaming.graph import build_stream

STAGES = {
    "draw": "choose the next row",
    "load": "read and decode the row, recognize its layout",
    "template": "render the conversation, find its trained spans",
    "tokenize": "compute token ids and the loss mask",
    "pack": "plan windows of conversations, build packs",
}
"""Stages of a stream in order, and the work of each."""

EPOCHS = 1_000_000
"""Epochs of the measured stream: enough never to end, since a run under way is measured."""


class Speed(NamedTuple):
    """Speed of a loader."""

    workers: int
    first: float
    """Seconds from the construction of the loader to the first pack."""
    tokens: float
    """Tokens a second once warm."""
    conversations: float
    """Conversations a second once warm."""
    fill: float
    """Share of packs' slots filled with tokens, 0 to 1."""
    private: int
    """Largest private memory of a worker in bytes; 0 without workers or without `/proc`."""


class StageTimes(NamedTuple):
    """Time that a stream takes for each stage, in a single process."""

    seconds: dict[str, float]
    conversations: int
    planned: float
    """Share of conversations rendered without running the template, 0 to 1."""
    refused: dict[str, int]
    """Refused conversations by reason."""
    tokenizer: str
    """Library used to compute the ids, for example "tokenizers"."""


class Stopwatch(BaseNode[Any]):
    """Node that adds its own time to `seconds[name]`, without the time of earlier nodes.

    `running` is a stack shared by all stopwatches of a graph: an entry per call under way, holding
    the seconds spent in nested calls. If "load" takes 5 s and waits 2 s of them for "draw",
    `seconds` becomes `{"draw": 2.0, "load": 3.0}`.
    """

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


def measure(config: DataConfig, seconds: float) -> tuple[list[Speed], StageTimes]:
    """Measure a stream stage by stage, then the loader without workers and with `config.workers`.

    Each measurement takes `seconds`, and each loader is warmed up for `seconds` before.
    """
    config = msgspec.structs.replace(config, epochs=EPOCHS, max_refused=1.0, max_too_long=1.0)
    stages = _stage_times(config, seconds)
    return [_speed(config, workers, seconds) for workers in sorted({0, config.workers})], stages


def _stage_times(config: DataConfig, seconds: float) -> StageTimes:
    loader = PackLoader(config, workers=0)
    encoder = loader.encoder
    if encoder.tokenizer.fast_tokenizer:
        encoder.tokenizer.fast_tokenizer.load()
    spent: dict[str, float] = {}
    running: list[float] = []
    node = build_stream(
        config, loader.corpus, encoder, 0, watch=lambda name, node: Stopwatch(name, node, spent, running)
    )
    node.reset()
    for _ in _take(seconds, Stopwatch("pack", node, spent, running)):
        pass
    return StageTimes(
        {name: spent[name] for name in STAGES},
        sum(amount.conversations for amount in node.state.accepted),
        encoder.renderer.planned / max(encoder.renderer.rendered, 1),
        sum(map(Counter, node.state.refused), Counter()),
        encoder.tokenizer.fast or "tokenizers",
    )


def _speed(config: DataConfig, workers: int, seconds: float) -> Speed:
    began = time.perf_counter()
    loader = PackLoader(config, workers=workers)
    try:
        next(loader)
        first = time.perf_counter() - began
        for _ in _take(seconds, loader):  # warm up: load tokenizers, make plans, use up packs read ahead
            pass
        began = time.perf_counter()
        packs = [(pack.tokens, pack.conversations) for pack in _take(seconds, loader)]
        took = time.perf_counter() - began
        private = max((private_memory(worker.pid) for worker in active_children() if worker.pid), default=0)
    finally:
        loader.close()
    tokens = sum(count for count, _ in packs)
    fill = tokens / (len(packs) * config.capacity)
    return Speed(workers, first, tokens / took, sum(count for _, count in packs) / took, fill, private)


def _take(seconds: float, packs: Iterable[Pack]) -> Iterator[Pack]:
    """Yield packs until `seconds` have passed, at least a single pack."""
    end = time.perf_counter() + seconds
    for pack in packs:
        yield pack
        if time.perf_counter() >= end:
            return


def private_memory(pid: int) -> int:
    """Return the bytes of memory that a process shares with no other process (Linux).

    The result is 0 if the process has ended or the system has no `/proc/<pid>/smaps_rollup`.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(kilobytes) << 10 for kilobytes in re.findall(r"^Private_\w+: +(\d+) kB", lines, re.MULTILINE))


def show(speeds: list[Speed], stages: StageTimes, console: Console) -> None:
    """Print a table of loaders, a table of stages, and the reasons of refusals."""
    table = Table("workers", "first pack, s", "tokens/s", "conversations/s", "filled", "memory of a worker")
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
    total = sum(stages.seconds.values())
    table = Table("stage", "us a conversation", "share", "work")
    for name, work in STAGES.items():
        spent = stages.seconds[name]
        table.add_row(name, f"{spent / max(stages.conversations, 1) * 1e6:,.1f}", f"{spent / total:.0%}", work)
    console.print(table)
    console.print(
        f"{stages.planned:.1%} of {stages.conversations:,} conversations were rendered without running the template; "
        f"token ids by {stages.tokenizer}"
    )
    for reason, count in sorted(stages.refused.items(), key=lambda item: -item[1]):
        console.print(f"refused, {reason}: {count:,}")
