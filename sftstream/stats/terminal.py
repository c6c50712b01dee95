"""Print statistics in a terminal, with plots of block characters."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sftstream.excerpt import printable
from sftstream.pages import figures
from sftstream.stats.summary import Histogram, Lengths, Pair, Stats

WIDTH = 36
"""Characters of the longest bar."""
LINES = 14
"""Bars of a plot."""
EIGHTHS = " ▏▎▍▌▋▊▉█"


def show(stats: Stats, console: Console) -> None:
    """Print the statistics."""
    for part in _parts(stats):
        console.print(part)
        console.print()


def _parts(stats: Stats) -> Iterator[RenderableType]:
    kind = "a sample" if stats.sampled else "every row"
    read, tokens = sum(s.read for s in stats.sources), sum(s.tokens for s in stats.sources)
    yield Text(
        f"{kind}: {read:,} rows, {tokens:,} tokens in {stats.seconds:.1f} s "
        f"({tokens / max(stats.seconds, 1e-9):,.0f} tokens a second)"
    )
    yield _sources(stats)
    yield _plot("tokens of a conversation", stats.lengths, "{:,.0f}")
    yield _plot("trained share of its tokens", stats.trained_share, "{:.0%}")
    yield _plot("messages of a conversation", stats.messages, "{:,.0f}")
    yield _capacities(stats)
    yield Text("\n".join(run_lines(stats)))
    yield from _refused(stats)
    yield Text(printable("\n".join(overlap_lines(stats))))


def run_lines(stats: Stats) -> list[str]:
    """Return the packs, steps and epochs to expect."""
    passes = "without end" if stats.epochs is None else f"{stats.epochs} epoch{'s' * (stats.epochs > 1)}"
    fill = "" if stats.fill is None else f", about {stats.fill:.1%} full"
    packs = "packs" if stats.packs is None else f"about {stats.packs:,} packs"
    steps = "" if stats.steps is None else f": {stats.steps:,} steps of {stats.global_batch} packs"
    streams = f"{stats.streams} logical stream{'s' * (stats.streams > 1)}"
    return [f"the run: {passes}, {packs} of {stats.capacity:,} tokens{fill}{steps}; {streams}"]


def overlap_lines(stats: Stats) -> list[str]:
    """Return the duplicates, and the overlap with held-out data, with examples."""
    found = stats.overlap
    least = "at least " if stats.sampled else ""
    lines = [f"duplicates: {least}{found.duplicates:,} training rows equal an earlier one", *_pairs(found.pairs)]
    if found.held_out:
        lines += [
            f"held out: {found.held_out:,} rows read, {found.held_out_refused:,} of them refused; "
            f"{least}{found.trained_too:,} are trained too",
            *_pairs(found.trained_too_pairs),
            f"held out: the question of {least}{found.asked_too:,} rows is asked in the training data too",
            *_pairs(found.asked_too_pairs),
        ]
    return lines


def _pairs(pairs: tuple[Pair, ...]) -> list[str]:
    return [f"  {pair.place} = {pair.equal_to}" for pair in pairs]


def _sources(stats: Stats) -> Group:
    names = [f"source {number}: {source.path}" for number, source in enumerate(stats.sources)]
    table = Table("source", box=None, pad_edge=False)
    for heading in ("rows", "examples", "tokens", "trained", "too long", "refused", "share of tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, source in enumerate(stats.sources):
        rows = "streamed" if source.rows is None else f"{source.rows:,}"
        table.add_row(
            str(number),
            rows if source.rows == source.read else f"{source.read:,} of {rows}",
            figures.count(source.examples),
            figures.count(source.tokens),
            figures.share(source.trained, source.tokens),
            figures.count(source.too_long),
            figures.count(sum(source.refused.values())),
            figures.share(source.share_of_tokens),
        )
    return Group(Text(printable("\n".join(names))), table)


QUANTILES = (("least", "0.0"), ("median", "0.5"), ("95 %", "0.95"), ("99 %", "0.99"), ("most", "1.0"))
"""Names and keys of the quantiles that are printed."""


def summary_parts(lengths: Lengths, number: str) -> list[str]:
    """Return mean and quantiles in words; `number` formats a value: "{:,.0f}"."""
    quantiles = (f"{name} {number.format(lengths.quantiles[key])}" for name, key in QUANTILES)
    return [f"mean {number.format(lengths.mean)}", *quantiles]


def _plot(title: str, lengths: Lengths, number: str) -> Group:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    rows = _coarse(lengths.histogram)
    most = max(count for _, count in rows)
    for index, (low, count) in enumerate(rows):
        sign = "≥ " if lengths.histogram.open_end and index == len(rows) - 1 else ""
        table.add_row(sign + number.format(low), _bar(count / most), f"{count:,}")
    return Group(Text(f"{title}: {', '.join(summary_parts(lengths, number))}"), table)


def _coarse(histogram: Histogram) -> list[tuple[float, int]]:
    """Return lower edge and count of at most `LINES` bars, made of neighbouring bars."""
    tail = len(histogram.counts) - histogram.open_end
    step = -(-tail // LINES)
    rows = [(histogram.edges[at], sum(histogram.counts[at : min(at + step, tail)])) for at in range(0, tail, step)]
    return [*rows, (histogram.edges[tail], histogram.counts[tail])] if histogram.open_end else rows


def _bar(share: float) -> str:
    eighths = round(share * WIDTH * 8)
    if share and not eighths:
        eighths = 1
    return EIGHTHS[-1] * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _capacities(stats: Stats) -> Table:
    table = Table("capacity", box=None, pad_edge=False)
    for heading in ("slots filled", "too long", "tokens lost"):
        table.add_column(heading, justify="right")
    for c in stats.capacities:
        mark = "  (this config)" if c.capacity == stats.capacity else ""
        table.add_row(
            f"{c.capacity:,}{mark}", *(figures.share(part, digits=2) for part in (c.fill, c.too_long, c.lost_tokens))
        )
    return table


def _refused(stats: Stats) -> Iterator[RenderableType]:
    reasons = Table("refused, by reason", box=None, pad_edge=False)
    reasons.add_column("source")
    reasons.add_column("rows", justify="right")
    for number, source in enumerate(stats.sources):
        for reason, count in source.refused.items():
            reasons.add_row(Text(printable(reason)), str(number), f"{count:,}")
    if not reasons.row_count:
        yield Text("no row was refused for other reasons than its length")
        return
    yield reasons
    rows = "\n".join(f"{row.place}: {row.reason}: {row.detail}" for row in stats.refused[:5])
    yield Text(printable(rows), style="dim")
