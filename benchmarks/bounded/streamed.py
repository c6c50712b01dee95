"""Measure the resume of a streamed source at a row far inside a file, with and without a bookmark.

    python benchmarks/bounded/streamed.py [--rows 2950000]

Writes the same rows as JSON lines, gzip, one Zstandard frame and Zstandard frames of 16 MiB. Prints
seconds of CPU time until the row is read: without a bookmark, and from the bookmark of a state.
"""

from __future__ import annotations

import argparse
import gzip
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from sftstream import SourceConfig
from sftstream.records import Ref
from sftstream.sources import StreamedReader, StreamedSource

FRAME = 16 << 20
"""Bytes of content in a frame."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2_950_000)
    rows = parser.parse_args().rows
    content = rows_of(rows)
    print(
        f"{len(content):,} bytes, {rows:,} rows\n\n| file | bytes | without a bookmark, s | with, s |\n|---|---|---|---|"
    )
    with TemporaryDirectory() as directory:
        for name, pack in FILES.items():
            path = Path(directory) / name
            path.write_bytes(pack(content))
            without, with_bookmark = measure(str(path), rows - 400)
            print(f"| {name} | {path.stat().st_size:,} | {without:.3f} | {with_bookmark:.4f} |")
            path.unlink()


def rows_of(count: int) -> bytes:
    """Return short conversations as JSON lines, of 1,000 kinds."""
    lines = [
        f'{{"messages":[{{"role":"user","content":"{"add " * (1 + i % 60)} {i}"}},'
        f'{{"role":"assistant","content":"{"south river " * (i % 20 + 1)}"}}]}}\n'
        for i in range(1000)
    ]
    return "".join(lines).encode() * (count // 1000)


def _frames(content: bytes) -> bytes:
    parts = (content[start : start + FRAME] for start in range(0, len(content), FRAME))
    return b"".join(pa.compress(part, "zstd", asbytes=True) for part in parts)


FILES: dict[str, Callable[[bytes], bytes]] = {
    "plain.jsonl": lambda content: content,
    "gzip.jsonl.gz": lambda content: gzip.compress(content, 1),
    "one.jsonl.zst": lambda content: bytes(pa.compress(content, "zstd", asbytes=True)),
    "frames.jsonl.zst": _frames,
}


def measure(path: str, row: int) -> tuple[float, float]:
    """Return the seconds of CPU time to read `row` without a bookmark and with one."""
    source, ref = StreamedSource(SourceConfig(path=path, streaming=True)), Ref(0, row, 0)
    reader = StreamedReader(source)
    without = _timed(lambda: reader.reaches(ref))
    resumed = StreamedReader(source)
    resumed.remember(reader.bookmarks([ref]))
    return without, _timed(lambda: resumed.reaches(ref))


def _timed(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


if __name__ == "__main__":
    main()
