"""Make the HTML page of statistics."""

from __future__ import annotations

from collections.abc import Iterable

from sftstream.pages.document import Page, document, tag, text
from sftstream.stats.summary import Histogram, Lengths, Pair, Stats
from sftstream.stats.terminal import run_lines, summary_line

PLOT = 420, 150
"""Width and height of a plot in its own units."""


def page(stats: Stats, title: str) -> str:
    """Return the page as one self-contained HTML document."""
    rows, tokens = sum(s.read for s in stats.sources), sum(s.tokens for s in stats.sources)
    trained, refused = sum(s.trained for s in stats.sources), sum(sum(s.refused.values()) for s in stats.sources)
    facts = {
        "rows": f"{rows:,}",
        "tokens": f"{tokens:,}",
        "tokens trained": f"{trained / max(tokens, 1):.1%}",
        "steps": "unknown" if stats.steps is None else f"{stats.steps:,}",
        "slots filled": "unknown" if stats.fill is None else f"{stats.fill:.1%}",
        "rows refused": f"{refused:,}",
        "duplicates": f"{stats.overlap.duplicates:,}",
    }
    kind = "A sample of the rows" if stats.sampled else "Every row"
    note = f"{kind}, rendered and tokenized as the run does it. {run_lines(stats)[0].capitalize()}."
    theme = '<button type="button" id="theme" class="corner" aria-label="Light or dark">&#9680;</button>'
    body = [
        tag(
            "header",
            [
                theme,
                tag("h1", text(title)),
                tag("p", text(note), class_="sub"),
                tag("dl", [tag("div", tag("dt", text(n)) + tag("dd", text(v))) for n, v in facts.items()], class_="facts"),
            ],
            class_="top",
        ),
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
        tag("p", text(summary_line(lengths, number)), class_="sub num"),
    ]
    return tag("div", parts, class_="card")


def histogram(values: Histogram, number: str, label: str) -> str:
    """Return an SVG drawing of a histogram. `number` formats a value: "{:,.0f}"."""
    width, height = PLOT
    most, count = max(values.counts), len(values.counts)
    bars = []
    for index, bar in enumerate(values.counts):
        size = max(1.0, (height - 24) * bar / most) if bar else 0.0
        name = f"{number.format(values.edges[index])} to {number.format(values.edges[index + 1])}: {bar:,}"
        bars.append(
            tag(
                "rect",
                tag("title", text(name)),
                x=f"{index * width / count:.2f}",
                y=f"{height - 18 - size:.2f}",
                width=f"{max(1.0, width / count - 1):.2f}",
                height=f"{size:.2f}",
                rx="1",
            )
        )
    base = tag("line", x1=0, x2=width, y1=height - 17.5, y2=height - 17.5)
    last = f"{number.format(values.edges[-2])} and more" if values.open_end else number.format(values.edges[-1])
    ends = tag("text", text(number.format(values.edges[0])), x=0, y=height - 4)
    ends += tag("text", text(last), x=width, y=height - 4, text_anchor="end")
    return tag("svg", [*bars, base, ends], class_="plot", viewBox=f"0 0 {width} {height}", role="img", aria_label=label)


def table(head: Iterable[tuple[str, bool]], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of texts; each heading tells whether its column holds numbers."""
    columns = list(head)
    classes = ["n" if is_number else "w" for _, is_number in columns]
    heads = tag("tr", (tag("th", text(name), class_=c) for (name, _), c in zip(columns, classes, strict=True)))
    lines = (tag("tr", (tag("td", text(v), class_=c) for v, c in zip(row, classes, strict=True))) for row in rows)
    return tag("div", tag("table", [heads, *lines]), class_="scroll")


def _sources(stats: Stats) -> str:
    head = [
        ("source", False),
        *((n, True) for n in ("rows", "tokens", "trained", "too long", "refused", "share of tokens")),
    ]
    rows = [
        (
            s.path,
            f"{s.read:,}" if s.rows == s.read else f"{s.read:,} of {'unknown' if s.rows is None else f'{s.rows:,}'}",
            f"{s.tokens:,}",
            f"{s.trained / max(s.tokens, 1):.1%}",
            f"{s.too_long:,}",
            f"{sum(s.refused.values()):,}",
            f"{s.share_of_tokens:.1%}",
        )
        for s in stats.sources
    ]
    return tag("section", [tag("h2", text("Mixture")), table(head, rows)])


def _capacities(stats: Stats) -> str:
    head = [(n, True) for n in ("capacity", "slots filled", "conversations too long", "tokens lost")]
    rows = [
        (
            f"{c.capacity:,}{' (this config)' * (c.capacity == stats.capacity)}",
            f"{c.fill:.2%}",
            f"{c.too_long:.2%}",
            f"{c.lost_tokens:.2%}",
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
    found, least = stats.overlap, "At least " if stats.sampled else ""
    parts = [
        tag("h2", text("Duplicates and held-out data")),
        tag("p", text(f"{least}{found.duplicates:,} training rows equal an earlier training row."), class_="sub"),
        _pairs(found.pairs),
    ]
    if found.held_out:
        trained = f"{least}{found.trained_too:,} of {found.held_out:,} held-out rows are trained too"
        refused = f"; {found.held_out_refused:,} were refused and are not compared." if found.held_out_refused else "."
        asked = f"The question of {least.lower()}{found.asked_too:,} held-out rows is asked in training too."
        parts += [
            tag("p", text(trained + refused), class_="sub"),
            _pairs(found.trained_too_pairs),
            tag("p", text(asked), class_="sub"),
            _pairs(found.asked_too_pairs),
        ]
    return tag("section", parts)


def _pairs(pairs: tuple[Pair, ...]) -> str:
    if not pairs:
        return ""
    return table([("row", False), ("equals", False)], ((pair.place, pair.equal_to) for pair in pairs))
