"""Draw the launches of a run on an axis of time: work, repeated steps, interruptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sftstream import pages
from trainer.report.records import LaunchSummary, Summary

SIDE = 1000
"""Width of the drawing in its own units."""
HEIGHT = 100
MOST_LAUNCHES = 100
"""Launches that are listed, the newest."""
MOST_BARS = 1000
"""Launches that are drawn, the newest."""


HEAD = [
    ("launch", True),
    ("steps", False),
    ("began", False),
    ("lasted", True),
    ("end", False),
    ("repeated later", True),
    ("changed", False),
]
"""Headings of the list of launches; True for numbers."""


def timeline(summary: Summary) -> str:
    """Return the section with the launches, drawn and listed; "" if none is known."""
    launches = summary.launches
    if not launches:
        return ""
    rows = (_row(number, launch) for number, launch in list(enumerate(launches, 1))[-MOST_LAUNCHES:])
    more = len(launches) - MOST_LAUNCHES
    note = [pages.tag("p", pages.text(f"{more:,} earlier launches are not listed."), class_="sub")] if more > 0 else []
    return pages.section("Launches and interruptions", _drawing(summary), *note, pages.table(HEAD, rows))


def _row(number: int, launch: LaunchSummary) -> tuple[str, ...]:
    lasted = launch.ended is not None and launch.began is not None
    topology = ", ".join(f"{name} {size}" for name, size in launch.mesh.items())
    steps = f"{launch.after + 1:,} to {launch.reached:,}" if launch.reached > launch.after else "none"
    return (
        str(number),
        steps,
        "unknown" if launch.began is None else pages.figures.moment(launch.began),
        pages.figures.duration(launch.ended - launch.began) if lasted else "unknown",  # type: ignore[operator]
        launch.end or "unknown",
        f"{launch.lost:,}",
        "; ".join(launch.changed) if number > 1 else topology,
    )


def _drawing(summary: Summary) -> str:
    timed = [launch for launch in summary.launches if launch.began is not None][-MOST_BARS:]
    if not timed:
        note = "This version of the trainer recorded no times, so interruptions are listed by their steps."
        return pages.tag("p", pages.text(note), class_="sub")
    first = min(launch.began or 0.0 for launch in timed)
    last = max(launch.ended or launch.began or 0.0 for launch in timed)
    unit = SIDE / ((last - first) or 1.0)
    saves = [c.time for c in summary.checkpoints if c.time is not None and first <= c.time <= last]
    shapes = [*_bars(timed, first, unit), *_ticks(saves, first, unit)]
    svg = pages.tag(
        "svg",
        shapes,
        class_="times",
        viewBox=f"0 0 {SIDE} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{len(timed)} launches from {pages.figures.moment(first)} to {pages.figures.moment(last)}",
    )
    ends = pages.tag(
        "div", [pages.tag("span", pages.text(pages.figures.moment(t))) for t in (first, last)], class_="ends"
    )
    names = (("work", "work"), ("repeated later", "lost"), ("checkpoint", "tick"))
    keys = pages.tag(
        "div", (pages.tag("span", pages.text(name), class_=f"key {kind}") for name, kind in names), class_="keys"
    )
    return pages.tag("figure", [pages.tag("figcaption", keys), svg, ends], class_="card chart")


def _bars(launches: Sequence[LaunchSummary], first: float, unit: float) -> Iterator[str]:
    for launch in launches:
        began = launch.began or 0.0
        ended = max(launch.ended or began, began)
        kept = min(ended, max(began, launch.kept)) if launch.kept is not None else ended
        words = f"steps {launch.after + 1:,} to {launch.reached:,}, {launch.end}"
        title = pages.tag("title", pages.text(words))
        for left, right, kind in ((began, kept, "work"), (kept, ended, "lost")):
            if right > left or kind == "work":
                width = max(2.0, (right - left) * unit)
                x = min((left - first) * unit, SIDE - width)
                yield pages.tag("rect", title, x=f"{x:.2f}", y=14, width=f"{width:.2f}", height=72, class_=kind)


def _ticks(times: Sequence[float], first: float, unit: float) -> Iterator[str]:
    for x in sorted({round((time - first) * unit, 0) for time in times}):
        yield pages.tag("line", x1=x, x2=x, y1=0, y2=HEIGHT, class_="tick")
