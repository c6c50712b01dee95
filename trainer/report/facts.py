"""Write the figures of a summary for people, the same in a page and in a terminal."""

from __future__ import annotations

from collections.abc import Callable

from sftstream import pages
from trainer.report.records import Summary

Figure = Callable[[Summary], str | None]

FACTS: dict[str, Figure] = {
    "step": lambda s: pages.figures.count(s.step),
    "done": lambda s: None if s.share is None else pages.figures.share(s.share, digits=0),
    "loss": lambda s: _number(s.loss),
    "validation loss": lambda s: _number(s.validation_loss),
    "best validation": lambda s: (
        None if s.best is None else f"{pages.figures.number(s.best.loss)} at step {s.best.step:,}"
    ),
    "tokens/s": lambda s: _number(s.tokens_per_second),
    "tokens/s a rank": lambda s: None if _one_rank(s) else _number(s.gpu_tokens_per_second),
    "MFU": lambda s: _share(s.mfu),
    "peak memory": lambda s: None if s.peak_memory is None else f"{s.peak_memory:.1f} GiB",
    "fill": lambda s: _share(s.fill),
    "trained": lambda s: _share(s.trained_share),
    "data wait": lambda s: _share(s.data_wait),
    "tokens": lambda s: pages.figures.count(s.tokens),
    "time in steps": lambda s: pages.figures.duration(s.seconds),
    "rows refused": lambda s: f"{s.refused:,} of {s.rows:,}" if s.refused else "0",
    "launches": lambda s: pages.figures.count(len(s.launches)) if s.launches else None,
}
"""Name -> figure of a summary; None if the run does not have the figure."""


def facts(summary: Summary) -> dict[str, str]:
    """Return the figures that the run has, by name."""
    found = {name: figure(summary) for name, figure in FACTS.items()}
    return {name: value for name, value in found.items() if value is not None}


def _one_rank(summary: Summary) -> bool:
    one, both = summary.gpu_tokens_per_second, summary.tokens_per_second
    return one is None or both is None or abs(one - both) < 1e-6 * both


def _number(value: float | None) -> str | None:
    return None if value is None else pages.figures.number(value)


def _share(value: float | None) -> str | None:
    return None if value is None else pages.figures.share(value)
