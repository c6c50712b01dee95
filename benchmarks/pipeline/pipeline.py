"""Compare sftstream, bare tokenizers and peers from conversations to packs, on equal rows. Prints
Markdown tables.

    python benchmarks/pipeline/pipeline.py [--rows 20000] [--rounds 5] [--data DIRECTORY]
        [--gigabytes 1] [--no-peers]

DIRECTORY holds `conversations/*/*` and `tokenizers/llama3`; by default SFTSTREAM_REALDATA, else the
demo's conversations. Ids and masks of every conversation are compared with the reference before any
measurement. README.md describes the method.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

import msgspec
from environment import ONE_THREAD, QUIET

os.environ |= ONE_THREAD | QUIET  # before importing the libraries: each reads its variables once

from corpus import Data, find_data, prepare
from costs import costs
from end_to_end import COLUMNS, compared
from files import rates_of_files

PACKAGES = ("torch", "tokenizers", "fastokens", "transformers", "datasets", "trl", "grain")


def main() -> None:
    """Print all tables."""
    options = arguments()
    data = find_data(options.data, options.capacity)
    print(heading(), flush=True)
    with tempfile.TemporaryDirectory(prefix="sftstream-bench-") as directory:
        job, truth = prepare(data, options.rows, directory)
        job = msgspec.structs.replace(job, patience=options.patience, here=options.here)
        print(
            f"\n## From file to packs of {job.capacity}\n\n{job.conversations:,} conversations, {job.tokens:,} tokens."
        )
        table(COLUMNS, compared(job, truth, options.rounds, with_peers=options.peers))
        print("\n## File by file\n\nMillion tokens a CPU-second, and the ratio to `tokenizers.encode_batch`.")
        table(
            (
                "conversations",
                "tokens each",
                "`tokenizers`",
                "template run on each",
                "render, tokenize, mask",
                "file to pack",
            ),
            file_rows(data, options.rows_of_a_file, options.rounds),
        )
        print("\n## Around it")
        table(("Cost", "Amount"), costs(job, options.gigabytes, options.seconds, options.rounds))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, default=20_000, help="conversations read by all systems")
    parser.add_argument("--rows-of-a-file", type=int, default=3000, help="conversations per file in the second table")
    parser.add_argument("--capacity", type=int, default=8192, help="tokens of a pack")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the file for measuring starts")
    parser.add_argument("--patience", type=float, default=12.0, help="seconds for workers to settle")
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of the waiting measurement")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--here", action="store_true", help="run in one process as a trial; the figures mean nothing")
    return parser.parse_args()


def heading() -> str:
    """Return date, machine and versions."""
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    return f"{date.today()}; {machine}; {', '.join(map(installed, PACKAGES))}."


def installed(package: str) -> str:
    """Return the package's name and version."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"no {package}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, each row as soon as it is known."""
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def file_rows(data: Data, rows: int, rounds: int) -> Iterator[Sequence[str]]:
    """Yield the rows of the table of single files."""
    for name, tokens, rate in rates_of_files(data, rows, rounds):
        cells = [f"{rate[stage] / 1e6:.2f} ({rate[stage] / rate['raw']:.1f}x)" for stage in ("whole", "quick", "packs")]
        yield name, f"{tokens:.0f}", f"{rate['raw'] / 1e6:.2f}", *cells


if __name__ == "__main__":
    main()
