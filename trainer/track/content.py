"""Choose what a tracker gets to know: numbers, digests, and settings without free text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from trainer.track.config import TrackerConfig

ABOUT = Path("trackers") / "about.json"
"""File in the run's directory."""
LONGEST = 500
"""Characters of the longest text of a config that is sent with `paths = true`."""
_PLAIN = re.compile(r"[A-Za-z0-9_. -]{1,64}")
"""Names that can be no path. Other names within a metric are replaced by their number."""


class About(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about a run that do not change from step to step, as stored in `ABOUT`."""

    token: str
    """The run's token, which a resumed run keeps."""
    name: str
    trackers: tuple[TrackerConfig, ...]
    settings: dict[str, bool | int | float | str]
    """Dotted key -> value of the config: numbers, truth values and fixed choices."""
    texts: dict[str, str]
    """Dotted key -> text of the config, such as a path; sent with `paths = true` only."""
    digests: dict[str, str]
    """SHA-256 digests of the config, of the data's identity, and of held-out packs."""

    def sent_to(self, tracker: TrackerConfig) -> dict[str, bool | int | float | str]:
        """Return the settings and digests for a tracker."""
        texts = self.texts if tracker.paths else {}
        return self.settings | texts | {f"digest.{name}": digest for name, digest in self.digests.items()}


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a step."""

    number: int
    time: float
    """Unix time at the end of the step."""
    values: dict[str, float]


def settings_of(config: msgspec.Struct) -> tuple[dict[str, bool | int | float | str], dict[str, str]]:
    """Return (settings, texts) of a config by dotted key.

    A text is a setting only if the field's type lists the text as a choice. Tables with free keys,
    such as the variables of a chat template, are in neither.
    """
    settings: dict[str, bool | int | float | str] = {}
    texts: dict[str, str] = {}
    for key, value, kind in _fields(config, ""):
        if isinstance(value, bool | int | float) or value in _choices(kind):
            settings[key] = value
        elif value.isprintable() and len(value) <= LONGEST:
            texts[key] = value
    return settings, texts


def step_of(line: dict[str, Any]) -> Step:
    """Return the numbers of a line of `metrics.jsonl`; texts, such as digests, are left out.

    A number in a table or list gets the name `metric/key` or `metric/index`.
    """
    values = dict(_numbers({key: value for key, value in line.items() if key not in ("step", "time")}, ""))
    return Step(number=line["step"], time=float(line.get("time") or 0.0), values=values)


def _fields(value: Any, key: str, kind: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value, type) of each number and text in a struct."""
    if isinstance(value, msgspec.Struct):
        for field in msgspec.structs.fields(value):
            yield from _fields(getattr(value, field.name), f"{key}.{field.name}".strip("."), field.type)
    elif isinstance(value, tuple | list):
        for index, element in enumerate(value):
            yield from _fields(element, f"{key}.{index}", kind)
    elif isinstance(value, bool | int | float | str):
        yield key, value, kind


def _choices(kind: Any) -> set[str]:
    """Return the texts that a type lists."""
    if get_origin(kind) is Literal:
        return {value for value in get_args(kind) if isinstance(value, str)}
    return set().union(*(_choices(part) for part in get_args(kind)))


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool | int | float):
        yield name, float(value)
    elif isinstance(value, list):
        for index, element in enumerate(value):
            yield from _numbers(element, f"{name}/{index}")
    elif isinstance(value, dict):
        for index, (key, element) in enumerate(value.items()):
            part = key if _PLAIN.fullmatch(key) else str(index)
            yield from _numbers(element, f"{name}/{part}".strip("/"))
