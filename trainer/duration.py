"""Read spans of time such as "3h50m" in a config."""

from __future__ import annotations

import re

_DURATION = re.compile(r"(?:(\d{1,4})d)?(?:(\d{1,5})h)?(?:(\d{1,7})m)?(?:(\d{1,9})s)?", re.ASCII)


def parse_duration(text: str) -> float:
    """Return the seconds of a text such as "3h50m": days, hours, minutes, seconds, in this order.

    Raises ValueError if the text has another form or stands for 0 seconds.
    """
    match = _DURATION.fullmatch(text)
    parts = [int(part or 0) for part in match.groups()] if match else []
    seconds = sum(part * unit for part, unit in zip(parts, (86_400, 3600, 60, 1), strict=False))
    if not seconds:
        raise ValueError(
            f'{text!r} is no time above 0; write days, hours, minutes and seconds as in "1d", "3h50m", "90s"'
        )
    return float(seconds)
