"""Read the marks of a turn: keys that train the turn or exclude it from training.

Four turns with their training:

    {"role": "assistant", "content": "hello", "train": false}     excluded
    {"role": "assistant", "content": "hello", "weight": 1}        trained
    {"role": "assistant", "content": "hello", "masked": true}     excluded
    {"role": "assistant", "content": "hello"}                     the role decides
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from sftstream.excerpt import excerpt
from sftstream.formats.fields import ANSWERS, EMPTY, QUESTIONS, in_turns
from sftstream.records import Refused

CHOICES = ("train", "training", "trainable", "loss", "compute_loss", "weight")
"""Marks that train or exclude: true or 1 trains the turn, false or 0 excludes the turn."""
_WEIGHTS = ("loss_weight", "loss_scale", "loss_mask")
"""Marks that only exclude: false or 0 excludes the turn; with true or 1 the role decides."""
_MASKS = ("masked", "is_masked", "no_loss", "ignore_loss", "skip_loss", "exclude_from_loss")
"""Marks that only exclude: true or 1 excludes the turn; with false or 0 the role decides."""
_UNCLEAR = ("mask", "train_detail", "training_detail", "train_on")
"""Marks that are refused: their meaning differs between datasets, or concerns parts of a turn."""
MARKS = frozenset({*CHOICES, *_WEIGHTS, *_MASKS, *_UNCLEAR})
"""Names of all marks."""
_OF_ROWS = frozenset({"label", *CHOICES, *_WEIGHTS, *_MASKS})
"""Columns that can exclude a whole row."""
_LIKE_MARKS = re.compile("train|loss|mask|weight|learn|supervis|exclude|skip|ignore", re.IGNORECASE)
"""Parts of names that seem to be marks; such a key of an unknown meaning is refused."""
_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""Text of a mark's value, in small letters -> truth value."""


def parse_train(turn: Mapping[str, Any], path: str) -> bool | None:
    """Return True if a mark trains the turn, False if a mark excludes the turn, otherwise None.

    Raises Refused if a mark is neither true, false, 0 nor 1, if a key seems to be a mark of unknown
    meaning, or if two marks contradict each other.
    """
    if unclear := [name for name, value in turn.items() if _is_unclear(name) and value not in EMPTY]:
        raise Refused(
            "bad weight",
            f"{path}.{unclear[0]} has no agreed meaning; mark whole messages with train: true or train: false, or "
            f"leave the key out by ignore = [{in_turns(path, unclear[0])}]",
        )
    if MARKS.isdisjoint(turn):
        return None
    marks = {name: _flag(turn[name], f"{path}.{name}") for name in turn if name in MARKS and turn[name] is not None}
    choices = {marks[name] for name in CHOICES if name in marks}
    excluded = any(not marks.get(name, True) for name in _WEIGHTS) or any(marks.get(name, False) for name in _MASKS)
    if excluded:
        choices.add(False)
    if len(choices) > 1:
        raise Refused("bad weight", f"{path} has the marks {marks}, which contradict each other; keep one of the marks")
    return choices.pop() if choices else None


def refuse_marks(part: Mapping[str, Any], path: str, ignored: Collection[str]) -> None:
    """Raise Refused if a part of a message, such as a call, has a mark that is not `ignored`."""
    names = [name for name in part if name not in ignored and _seems_mark(name)]
    if marked := [name for name in names if part[name] not in EMPTY]:
        raise Refused(
            "bad weight",
            f"{path} has the mark {marked[0]!r} in a part of a message; mark whole messages with train: true or train: "
            f"false, or leave the key out by ignore = [{in_turns(path, marked[0])}]",
        )


def require_wanted(row: Mapping[str, Any]) -> None:
    """Raise Refused if a column says that the row is not to be trained.

    Such a column is `label`, if it is false (unpaired preference data), or a mark. A `label` of 0
    excludes a question with an answer only: of other rows it is often the number of a class.
    """
    if _OF_ROWS.isdisjoint(row):
        return
    for name in (name for name in row if name in _OF_ROWS):
        text = str(row[name]).lower()
        if name == "label" and text != "false" and not _is_pair(row):
            continue
        if _FLAGS.get(text) is (name in _MASKS):
            raise Refused(
                "unwanted answer",
                f"{name} is {text}, which marks an answer to avoid; remove the row, or train the answer by ignore = "
                f"[{name!r}]",
            )


def _is_pair(row: Mapping[str, Any]) -> bool:
    """Return True for a row whose columns are a question and an answer, and not turns."""
    names = {name for name, value in row.items() if value is not None}
    turns, questions = {"messages", "conversations", "conversation"}, {"instruction", *QUESTIONS}
    return not names & turns and not names.isdisjoint(questions) and not names.isdisjoint(ANSWERS)


@lru_cache(maxsize=4096)
def _seems_mark(name: Any) -> bool:
    return name in MARKS or (isinstance(name, str) and _LIKE_MARKS.search(name) is not None)


@lru_cache(maxsize=4096)
def _is_unclear(name: Any) -> bool:
    """Return True for a key that seems to be a mark, but whose meaning is not known."""
    return name in _UNCLEAR or (name not in MARKS and _seems_mark(name))


def _flag(value: Any, path: str) -> bool:
    flag = _FLAGS.get(str(value).lower()) if isinstance(value, bool | int | float | str) else None
    if flag is None:
        key = path.rpartition(".")[2]
        raise Refused(
            "bad weight",
            f"{path} is {excerpt(value)}; use true or false, 1 or 0, or leave it out by ignore = [{in_turns(path, key)}]",
        )
    return flag
