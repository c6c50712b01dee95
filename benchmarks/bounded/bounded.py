"""Measure that state and resume do not grow with the rows consumed.

Makes a file of `--rows` rows, moves the streams of a run to several rows of the file, and measures
there: the size of a stream's state, the time of `state_dict()`, and the time from the construction
of a loader to its first pack, beside a cold start. The position is set in the counters of the
state; the windows that then wait are really read.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import msgspec

from sftstream import DataConfig, DataState, PackLoader
from sftstream.records import Amount

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 5
TOKENS = 30
"""Tokens of a conversation, as the counters of a moved state have them."""


class Measured(NamedTuple):
    """The figures at a row."""

    row: int
    largest_state: int
    """Bytes of the largest state of a stream."""
    state_dict: float
    """Seconds of a call of `state_dict()`."""
    position: float
    """Seconds of a call of `position()`, which the trainer stores."""
    first_pack: float
    """Seconds from the construction of a loader to its first pack."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--capacity", type=int, default=1024)
    options = parser.parse_args()
    with TemporaryDirectory() as directory:
        path = write_rows(Path(directory) / "rows.jsonl", options.rows)
        config = msgspec.convert(
            {
                "sources": [{"path": str(path)}],
                "tokenizer": {"path": str(ROOT / "examples" / "demo" / "tokenizer")},
                "streams": options.streams,
                "global_batch": options.streams,
                "capacity": options.capacity,
                "workers": 0,
            },
            DataConfig,
        )
        next(PackLoader(config))  # makes the row index
        cold = median(lambda: next(PackLoader(config)))
        print(
            f"{options.rows:,} rows, {options.streams} streams, packs of {options.capacity}; cold start {cold:.3f} s\n"
        )
        print(
            "| next row | largest state of a stream, bytes | `state_dict()`, ms | `position()`, ms | first pack, s | "
            "of a cold start |"
        )
        print("|---|---|---|---|---|---|")
        for row in (100, options.rows // 2, options.rows):
            m = measure(config, row)
            print(
                f"| {m.row:,} | {m.largest_state:,} | {m.state_dict * 1e3:.2f} | {m.position * 1e3:.3f} | "
                f"{m.first_pack:.3f} | {m.first_pack / cold:.2f} |"
            )


def write_rows(path: Path, count: int) -> Path:
    """Write `count` short conversations of 1,000 kinds."""
    lines = [
        f'{{"messages":[{{"role":"user","content":"{"add " * (1 + i % 29)}{i}"}},{{"role":"assistant","content":"{i}"}}]}}\n'
        for i in range(1000)
    ]
    block = "".join(lines).encode()
    with path.open("wb") as file:
        for _ in range(count // 1000):
            file.write(block)
        file.write("".join(lines[: count % 1000]).encode())
    return path


def measure(config: DataConfig, row: int) -> Measured:
    state = state_at(config, row)
    loader = PackLoader(config, state=state)
    sizes = [len(msgspec.msgpack.encode(stream)) for stream in state.streams.values()]
    return Measured(
        row,
        max(sizes),
        median(loader.state_dict),
        median(loader.position),
        median(lambda: next(PackLoader(config, state=state))),
    )


def state_at(config: DataConfig, row: int) -> DataState:
    """Return the state of a run that has drawn `row` rows, with windows that wait."""
    start = PackLoader(config).state
    drawn = row // config.streams
    packs = 1 + drawn // 100
    tokens = drawn * TOKENS
    counters = {
        "drawn": (drawn,),
        "mixed": (drawn,),
        "accepted": (Amount(drawn, tokens, tokens // 2),),
        "conversations": drawn,
        "tokens": tokens,
        "packs": packs,
        "windows": 2 + drawn // config.window,
    }
    streams = {number: msgspec.structs.replace(stream, **counters) for number, stream in start.streams.items()}
    moved = msgspec.structs.replace(start, streams=streams, packs=packs * config.streams)
    loader = PackLoader(config, state=moved)
    loader.next_step()
    return loader.state


def median(call: Callable[[], object]) -> float:
    """Return the median time of a call in seconds."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    main()
