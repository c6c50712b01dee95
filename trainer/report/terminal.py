"""Print a run, or several runs side by side, in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from sftstream import pages, printable
from trainer.report.compare import Comparison
from trainer.report.facts import facts
from trainer.report.flat import Difference
from trainer.report.records import LaunchSummary, Summary

MOST_LAUNCHES = 20
"""Launches that are printed, the newest."""


def show_run(summary: Summary, console: Console) -> None:
    """Print the figures of a run."""
    console.print(Text(printable(f"{summary.directory}: {summary.status}"), style="bold"))
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in facts(summary).items():
        table.add_row(Text(name, style="dim"), Text(printable(value)))
    console.print(table)
    for number, launch in list(enumerate(summary.launches, 1))[-MOST_LAUNCHES:]:
        console.print(Text(printable(_launch(number, launch))))
    for refusals in summary.refusals:
        console.print(Text(printable(f"refused, {refusals.reason}: {refusals.rows:,}")))
    _show_damage(summary.damage, console)


def _launch(number: int, launch: LaunchSummary) -> str:
    steps = f"steps {launch.after + 1:,} to {launch.reached:,}" if launch.reached > launch.after else "no step"
    began = "" if launch.began is None else f", {pages.figures.moment(launch.began)}"
    lost = f", {launch.lost:,} steps repeated later" if launch.lost else ""
    changed = f"; {'; '.join(launch.changed)}" if launch.changed else ""
    return f"launch {number}: {steps}{began}, {launch.end or 'end unknown'}{lost}{changed}"


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print the figures of runs side by side, and the settings in which the runs differ."""
    table = Table("", box=None, pad_edge=False)
    for name in comparison.names:
        table.add_column(Text(printable(name)), justify="right")
    table.add_row("state", *(Text(printable(run.status)) for run in comparison.runs))
    for name, values in comparison.facts.items():
        table.add_row(name, *(Text(printable(value or "–")) for value in values))
    console.print(table)
    tables = (("config", comparison.config), ("data", comparison.identity), ("environment", comparison.environment))
    for title, found in tables:
        for part in _differences(title, found):
            console.print(part)
    _show_damage(tuple(line for run in comparison.runs for line in run.damage), console)


def _differences(title: str, found: tuple[Difference, ...]) -> Iterator[RenderableType]:
    if not found:
        yield Text(f"{title}: no difference")
        return
    table = Table(f"{title}: differences", box=None, pad_edge=False)
    for _ in found[0].values:
        table.add_column("", overflow="fold")
    for difference in found:
        values = (Text(printable(value or "–")) for value in difference.values)
        table.add_row(Text(printable(difference.name)), *values)
    yield table


def _show_damage(damage: tuple[str, ...], console: Console) -> None:
    for line in damage:
        console.print(Text(printable(line), style="red"))
