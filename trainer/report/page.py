"""Make the page of a run: curves, launches, mixture, refusals, checkpoints, config, identity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sftstream import pages
from trainer.report.charts import charts_of_run, mixture_chart
from trainer.report.facts import facts
from trainer.report.records import Summary
from trainer.report.timeline import timeline

RELOAD_SECONDS = 60
"""Seconds after which the page of a run under way loads itself again."""
MOST_CHECKPOINTS = 50
"""Checkpoints that are listed, the newest."""


def page(summary: Summary) -> str:
    """Return the page of a run as one self-contained HTML document of bounded size."""
    note = pages.text(f"{summary.status}. Read at {pages.figures.moment(summary.read_at)} from ")
    body = [
        pages.header(summary.name, note + pages.tag("code", pages.text(summary.directory)), facts(summary)),
        pages.tag("main", _sections(summary), data_reload=RELOAD_SECONDS if summary.is_under_way else None),
        pages.tag("footer", pages.text("Made by trainer.report. The page loads nothing from anywhere.")),
    ]
    return pages.document(pages.Page(f"{summary.name}: {summary.status}", "".join(body), ("plot.js",)))


def notices(lines: tuple[str, ...]) -> str:
    """Return a box with lines about damaged files; "" without lines."""
    if not lines:
        return ""
    return pages.tag("ul", (pages.tag("li", pages.text(line)) for line in lines), class_="notice")


def pairs(title: str, table: Mapping[str, str]) -> str:
    """Return a closed part with names and values; "" for an empty table."""
    if not table:
        return ""
    return pages.details(title, pages.table([("name", False), ("value", False)], table.items()))


def _sections(summary: Summary) -> Iterator[str]:
    yield notices(summary.damage)
    cards = [card for card in charts_of_run(summary) if card]
    if cards:
        lost = summary.steps_without_loss
        note = f"{lost:,} steps have no finite loss. " if lost else ""
        note += "Dashed: a new launch. Ticks at the bottom: checkpoints."
        if width := _steps_of_a_point(summary):
            note += f" A point is the mean of {width:,} steps, the band reaches from the least to the most of them."
        yield pages.section(
            "Curves", pages.tag("div", cards, class_="grid"), pages.tag("p", pages.text(note), class_="sub")
        )
    else:
        yield pages.section("Curves", pages.tag("p", pages.text("No step is finished yet."), class_="sub"))
    yield timeline(summary)
    yield _mixture(summary)
    yield _refusals(summary)
    yield _checkpoints(summary)
    yield pages.section(
        "Settings",
        pairs("Config", summary.config),
        pairs("Identity of the data", summary.identity),
        pairs("Environment", summary.environment),
    )


def _steps_of_a_point(summary: Summary) -> int | None:
    """Return the number of steps in a point of the curves; None if it is 1."""
    steps = next(iter(summary.curves.values())).steps
    return steps[0] if steps[0] > 1 else None


def _mixture(summary: Summary) -> str:
    if not summary.mixture:
        return ""
    head = [("source", True), ("path", False), ("weight", True), ("tokens", True), ("share", True)]
    rows = (
        (
            str(number),
            source.path,
            "by size" if source.weight is None else pages.figures.number(source.weight),
            pages.figures.count(source.tokens),
            pages.figures.share(source.share),
        )
        for number, source in enumerate(summary.mixture)
    )
    return pages.section("Mixture", mixture_chart(summary), pages.table(head, rows))


def _refusals(summary: Summary) -> str:
    if not summary.refusals:
        return pages.section("Refused rows", pages.tag("p", pages.text("No row was refused."), class_="sub"))
    examples = [(row.reason, row.place, row.detail) for refusals in summary.refusals for row in refusals.examples]
    return pages.section(
        "Refused rows",
        pages.table(
            [("reason", False), ("rows", True)], ((r.reason, pages.figures.count(r.rows)) for r in summary.refusals)
        ),
        pages.details(
            "The first rows of each reason",
            pages.table([("reason", False), ("place", False), ("detail", False)], examples),
        ),
    )


def _checkpoints(summary: Summary) -> str:
    if not summary.checkpoints:
        return pages.section("Checkpoints", pages.tag("p", pages.text("No checkpoint yet."), class_="sub"))
    disk = {True: "on disk", False: "deleted or not yet committed", None: "not in a local directory"}
    rows = (
        (
            pages.figures.count(checkpoint.step),
            "unknown" if checkpoint.time is None else pages.figures.moment(checkpoint.time),
            "unknown" if checkpoint.seconds is None else pages.figures.duration(checkpoint.seconds),
            disk[checkpoint.kept],
        )
        for checkpoint in reversed(summary.checkpoints[-MOST_CHECKPOINTS:])
    )
    head = [("step", True), ("taken", False), ("training waited", True), ("files", False)]
    return pages.section("Checkpoints", pages.table(head, rows))
