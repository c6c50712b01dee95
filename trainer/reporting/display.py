"""Show a run: live on a terminal, a line every 10 s in a log, or JSON lines for programs."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from checkpoints import printable
from sftstream import pages
from trainer.reporting.metrics import StepMetrics
from trainer.reporting.pace import Pace, recent_metrics

SECONDS_BETWEEN_LINES = 10
"""Shortest time between two lines in a log."""
SECONDS_BETWEEN_FRAMES = 0.1
"""Shortest time between two updates of a terminal."""
AVERAGED = 20
"""Number of steps whose mean speed, fill, trained share and wait are shown."""
MOST_SHOWN = 12
"""Held-out sources whose losses are shown."""
PACED = 5
"""Number of steps of a session after which the time of the whole run is printed once."""


class Display:
    """The output of a run on rank 0; silent if `quiet`, one JSON object per line if `as_json`.

    Messages become `{"message": text}`, and a step its line of metrics.jsonl with two keys more:
    `share_done` and `seconds_left`, null if unknown. `clock` returns the time in seconds.
    """

    def __init__(self, *, quiet: bool, as_json: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = Console(quiet=quiet, highlight=False)
        self._json, self._clock = as_json, clock
        self._live = Live(Text("waiting for the first packs"), console=self.console, auto_refresh=False)
        self._recent: deque[StepMetrics] = deque(maxlen=AVERAGED)
        self._pace = Pace()
        self._validation: float | None = None
        self._last_line = self._last_frame = float("-inf")

    def __enter__(self) -> Display:
        if self.console.is_terminal and not self._json and not self.console.quiet:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Print a lasting line, above the live display."""
        if self._json:
            self._print_json({"message": text})
        else:
            self.console.print(printable(text), markup=False, soft_wrap=True)

    def step(self, metrics: StepMetrics, share: float | None, *, last: bool) -> None:
        """Show a finished step. `share` is the finished part of the run in [0, 1], None if unknown.

        `last` shows the step in any case, however short the time since the step shown before.
        """
        self._pace.add(share, now := self._clock())
        self._recent.append(metrics)
        self._validation = self._validation if metrics.validation_loss is None else metrics.validation_loss
        left = self._pace.left
        if self._json:
            self._print_json({**msgspec.to_builtins(metrics), "share_done": share, "seconds_left": left})
            return
        if metrics.validation_loss is not None:
            self.say(f"step {metrics.step} | validation loss {metrics.validation_loss:.4f}{by_source(metrics)}")
        if metrics.exact_match is not None:
            scored = "" if metrics.score is None else f", mean score {metrics.score:.4f}"
            self.say(f"step {metrics.step} | {metrics.exact_match:.1%} of the questions answered exactly{scored}")
        if self._pace.steps == PACED and left is not None and not last:
            self.say(f"time     about {_spelled(left)} left, by the pace of the first {PACED} steps")
        averaged, ends = recent_metrics(self._recent), end_facts(share, left)
        if self._live.is_started:
            if last or now - self._last_frame >= SECONDS_BETWEEN_FRAMES:
                self._last_frame = now
                self._live.update(frame(averaged, self._validation, share, ends), refresh=True)
        elif last or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(" | ".join([f"step {metrics.step}", *step_facts(averaged, self._validation), *ends]))

    def _print_json(self, value: dict[str, Any]) -> None:
        if not self.console.quiet:
            # JSON has no NaN: msgspec writes null. json escapes what a terminal would obey.
            print(json.dumps(msgspec.json.decode(msgspec.json.encode(value))), file=self.console.file, flush=True)


def by_source(metrics: StepMetrics) -> str:
    """Return the validation loss of each source in words, "" if the metrics have none.

    Example: " (source 0: 1.2500, source 2: 2.0000)".
    """
    losses = enumerate(metrics.validation_loss_by_source or ())
    shown = [f"source {number}: {loss:.4f}" for number, loss in losses if loss is not None]
    more = f", {len(shown) - MOST_SHOWN} more" if len(shown) > MOST_SHOWN else ""
    return f" ({', '.join(shown[:MOST_SHOWN])}{more})" if shown else ""


def step_facts(metrics: StepMetrics, validation: float | None) -> list[str]:
    """Return the facts about a step to show, in order; `validation` is the newest validation loss.

    `trained` is the share of the tokens in the loss, `wait` the share of the time spent on waiting
    for packs. On a GPU the use of its peak (MFU) and its peak memory are shown as well.
    """
    trained = metrics.trained_tokens / max(metrics.tokens, 1)
    return [
        f"loss {metrics.loss:.4f}",
        *([] if validation is None else [f"validation {validation:.4f}"]),
        f"rate {metrics.learning_rate:.3g}",
        f"{metrics.tokens_per_second:,.0f} tokens/s",
        *([] if metrics.mfu is None else [f"MFU {metrics.mfu:.1%}"]),
        *([] if metrics.peak_memory is None else [f"{metrics.peak_memory:.1f} GiB"]),
        f"fill {metrics.fill:.1%}",
        f"trained {trained:.0%}",
        f"wait {metrics.data_wait / metrics.seconds:.1%}",
    ]


def _spelled(seconds: float) -> str:
    """Return an estimated duration, in whole seconds below a minute."""
    return pages.figures.duration(round(seconds))


def end_facts(share: float | None, left: float | None) -> list[str]:
    """Return the finished part of the run and the seconds left in words, as far as known."""
    return [
        *([] if share is None else [f"{share:.0%} done"]),
        *([] if left is None else [f"{_spelled(left)} left"]),
    ]


def frame(metrics: StepMetrics, validation: float | None, share: float | None, ends: list[str]) -> Group:
    """Return the live display: a bar of the finished part, and the facts below."""
    bar = Table.grid(padding=(0, 1))
    bar.add_row(f"step {metrics.step}", ProgressBar(total=1.0, completed=share or 0.0, width=24), " | ".join(ends))
    return Group(bar, Text(" | ".join(step_facts(metrics, validation))))
