"""Measure the masks of long conversations: CPU time in units of one plain render.

`python benchmarks/masks/long_conversations.py TEMPLATES...` prints a line for each template and
kind of conversation.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import judge  # noqa: E402 (found by the path above)

from sftstream import ChatEncoder, Refused  # noqa: E402
from sftstream.formats import parse_row  # noqa: E402
from sftstream.rendering.template import template_message  # noqa: E402

KINDS = {"400 plain": "u a " * 200, "2,000 plain": "u a " * 1000, "400 with tools": "u ac t a " * 100}


def seconds(function: Callable[[], object], tries: int = 5) -> float:
    """Return the least CPU time of a call."""
    times = []
    for _ in range(tries):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def measured(encoder: ChatEncoder, codes: str) -> tuple[float, float]:
    """Return the seconds of one plain render, and of finding the masks."""
    messages, tools = judge.conversation(codes.strip())
    row = parse_row({"messages": messages, "tools": tools})
    given = [template_message(message) for message in row.messages]
    masks = seconds(lambda: encoder.renderer.render_whole(row))
    return seconds(lambda: encoder.template.render(given, row.tools)), masks


def main() -> None:
    print("| template | messages | one render | masks | in renders |\n|---|---|---|---|---|")
    for path in map(Path, sys.argv[1:]):
        encoder = judge.open_encoder(path.read_text(encoding="utf-8"))
        for kind, codes in KINDS.items():
            try:
                plain, masks = measured(encoder, codes)
            except Refused:
                continue
            print(f"| {path.stem} | {kind} | {plain * 1e3:.1f} ms | {masks * 1e3:.0f} ms | {masks / plain:.1f} |")


if __name__ == "__main__":
    main()
