"""Compare how full packs become: our planner, next-fit and first-fit into 8 open packs, on equal
lengths in one run.

    python benchmarks/packing/packing.py [--conversations 20000]

Reads lengths of real conversations if SFTSTREAM_REALDATA names a directory with them, else draws
log-normal lengths. Prints one table: the share of slots filled by conversations, in percent, and
microseconds a conversation.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from sftstream import ChatEncoder, DataConfig, Example, Refused, SourceConfig
from sftstream.formats import parse_row
from sftstream.records import Ref
from sftstream.sources.corpus import FileSet
from sftstream.streaming.graph import Map
from sftstream.streaming.packer import Packer, PackerConfig
from sftstream.streaming.packing import plan_packs
from sftstream.streaming.sampler import IndexedCursor, RowSampler

CAPACITIES = (2048, 4096, 8192, 16384)
ROUNDS = 5
ROWS_OF_A_FILE = 2500


class Measured(NamedTuple):
    """Packs, and the CPU seconds of planning them."""

    packs: int
    seconds: float


Method = Callable[[list[int], int], Measured]


class LengthReader:
    """Examples of given lengths, by row number; made before any measurement."""

    def __init__(self, lengths: list[int]) -> None:
        made = {n: [Example(np.ones(n, np.int32), np.ones(n, bool), n - 1)] for n in set(lengths)}
        self._examples = [made[length] for length in lengths]

    def expect(self, ref: Ref) -> None:
        """Do nothing: every row can be read again at any time."""

    def remember(self, bookmarks: object) -> None:
        """Do nothing: every row can be read at any time."""

    def examples(self, ref: Ref) -> list[Example]:
        """Return the row's example."""
        return self._examples[ref.row]


def ours(lengths: list[int], capacity: int) -> Measured:
    """Plan and join the packs of one stream with windows of 256."""
    table = {"sources": [{"path": "none"}], "tokenizer": {"path": "none"}, "streams": 1, "epochs": 1, "shuffle": False}
    data = msgspec.convert(table, DataConfig)
    sampler = RowSampler(data, [IndexedCursor((len(lengths),), data, 0, 0)])
    reader: Any = LengthReader(lengths)
    source = Map(sampler, lambda refs: [reader.examples(ref) for ref in refs])
    settings = PackerConfig(capacity, window=256, streams=1, seed=0, shuffle=True, pad_id=0)
    packer = Packer(source, sampler, reader, 0, settings)
    began = time.thread_time()
    packer.reset()
    packs = 0
    while not packer.state.exhausted:
        packer._plan_window()
        packs += len(packer.state.planned)
    return Measured(packs, time.thread_time() - began)


def timed(method: Callable[[list[int], int], int]) -> Method:
    """Return `method` with its CPU time."""

    def measure(lengths: list[int], capacity: int) -> Measured:
        began = time.thread_time()
        return Measured(method(lengths, capacity), time.thread_time() - began)

    return measure


def next_fit(lengths: list[int], capacity: int) -> int:
    """Fill one pack after another; a conversation that does not fit begins a new pack."""
    packs, room = 1, capacity
    for length in lengths:
        if length > room:
            packs, room = packs + 1, capacity
        room -= length
    return packs


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Plan all conversations at once."""
    return len(plan_packs(lengths, capacity, [False] * len(lengths)))


def first_fit_of_eight(lengths: list[int], capacity: int) -> int:
    """Put each conversation into the first of eight open packs with room; without room, close the
    fullest."""
    packs, rooms = 0, [capacity] * 8
    for length in lengths:
        at = next((i for i, room in enumerate(rooms) if room >= length), None)
        if at is None:
            at = min(range(8), key=rooms.__getitem__)
            packs, rooms[at] = packs + 1, capacity
        rooms[at] -= length
    return packs + sum(room < capacity for room in rooms)


def real_lengths(root: Path) -> list[int]:
    """Return the token counts of real conversations under the Llama 3 tokenizer."""
    encoder = ChatEncoder(str(root / "tokenizers" / "llama3"))
    lengths = []
    for path in sorted((root / "conversations").glob("*/*.json*")):
        rows = FileSet(SourceConfig(path=str(path)))
        for row in range(min(len(rows), ROWS_OF_A_FILE)):
            try:
                lengths.append(len(encoder.encode_conversation(parse_row(rows.read(row)))[0].tokens))
            except Refused:
                continue
    return lengths


def benchmark_lengths(count: int) -> tuple[list[int], str]:
    """Return real lengths, or else `count` drawn lengths, and the kind of lengths in a word."""
    root = Path(os.environ.get("SFTSTREAM_REALDATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if root.is_dir():
        return real_lengths(root), "real"
    draw = random.Random(0)
    return [int(draw.lognormvariate(5.7, 0.9)) + 8 for _ in range(count)], "log-normal"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=20_000, help="number of drawn lengths, without real data")
    lengths, kind = benchmark_lengths(parser.parse_args().conversations)
    random.Random(0).shuffle(lengths)
    print(f"{len(lengths):,} conversations ({kind}), mean {sum(lengths) / len(lengths):.0f} tokens\n")
    print(f"| capacity | {' | '.join(METHODS)} |\n|{'---|' * (len(METHODS) + 1)}")
    for capacity in CAPACITIES:
        fitting = [length for length in lengths if length <= capacity]
        cells = []
        for method in METHODS.values():
            rounds = [method(fitting, capacity) for _ in range(ROUNDS)]
            cost = min(found.seconds for found in rounds) / len(fitting) * 1e6
            cells.append(f"{sum(fitting) / (rounds[0].packs * capacity):.2%}, {cost:.1f} us")
        print(f"| {capacity} | {' | '.join(cells)} |")


METHODS: dict[str, Method] = {
    "sftstream, windows of 256": ours,
    "best-fit decreasing, all at once": timed(best_fit_decreasing),
    "first-fit, 8 open packs": timed(first_fit_of_eight),
    "next-fit": timed(next_fit),
}

if __name__ == "__main__":
    main()
