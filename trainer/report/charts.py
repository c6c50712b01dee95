"""Plot the curves of a run, or of several runs in one plot each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sftstream import pages
from trainer.report.records import Curve, Summary


class Chart(NamedTuple):
    """A plot of a report."""

    title: str
    curves: tuple[tuple[str, str], ...]
    """Names of lines, and the curves that they show; the first curve has a band."""
    form: Callable[[float], str] = pages.figures.number
    zero: bool = False
    logarithmic: bool = False


CHARTS = (
    Chart("Loss", (("training", "loss"), ("validation", "validation_loss"))),
    Chart("Learning rate", (("learning rate", "learning_rate"),), zero=True),
    Chart("Gradient norm", (("gradient norm", "grad_norm"),), logarithmic=True),
    Chart("Tokens per second", (("tokens/s", "tokens_per_second"),), zero=True),
    Chart("MFU", (("MFU", "mfu"),), pages.figures.percentage, zero=True),
    Chart("Fill of the packs", (("fill", "fill"),), pages.figures.percentage),
    Chart("Trained share of the tokens", (("trained", "trained_share"),), pages.figures.percentage),
    Chart("Wait for data, share of the step", (("wait", "data_wait"),), pages.figures.percentage, zero=True),
    Chart("Peak memory, GiB", (("GiB", "peak_memory"),), zero=True),
)


def charts_of_run(summary: Summary) -> list[str]:
    """Return a card for each plot that has values, with launches and checkpoints as marks."""
    last = summary.step
    launches = _apart([launch.after for launch in summary.launches[1:] if launch.after < last], last)
    saves = _apart([checkpoint.step for checkpoint in summary.checkpoints], last)
    marks = [pages.Mark(after + 0.5, "launch") for after in launches]
    marks += [pages.Mark(step, "save") for step in saves]
    cards = []
    for chart in CHARTS:
        lines = [
            _line(name, summary.curves[curve], colour, validated=curve == "validation_loss")
            for colour, (name, curve) in enumerate(chart.curves)
            if curve in summary.curves
        ]
        cards.append(_plot(chart, lines, marks))
    return [cards[0], _held_out(summary, marks), *cards[1:]]


def _held_out(summary: Summary, marks: Sequence[pages.Mark]) -> str:
    """Return a card with the validation losses of the first sources that have one; "" without."""
    known = [(n, curve) for n, curve in enumerate(summary.held_out) if any(value is not None for value in curve.mean)]
    lines = [
        _line(f"source {number}", curve, colour, validated=True)
        for colour, (number, curve) in enumerate(known[: pages.COLOURS])
    ]
    return _plot(Chart("Validation loss of each source", ()), lines, marks)


def charts_of_runs(names: Sequence[str], summaries: Sequence[Summary]) -> list[str]:
    """Return a card for each curve that a run has, with a line for each run."""
    cards = [_by_tokens(names, summaries)]
    for chart in CHARTS:
        for title, curve in chart.curves:
            lines = [
                _line(name, summary.curves[curve], colour, validated=curve == "validation_loss", band=False)
                for colour, (name, summary) in enumerate(zip(names, summaries, strict=True))
                if curve in summary.curves
            ]
            named = chart.title if len(chart.curves) == 1 else f"{chart.title}, {title}"
            cards.append(_plot(chart._replace(title=named), lines, ()))
    return [cards[1], cards[0], *cards[2:]]


def mixture_chart(summary: Summary) -> str:
    """Return a card with the share of each of the largest sources in the tokens."""
    steps = next(iter(summary.curves.values())).steps if summary.curves else ()
    largest = sorted(range(len(summary.mixture)), key=lambda number: -summary.mixture[number].tokens)[: pages.COLOURS]
    lines = [
        pages.Line(f"source {number}", steps, summary.mixture[number].curve, colour=colour)
        for colour, number in enumerate(sorted(largest))
    ]
    return pages.plot(pages.Plot("Share of the tokens", lines, form=pages.figures.percentage, zero=True))


def _by_tokens(names: Sequence[str], summaries: Sequence[Summary]) -> str:
    lines = []
    for colour, (name, summary) in enumerate(zip(names, summaries, strict=True)):
        if "loss" in summary.curves and "trained_tokens" in summary.curves:
            x = [tokens or 0.0 for tokens in summary.curves["trained_tokens"].high]
            lines.append(pages.Line(name, x, summary.curves["loss"].mean, colour=colour))
    return pages.plot(pages.Plot("Loss by trained tokens", lines, axis="trained tokens"))


def _line(name: str, curve: Curve, colour: int, *, validated: bool, band: bool = True) -> pages.Line:
    if not validated:
        low, high = (curve.low, curve.high) if band else ((), ())
        return pages.Line(name, curve.steps, curve.mean, low, high, colour)
    points = [(step, value) for step, value in zip(curve.steps, curve.mean, strict=True) if value is not None]
    steps, values = zip(*points, strict=True)
    return pages.Line(name, steps, values, colour=colour, dots=band and len(points) < 64)  # dots have no dashes


def _plot(chart: Chart, lines: Sequence[pages.Line], marks: Sequence[pages.Mark]) -> str:
    return pages.plot(
        pages.Plot(chart.title, lines, marks, form=chart.form, zero=chart.zero, logarithmic=chart.logarithmic)
    )


MOST_MARKS = 128
"""Launches, and checkpoints, that are marked in a plot."""


def _apart(steps: Sequence[int], last: int) -> list[int]:
    """Return some of the steps, at most a step in each of `MOST_MARKS` parts of the axis."""
    return list({step * MOST_MARKS // max(last, 1): step for step in steps}.values())
