"""Axes and colours of plots, and numbers for people."""

from __future__ import annotations

import os
import random
import re
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from sftstream import pages
from sftstream.pages import figures
from sftstream.pages.plot import MOST_TICKS, ticks

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.randrange(10**9))


def test_ticks_span_the_values_in_equal_round_steps() -> None:
    print(f"seed {SEED}")
    draw = random.Random(SEED)
    for _ in range(2000):
        low = draw.choice([0.0, draw.gauss(0, 1), 10 ** draw.uniform(-90, 90), -(10 ** draw.uniform(-90, 90))])
        high = low + abs(low) * draw.choice([0.0, 1e-12, 1e-6, 0.3, 40.0]) + draw.choice([0.0, 1e-50, 1.0, 1e50])
        found = ticks(low, high)
        slack = 1e-9 * max(abs(low), abs(high))
        assert 2 <= len(found) <= MOST_TICKS, (low, high)
        assert found[0] <= low + slack, (low, high, found)
        assert found[-1] >= high - slack, (low, high, found)
        steps = [b - a for a, b in pairwise(found)]
        assert min(steps) == pytest.approx(max(steps), rel=1e-3), (low, high, found)


def test_numbers_are_short_and_exact_to_four_digits() -> None:
    assert [figures.number(v) for v in (0, 0.00123456, 2.5, 2.34567, 999.96, 12345.6, 1.23e-7, 5e12)] == [
        *("0", "0.001235", "2.5", "2.346", "1,000", "12,346", "1.23e-07", "5e+12")
    ]
    assert [figures.compact(v) for v in (7, 9999, 12500, 3.14159e6, 4e9)] == ["7", "9,999", "12.5k", "3.14M", "4G"]
    assert [figures.duration(v) for v in (0.0123, 5.93, 59.9, 61, 3600, 90061)] == [
        *("0.012 s", "5.9 s", "1 min", "1 min 1 s", "1 h", "1 d 1 h")
    ]
    assert figures.moment(0) == "1970-01-01 00:00:00 UTC"
    assert (figures.share(3, 8), figures.share(1, 0), figures.percentage(0.98765)) == ("37.5%", "0.0%", "98.77%")
    assert (figures.count(1234567), figures.count(None)) == ("1,234,567", "unknown")


def test_values_far_apart_have_powers_of_ten_and_a_gap_breaks_the_line() -> None:
    line = pages.Line("a", [1, 2, 3, 4], [0.5, 700.0, None, 20.0])
    drawn = pages.plot(pages.Plot("A", [line], logarithmic=True))
    assert re.findall(r"<span>([\d.,]+)</span>", drawn) == ["1,000", "100", "10", "1", "0.1"]
    path = re.search(r'<path d="([^"]*)" class="line', drawn)
    assert path
    assert re.sub(r"[\d. ]+", "", path[1]) == "MLM"
    assert pages.plot(pages.Plot("A", [pages.Line("a", [1], [None])])) == ""


STYLE = (Path(pages.__file__).parent / "page.css").read_text()
# Machado, Oliveira, Fernandes (2009), severity 1.0, for linear RGB
DEFICIENCIES = {
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}


def linear(colour: str) -> tuple[float, ...]:
    values = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return tuple(v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)


def luminance(rgb: tuple[float, ...]) -> float:
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), rgb, strict=True))


def lab(rgb: tuple[float, ...]) -> tuple[float, float, float]:
    matrix = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.9505, 1.0, 1.089)
    xyz = [sum(m * v for m, v in zip(row, rgb, strict=True)) / w for row, w in zip(matrix, white, strict=True)]
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_of_lines_differ_for_every_eye_and_stand_out_from_the_card(theme: str) -> None:
    blocks = re.findall(r"--card:(#\w+);.*?((?:--c\d:#\w{6};?\s*){6})", STYLE, re.DOTALL)
    card, colours = blocks[0 if theme == "light" else 1]
    found = re.findall(r"#\w{6}", colours)
    assert len(found) == pages.COLOURS
    background = luminance(linear(card if len(card) == 7 else "#" + "".join(2 * c for c in card[1:])))
    for colour in found:
        light, dark = sorted((luminance(linear(colour)), background), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, f"{colour} is hard to see"
    for name, matrix in DEFICIENCIES.items():
        seen = [
            tuple(min(1.0, max(0.0, sum(m * v for m, v in zip(row, linear(c), strict=True)))) for row in matrix)
            for c in found
        ]
        for (a, one), (b, other) in combinations(zip(found, seen, strict=True), 2):
            distance = sum((p - q) ** 2 for p, q in zip(lab(one), lab(other), strict=True)) ** 0.5
            assert distance >= 25, f"{a} and {b} look alike with {name}: {distance:.1f}"
