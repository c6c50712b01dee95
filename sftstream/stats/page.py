"""Make the HTML page of statistics."""

from __future__ import annotations

from sftstream.pages import Page, document, figures, header, labels, table, tag, text
from sftstream.stats.summary import Histogram, Lengths, Pair, Stats
from sftstream.stats.terminal import run_lines, summary_parts

PLOT = 420, 126
"""Width and height of a plot in its own units."""


def page(stats: Stats, title: str) -> str:
    """Return the page as one self-contained HTML document."""
    rows, tokens = sum(s.read for s in stats.sources), sum(s.tokens for s in stats.sources)
    trained, refused = sum(s.trained for s in stats.sources), sum(sum(s.refused.values()) for s in stats.sources)
    facts = {
        "rows": figures.count(rows),
        "tokens": figures.count(tokens),
        "tokens trained": figures.share(trained, tokens),
        "steps": figures.count(stats.steps),
        "slots filled": "unknown" if stats.fill is None else figures.share(stats.fill),
        "rows refused": figures.count(refused),
        "duplicates": figures.count(stats.overlap.duplicates),
    }
    kind = "A sample of the rows" if stats.sampled else "Every row"
    note = f"{kind}, rendered and tokenized as the run does it. {run_lines(stats)[0].capitalize()}."
    body = [
        header(title, text(note), facts),
        tag("main", [_plots(stats), _sources(stats), _capacities(stats), _reasons(stats), _overlap(stats)]),
        tag("footer", text("Made by sftstream stats. The page loads nothing from anywhere.")),
    ]  # fmt: skip
    return document(Page(title, "".join(body)))


def _plots(stats: Stats) -> str:
    plots = [
        _plot("Tokens of a conversation", stats.lengths, "{:,.0f}"),
        _plot("Trained share of a conversation", stats.trained_share, "{:.0%}"),
        _plot("Messages of a conversation", stats.messages, "{:,.0f}"),
    ]
    return tag("section", [tag("h2", text("Conversations")), tag("div", plots, class_="grid")])


def _plot(title: str, lengths: Lengths, number: str) -> str:
    parts = [
        tag("h3", text(title)),
        histogram(lengths.histogram, number, title),
        tag("p", ", ".join(tag("span", text(part)) for part in summary_parts(lengths, number)), class_="sub num parts"),
    ]
    return tag("div", parts, class_="card")


def histogram(values: Histogram, number: str, label: str) -> str:
    """Return a drawing of a histogram. `number` formats a value: "{:,.0f}"."""
    width, height = PLOT
    most, count = max(values.counts), len(values.counts)
    bars = []
    for index, bar in enumerate(values.counts):
        size = max(1.0, height * bar / most) if bar else 0.0
        name = f"{number.format(values.edges[index])} to {number.format(values.edges[index + 1])}: {bar:,}"
        bars.append(
            tag(
                "rect",
                tag("title", text(name)),
                x=f"{index * width / count:.2f}",
                y=f"{height - size:.2f}",
                width=f"{max(1.0, width / count - 1):.2f}",
                height=f"{size:.2f}",
                rx="1",
            )
        )
    last = f"{number.format(values.edges[-2])} and more" if values.open_end else number.format(values.edges[-1])
    svg = tag("svg", bars, class_="plot", viewBox=f"0 0 {width} {height}", role="img", aria_label=label)
    return svg + labels([number.format(values.edges[0]), last])


def _sources(stats: Stats) -> str:
    head = [
        ("source", False),
        *((n, True) for n in ("rows", "tokens", "trained", "too long", "refused", "share of tokens")),
    ]
    rows = [
        (
            s.path,
            figures.count(s.read) if s.rows == s.read else f"{s.read:,} of {figures.count(s.rows)}",
            figures.count(s.tokens),
            figures.share(s.trained, s.tokens),
            figures.count(s.too_long),
            figures.count(sum(s.refused.values())),
            figures.share(s.share_of_tokens),
        )
        for s in stats.sources
    ]
    return tag("section", [tag("h2", text("Mixture")), table(head, rows)])


def _capacities(stats: Stats) -> str:
    head = [(n, True) for n in ("capacity", "slots filled", "conversations too long", "tokens lost")]
    rows = [
        (
            f"{c.capacity:,}{' (this config)' * (c.capacity == stats.capacity)}",
            *(figures.share(part, digits=2) for part in (c.fill, c.too_long, c.lost_tokens)),
        )
        for c in stats.capacities
    ]
    return tag("section", [tag("h2", text("Fill at several capacities")), table(head, rows)])


def _reasons(stats: Stats) -> str:
    counts = [
        (reason, str(number), f"{count:,}")
        for number, source in enumerate(stats.sources)
        for reason, count in source.refused.items()
    ]
    if not counts:
        return tag("section", tag("h2", text("Refused rows")) + tag("p", text("No row was refused."), class_="sub"))
    examples = [(row.place, row.reason, row.detail) for row in stats.refused]
    parts = [
        tag("h2", text("Refused rows")),
        table([("reason", False), ("source", True), ("rows", True)], counts),
        tag("h3", text("The first of them")),
        table([("place", False), ("reason", False), ("detail", False)], examples),
    ]
    return tag("section", parts)


def _overlap(stats: Stats) -> str:
    found, least = stats.overlap, "at least " if stats.sampled else ""
    parts = [
        tag("h2", text("Duplicates and held-out data")),
        tag("p", text(f"Training rows equal to an earlier training row: {least}{found.duplicates:,}."), class_="sub"),
        _pairs(found.pairs),
    ]
    if found.held_out:
        refused = f", of which {found.held_out_refused:,} were refused" if found.held_out_refused else ""
        trained = f"Held-out rows that are trained too: {least}{found.trained_too:,} of {found.held_out:,}{refused}."
        asked = f"Held-out rows whose question is asked in training too: {least}{found.asked_too:,}."
        parts += [
            tag("p", text(trained), class_="sub"),
            _pairs(found.trained_too_pairs),
            tag("p", text(asked), class_="sub"),
            _pairs(found.asked_too_pairs),
        ]
    return tag("section", parts)


def _pairs(pairs: tuple[Pair, ...]) -> str:
    if not pairs:
        return ""
    return table([("row", False), ("equals", False)], ((pair.place, pair.equal_to) for pair in pairs))
