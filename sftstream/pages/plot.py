"""Draw lines over steps or time as HTML and SVG that keep their text readable at any width.

The SVG holds lines only and is stretched to the width of the page; labels of the axes are HTML. The
numbers of a plot are in its attributes, from which `plot.js` reads the values at the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sftstream.pages.document import tag, text
from sftstream.pages.figures import compact, number

SIDE = 1000
"""Width and height of a plot in its own units."""
COLOURS = 6
"""Colours of lines, classes `c0` to `c5` of the style; further lines have dashes as well."""
MOST_TICKS = 6
"""Largest number of labels of the vertical axis."""
DECADES = 100
"""Ratio of the largest to the smallest value from which a scale with `logarithmic` has powers of
10."""


def whole(value: float) -> str:
    """Return the nearest whole number in few characters."""
    return compact(round(value))


class Line(NamedTuple):
    """A line of a plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    """Values; None is a gap."""
    low: Sequence[float | None] = ()
    """Lower edge of the band around the line; empty without a band."""
    high: Sequence[float | None] = ()
    colour: int = 0
    dots: bool = False
    """True to draw dots, for a few values far apart."""


class Mark(NamedTuple):
    """A vertical line, or a tick at the bottom."""

    x: float
    kind: str
    """Class of the style: "launch" for a vertical line, "save" for a tick."""


class Plot(NamedTuple):
    """A plot with its axes."""

    title: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    axis: str = "step"
    """Meaning of the horizontal axis."""
    form: Callable[[float], str] = number
    """Format of a value."""
    form_x: Callable[[float], str] = whole
    zero: bool = False
    """True to begin the vertical axis at 0."""
    logarithmic: bool = False
    """True for powers of 10 if the values are far apart and above 0."""


class Scale(NamedTuple):
    """The vertical axis."""

    ticks: tuple[float, ...]
    """Labels, equally spaced, ascending; the first and the last are the ends of the axis."""
    logarithmic: bool

    def at(self, value: float) -> float:
        """Return the height of a value, 0 at the top and `SIDE` at the bottom."""
        low, high = self.ticks[0], self.ticks[-1]
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return SIDE * (1 - min(1.0, max(0.0, (value - low) / (high - low))))


def plot(drawn: Plot) -> str:
    """Return a card with a plot."""
    lines = [line for line in drawn.lines if any(y is not None for y in line.y)]
    if not lines:
        return ""
    scale = _scale(drawn, lines)
    left, right = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
    across = (right - left) or 1.0

    def place(x: float) -> float:
        return SIDE * (x - left) / across if right > left else SIDE / 2

    shapes = [
        *(tag("line", x1=0, x2=SIDE, y1=_n(scale.at(t)), y2=_n(scale.at(t)), class_="rule") for t in scale.ticks),
        *(_mark(mark, place(mark.x)) for mark in drawn.marks if left <= mark.x <= right),
        *(_band(line, place, scale) for line in lines if line.low),
        *(_line(line, place, scale, drawn.form) for line in lines),
        tag("line", x1=0, x2=0, y1=0, y2=SIDE, class_="at", hidden=""),
    ]
    svg = tag(
        "svg",
        shapes,
        class_="lines",
        viewBox=f"0 0 {SIDE} {SIDE}",
        preserveAspectRatio="none",
        role="img",
        aria_label=_description(drawn, lines),
    )
    names = [tag("span", text(line.name), class_=f"key c{line.colour % COLOURS}{_dashes(line)}") for line in lines]
    caption = [
        tag("h3", text(drawn.title)),
        tag("div", names, class_="keys") if len(lines) > 1 else "",
    ]
    vertical = tag("div", (tag("span", text(drawn.form(t))) for t in reversed(scale.ticks)), class_="y")
    xs = [left + across * part / 4 for part in range(5)] if right > left else [left]
    horizontal = labels([drawn.form_x(x) for x in xs])
    axes = tag("div", [vertical, svg, horizontal, tag("output", "", aria_hidden="true")], class_="axes")
    return tag("figure", [tag("figcaption", caption), axes], class_="card chart", data_axis=drawn.axis)


def labels(names: Sequence[str]) -> str:
    """Return equally spaced labels below a drawing, the outer ones at its ends, in a fixed size."""
    last = len(names) - 1
    anchors = ["start", *["middle"] * (last - 1), "end"] if last else ["middle"]
    places = [100 * index // last for index in range(last + 1)] if last else [50]
    parts = (
        tag("text", text(name), x=f"{place}%", y=12, text_anchor=anchor)
        for name, place, anchor in zip(names, places, anchors, strict=True)
    )
    return tag("svg", parts, class_="x", aria_hidden="true")


def _scale(drawn: Plot, lines: Sequence[Line]) -> Scale:
    values = [v for line in lines for v in (*line.y, *line.low, *line.high) if v is not None]
    low, high = min(values), max(values)
    if drawn.logarithmic and low > 0 and high / low >= DECADES:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        step = -(-(last - first) // (MOST_TICKS - 1))
        last = first + step * -(-(last - first) // step)
        return Scale(tuple(10.0**power for power in range(first, last + 1, step)), logarithmic=True)
    return Scale(ticks(0.0 if drawn.zero else low, high), logarithmic=False)


def ticks(low: float, high: float) -> tuple[float, ...]:
    """Return up to `MOST_TICKS` equally spaced round numbers that span `low` to `high`.

    Example: `ticks(0.13, 0.87)` returns (0.0, 0.2, 0.4, 0.6, 0.8, 1.0).
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = abs(high) / 2 or 0.5
        low, high = (0.0 if low == 0 else low - half), high + half
    size = 10.0 ** math.floor(math.log10((high - low) / (MOST_TICKS - 1)))
    for step in (size * factor for factor in (1, 2, 5, 10, 20)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < MOST_TICKS:
            return tuple(float(f"{step * index:.12g}") for index in range(first, last + 1))
    raise AssertionError("20 times the size of a tick spans every range")


def _line(line: Line, place: Callable[[float], float], scale: Scale, form: Callable[[float], str]) -> str:
    kind = "dots" if line.dots or len(line.x) == 1 else "line"
    return tag(
        "path",
        d=_path(line, place, scale, dots=kind == "dots"),
        class_=f"{kind} c{line.colour % COLOURS}{_dashes(line)}",
        data_name=line.name,
        data_x=" ".join(f"{place(x):.1f}" for x in line.x),
        data_s=" ".join(f"{x:.10g}" for x in line.x),
        data_y=";".join("" if y is None else form(y) for y in line.y),
    )


def _path(line: Line, place: Callable[[float], float], scale: Scale, *, dots: bool) -> str:
    """Return the commands of a path; a dot is a line of length 0 with round ends."""
    commands, pen = [], False
    for x, y in zip(line.x, line.y, strict=True):
        if y is None:
            pen = False
            continue
        at = f"{_n(place(x))} {_n(scale.at(y))}"
        commands.append(f"M{at}h0" if dots else f"{'L' if pen else 'M'}{at}")
        pen = True
    return "".join(commands)


def _band(line: Line, place: Callable[[float], float], scale: Scale) -> str:
    edges = [
        (x, low, high)
        for x, low, high in zip(line.x, line.low, line.high, strict=True)
        if low is not None and high is not None
    ]
    if all(low == high for _, low, high in edges):
        return ""
    there = [f"{_n(place(x))} {_n(scale.at(high))}" for x, _, high in edges]
    back = [f"{_n(place(x))} {_n(scale.at(low))}" for x, low, _ in reversed(edges)]
    return tag("path", d=f"M{'L'.join([*there, *back])}Z", class_=f"band c{line.colour % COLOURS}")


def _mark(mark: Mark, x: float) -> str:
    top = 0 if mark.kind == "launch" else SIDE - 60
    return tag("line", x1=_n(x), x2=_n(x), y1=top, y2=SIDE, class_=mark.kind)


def _dashes(line: Line) -> str:
    return f" d{line.colour // COLOURS}" if line.colour >= COLOURS else ""


def _n(value: float) -> str:
    return f"{value:.4g}"


def _description(drawn: Plot, lines: Sequence[Line]) -> str:
    """Return the plot in words, for blind readers."""
    parts = []
    for line in lines:
        values = [y for y in line.y if y is not None]
        parts.append(
            f"{line.name}: from {drawn.form(values[0])} to {drawn.form(values[-1])}, "
            f"least {drawn.form(min(values))}, most {drawn.form(max(values))}"
        )
    return f"{drawn.title} by {drawn.axis}. {'; '.join(parts)}"
