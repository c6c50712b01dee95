"""Read spans of time such as "3h50m" in a config."""

from __future__ import annotations

import re

_DURATION = re.compile(r"(?:(\d{1,18})d)?(?:(\d{1,18})h)?(?:(\d{1,18})m)?(?:(\d{1,18})s)?", re.ASCII)
LONGEST = 1000
"""Days of the longest time."""


def parse_duration(name: str, text: str) -> float:
    """Return the seconds of a text such as "3h50m": days, hours, minutes, seconds, in this order.

    `name` is the key of the text in a config.

    Raises ValueError if the text has another form or stands for 0 seconds or more than `LONGEST`.
    """
    match = _DURATION.fullmatch(text)
    parts = [int(part or 0) for part in match.groups()] if match else []
    seconds = sum(part * unit for part, unit in zip(parts, (86_400, 3600, 60, 1), strict=False))
    if not seconds:
        raise ValueError(
            f'{name} = {text!r} is no time above 0; write days, hours, minutes and seconds as in "1d", "3h50m", "90s"'
        )
    if seconds > LONGEST * 86_400:
        raise ValueError(f"{name} = {text!r} must be at most {LONGEST}d")
    return float(seconds)
