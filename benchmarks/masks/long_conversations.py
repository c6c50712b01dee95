"""Measure the masks of conversations without a stored plan: CPU time in units of one plain render.

`python benchmarks/masks/long_conversations.py TEMPLATES...` prints a line for each template, and
the medians. A plain render is a render by the template as transformers compiles it. The last
line has the medians in renders by this project's sandbox.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers.utils.chat_template_utils import _compile_jinja_template

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import judge  # noqa: E402 (found by the path above)

from sftstream import ChatEncoder, Refused  # noqa: E402
from sftstream.formats import parse_row  # noqa: E402
from sftstream.rendering.template import template_message  # noqa: E402

KINDS = {
    "10": "u a " * 5,
    "10, tools": "u ac t a u a u a u a",
    "100": "u a " * 50,
    "400": "u a " * 200,
    "400, tools": "u ac t a " * 100,
}
"""Number of messages -> shape of the judge."""


class Measured(NamedTuple):
    """CPU time of finding turns and masks of a conversation, in renders."""

    plain: float
    """In renders by transformers."""
    own: float
    """In renders by this project's sandbox."""


def least(functions: Sequence[Callable[[], object]], repeats: int, tries: int = 15) -> list[float]:
    """Return the least CPU time in seconds of each function; the functions take turns."""
    times = [float("inf")] * len(functions)
    gc.collect()
    gc.disable()
    for _ in range(tries):
        for number, function in enumerate(functions):
            start = time.process_time()
            for _ in range(repeats):
                function()
            times[number] = min(times[number], time.process_time() - start)
    gc.enable()
    return times


def measured(encoder: ChatEncoder, text: str, shape: str) -> Measured:
    """Return the ratios for a shape; raises `Refused` if the template refuses the shape."""
    messages, tools = judge.conversation(shape.strip())
    row = parse_row({"messages": messages, "tools": tools})
    encoder.renderer.render_whole(row)
    given, theirs = [template_message(message) for message in row.messages], _compile_jinja_template(text)
    context = encoder.template.context(given, row.tools, False)
    masks, own, plain = least(
        (
            lambda: encoder.renderer.render_whole(row),
            lambda: encoder.template.render(given, row.tools),
            lambda: theirs.render(**context),
        ),
        repeats=max(1, 100 // len(given)),
    )
    return Measured(masks / plain, masks / own)


def main() -> None:
    print(f"| template | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}")
    found: dict[str, list[Measured]] = {kind: [] for kind in KINDS}
    for path in map(Path, sys.argv[1:]):
        text = path.read_text(encoding="utf-8")
        encoder, cells = judge.open_encoder(text), []
        for kind, shape in KINDS.items():
            try:
                found[kind].append(measured(encoder, text, shape))
            except Refused:
                cells.append("")
                continue
            cells.append(f"{found[kind][-1].plain:.1f}")
        print(f"| {path.stem} | {' | '.join(cells)} |", flush=True)
    for name in Measured._fields:
        ratios = {kind: [getattr(one, name) for one in ones] for kind, ones in found.items() if ones}
        medians = (f"{statistics.median(r):.1f} ({sum(x > 3 for x in r)} of {len(r)} above 3)" for r in ratios.values())
        print(f"| median, in {name} renders | {' | '.join(medians)} |")


if __name__ == "__main__":
    main()
