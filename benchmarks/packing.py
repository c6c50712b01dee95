"""How full packs are: ours against next-fit and first-fit into 8 open packs, on the same lengths in the same run.

    python benchmarks/packing.py            # lengths of real conversations where SFTSTREAM_REALDATA has them, else log-normal

Prints one table: the share of slots that conversations take, in percent, and microseconds a conversation.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sftstream import ChatEncoder, Example, Refused, SourceConfig
from sftstream.formats import parse_row
from sftstream.records import Ref
from sftstream.sources.corpus import FileSet
from sftstream.streaming.packing import Packer, PackerConfig
from sftstream.streaming.sampler import RowBatch

CAPACITIES = (2048, 4096, 8192)
ROWS = 20_000


class Lengths:
    """Examples of given lengths, once, as a source that the packer reads."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def reset(self, _state: object = None) -> None:
        self.at = 0

    def __next__(self) -> RowBatch[list[Example]]:
        if self.at == len(self.lengths):
            raise StopIteration
        self.at += 1
        return RowBatch([Ref(0, self.at - 1, 0)], [[_example(self.lengths[self.at - 1])]])

    wanted = 1

    def account(self, source: int, tokens: int, trained_tokens: int) -> None:
        """It is not mixed."""

    def expect(self, ref: Ref) -> None:
        """Nothing waits at the beginning."""

    def examples(self, ref: Ref) -> list[Example]:
        return [_example(self.lengths[ref.row])]

    def state_dict(self) -> dict[str, object]:
        return {"drawn": [self.at], "mixed": [self.at], "stage": 0, "exhausted": self.at == len(self.lengths)}


def _example(length: int) -> Example:
    return Example(np.broadcast_to(np.int32(1), length), np.broadcast_to(np.True_, length), length - 1)


def ours(lengths: list[int], capacity: int) -> int:
    """Packs that one stream plans in windows of 256."""
    config = PackerConfig(capacity, window=256, streams=1, seed=0, shuffle=True, pad_id=0, rows=len(lengths))
    rows = Lengths(lengths)
    packer = Packer(rows, rows, rows, 0, config)
    packer.reset()
    packs = 0
    while not packer.state.exhausted:
        packer._plan_window()
        packs += len(packer.state.planned)
    return packs


def next_fit(lengths: list[int], capacity: int) -> int:
    """What does not fit begins a new pack."""
    packs, room = 1, capacity
    for length in lengths:
        if length > room:
            packs, room = packs + 1, capacity
        room -= length
    return packs


def first_fit_of_eight(lengths: list[int], capacity: int) -> int:
    """The first of eight open packs that has room; where none has, the fullest is closed."""
    packs, rooms = 0, [capacity] * 8
    for length in lengths:
        at = next((i for i, room in enumerate(rooms) if room >= length), None)
        if at is None:
            at = min(range(8), key=rooms.__getitem__)
            packs, rooms[at] = packs + 1, capacity
        rooms[at] -= length
    return packs + sum(room < capacity for room in rooms)


def real_lengths(root: Path) -> list[int]:
    """Tokens of real conversations under the Llama 3 tokenizer."""
    encoder = ChatEncoder(str(root / "tokenizers" / "llama3"))
    lengths = []
    for path in sorted((root / "conversations").glob("*/*.json*")):
        rows = FileSet(SourceConfig(path=str(path)))
        for row in range(min(len(rows), ROWS // 8)):
            try:
                lengths.append(len(encoder.encode_conversation(parse_row(rows.read(row)))[0].tokens))
            except Refused:
                continue
    return lengths


def main() -> None:
    """Print the table."""
    root = Path(os.environ.get("SFTSTREAM_REALDATA") or Path(__file__).parents[2] / "shared" / "data")
    draw = random.Random(0)
    lengths = real_lengths(root) if root.is_dir() else [int(draw.lognormvariate(5.7, 0.9)) + 8 for _ in range(ROWS)]
    draw.shuffle(lengths)
    kind = "real" if root.is_dir() else "log-normal"
    print(f"{len(lengths):,} conversations ({kind}), mean {sum(lengths) / len(lengths):.0f} tokens\n")
    print(
        "| capacity | " + " | ".join(name.__name__ for name in METHODS) + " |\n|---" * 1 + "|---" * len(METHODS) + "|"
    )
    for capacity in CAPACITIES:
        fitting = [length for length in lengths if length <= capacity]
        cells = []
        for method in METHODS:
            began = time.perf_counter()
            packs = method(fitting, capacity)
            cost = (time.perf_counter() - began) / len(fitting) * 1e6
            cells.append(f"{sum(fitting) / (packs * capacity):.2%}, {cost:.1f} us")
        print(f"| {capacity} | {' | '.join(cells)} |")


METHODS: tuple[Callable[[list[int], int], int], ...] = (ours, first_fit_of_eight, next_fit)

if __name__ == "__main__":
    main()
