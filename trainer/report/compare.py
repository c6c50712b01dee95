"""Compare runs: figures side by side, and differing settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from trainer.report.facts import FACTS
from trainer.report.flat import Difference, differences
from trainer.report.records import Summary

MOST_RUNS = 12
"""Runs in a comparison: six colours, each without and with dashes."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Runs side by side."""

    names: tuple[str, ...]
    """Name of each run; its directory if names are equal."""
    runs: tuple[Summary, ...]
    facts: dict[str, tuple[str | None, ...]]
    """Name of a figure -> its value in each run; None in a run without the figure."""
    config: tuple[Difference, ...]
    identity: tuple[Difference, ...]
    environment: tuple[Difference, ...]


def compare(runs: Sequence[Summary]) -> Comparison:
    """Return the comparison of runs. Raises ValueError for more than `MOST_RUNS` runs."""
    if len(runs) > MOST_RUNS:
        raise ValueError(f"{len(runs)} runs are too many for one page of curves; name at most {MOST_RUNS}")
    count = Counter(run.name for run in runs)
    return Comparison(
        names=tuple(run.name if count[run.name] == 1 else run.directory for run in runs),
        runs=tuple(runs),
        facts={name: values for name, figure in FACTS.items() if any(values := tuple(figure(run) for run in runs))},
        config=differences([_without_name(run.config) for run in runs]),
        identity=differences([run.identity for run in runs]),
        environment=differences([run.environment for run in runs]),
    )


def _without_name(config: dict[str, str]) -> dict[str, str]:
    """Return a config without the name of the run, which heads the run's column anyway."""
    return {name: value for name, value in config.items() if name != "run.name"}
