"""Write numbers for people, the same in pages and terminals."""

from __future__ import annotations

import math
from datetime import UTC, datetime


def count(number: int | None) -> str:
    """Return a count with a comma between thousands: 1234567 becomes "1,234,567".

    None becomes "unknown".
    """
    return "unknown" if number is None else f"{number:,}"


def share(part: float, whole: float = 1.0, digits: int = 1) -> str:
    """Return `part / whole` as a percentage: `share(3, 8)` is "37.5%". A share of nothing is 0."""
    return f"{part / whole if whole else 0.0:.{digits}%}"


def percentage(part: float) -> str:
    """Return a share with four significant digits: `percentage(0.5)` is "50%"."""
    return f"{number(100 * part)}%"


def number(value: float) -> str:
    """Return a number with four significant digits: "0.001", "2.5", "12,346", "1.235e-05"."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = abs(value)
    if size >= 1e9 or size < 1e-3:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"
    if size >= 999.95:
        return f"{value:,.0f}"
    text = f"{value:.{3 - math.floor(math.log10(size))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def compact(value: float) -> str:
    """Return a number in few characters: "9,999", "12.5k", "3.1M", "4G"."""
    for size, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if sign == 'k' else size):.3g}{sign}"
    return number(value)


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: "3 d 4 h", "5 min 6 s", "0.25 s"."""
    if seconds < 59.5:
        return f"{float(f'{seconds:.2g}'):g} s"
    whole = round(seconds)
    for big, size, small, unit in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // unit
            return f"{whole // size} {big} {rest} {small}" if rest else f"{whole // size} {big}"
    raise AssertionError("a duration of 60 s and more has minutes")


def moment(unix: float) -> str:
    """Return a Unix time as a date and time of day in UTC: "2026-01-31 12:34:56 UTC"."""
    return f"{datetime.fromtimestamp(unix, UTC):%Y-%m-%d %H:%M:%S} UTC"
