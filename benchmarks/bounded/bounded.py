"""Measure that state and resume do not grow with the rows consumed.

Makes a file of `--rows` rows, moves the streams of a run to several rows of the file, and measures
there: the size of a stream's state, the time of `state_dict()`, and the time from the construction
of a loader to its first pack, by turns with a cold start. The position is set in the counters of
the state; the windows that then wait are really read. All times are CPU times of this process.
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
ROUNDS = 7
"""Number of resumes and cold starts."""
CALLS = 101
"""Number of calls of a function that takes milliseconds."""
TOKENS = 30
"""Tokens of a conversation, as the counters of a moved state have them."""


class Measured(NamedTuple):
    """The figures at a row."""

    row: int
    largest_state: int
    """Bytes of the largest state of a stream."""
    state_dict: float
    """Seconds of a call of `state_dict()`."""
    plain: float
    """Seconds of `state.builtins()`, the state dict with plain values for each stream."""
    position: float
    """Seconds of a call of `position()`, which the trainer stores."""
    first_pack: float
    """Seconds from the construction of a loader to its first pack."""
    cold: float
    """Seconds of a cold start, from the construction of a loader without a state to its first
    pack."""


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
        print(f"{options.rows:,} rows, {options.streams} streams, packs of {options.capacity}\n")
        print(
            "| next row | largest state of a stream, bytes | `state_dict()`, ms | with plain values, ms | "
            "`position()`, ms | resume, s | cold start, s | ratio |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for row in (100, options.rows // 2, options.rows):
            m = measure(config, row)
            print(
                f"| {m.row:,} | {m.largest_state:,} | {m.state_dict * 1e3:.2f} | {m.plain * 1e3:.1f} | "
                f"{m.position * 1e3:.3f} | {m.first_pack:.3f} | {m.cold:.3f} | {m.first_pack / m.cold:.2f} |"
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
    resumed, cold = by_turns(ROUNDS, lambda: next(PackLoader(config, state=state)), lambda: next(PackLoader(config)))
    (given,), (plain,), (position,) = (
        by_turns(CALLS, call) for call in (loader.state_dict, lambda: loader.state.builtins(), loader.position)
    )
    return Measured(row, max(sizes), given, plain, position, resumed, cold)


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


def by_turns(rounds: int, *calls: Callable[[], object]) -> list[float]:
    """Return the median CPU time of each call in seconds. The calls are measured by turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, own in zip(calls, times, strict=True):
            began = time.process_time()
            call()
            own.append(time.process_time() - began)
    return [statistics.median(own) for own in times]


if __name__ == "__main__":
    main()
