"""Make the page that compares runs: curves in one plot each, figures, differing settings."""

from __future__ import annotations

from collections.abc import Iterator

from sftstream import pages
from trainer.report.charts import charts_of_runs
from trainer.report.compare import Comparison
from trainer.report.flat import Difference
from trainer.report.page import notices

NONE = "–"
"""Sign for a value that a run does not have."""


def compare_page(comparison: Comparison) -> str:
    """Return the page of a comparison as one self-contained HTML document."""
    runs = comparison.runs
    facts = {
        "runs": pages.figures.count(len(runs)),
        "differing settings": pages.figures.count(len(comparison.config)),
        "differences in the data": pages.figures.count(len(comparison.identity)),
    }
    note = pages.text(f"Read at {pages.figures.moment(runs[0].read_at)}")
    body = [
        pages.header("Runs compared", note, facts),
        pages.tag("main", _sections(comparison)),
        pages.tag("footer", pages.text("Made by trainer.report. The page loads nothing from anywhere.")),
    ]
    title = f"Runs compared: {', '.join(comparison.names)}"
    return pages.document(pages.Page(title, "".join(body), ("plot.js",)))


def _sections(comparison: Comparison) -> Iterator[str]:
    yield notices(tuple(line for run in comparison.runs for line in run.damage))
    head = [("", False), *((name, True) for name in comparison.names)]
    facts = [("state", *(run.status for run in comparison.runs))]
    facts += [(name, *(value or NONE for value in values)) for name, values in comparison.facts.items()]
    yield pages.section("Figures", pages.table(head, facts))
    cards = [card for card in charts_of_runs(comparison.names, comparison.runs) if card]
    yield pages.section("Curves", pages.tag("div", cards, class_="grid"))
    yield _differences("Config", comparison.config, comparison.names)
    yield _differences("Identity of the data", comparison.identity, comparison.names)
    yield _differences("Environment", comparison.environment, comparison.names)


def _differences(title: str, found: tuple[Difference, ...], names: tuple[str, ...]) -> str:
    if not found:
        return pages.section(title, pages.tag("p", pages.text("No difference."), class_="sub"))
    head = [("", False), *((name, False) for name in names)]
    rows = ((difference.name, *(value or NONE for value in difference.values)) for difference in found)
    return pages.section(title, pages.table(head, rows))
