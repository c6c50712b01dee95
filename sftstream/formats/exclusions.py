"""Marks on a turn that include the turn in the training or exclude it, in datasets' spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sftstream.excerpt import excerpt
from sftstream.records import Refused

_CHOICES = ("train", "training", "trainable", "loss", "compute_loss", "weight")
"""Marks that choose: true or 1 trains the turn, false or 0 does not."""
_WEIGHTS = ("loss_weight", "loss_scale", "loss_mask")
"""Marks that only exclude: 0 excludes the turn, 1 leaves the choice to the role."""
_MASKS = ("masked", "is_masked", "no_loss", "ignore_loss", "skip_loss", "exclude_from_loss")
"""Marks that only exclude: true or 1 excludes the turn, else the role decides."""
_UNCLEAR = ("mask", "train_detail", "training_detail", "train_on")
"""Marks without one agreed meaning, or of parts of a turn; refused."""
MARKS = frozenset({*_CHOICES, *_WEIGHTS, *_MASKS, *_UNCLEAR})
"""All names of marks."""
_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def parse_train(turn: Mapping[str, Any], path: str) -> bool | None:
    """Return True if the turn is marked to be trained, False if excluded, None if unmarked.

    Raises Refused if a mark is neither true, false, 0 nor 1, if its meaning is unclear, or if two
    marks contradict.
    """
    if MARKS.isdisjoint(turn):
        return None
    if unclear := [name for name in _UNCLEAR if turn.get(name)]:
        raise Refused(
            "bad weight", f"{path}.{unclear[0]} has no agreed meaning; mark whole messages by train: true or false"
        )
    marks = {name: _flag(turn[name], f"{path}.{name}") for name in turn if name in MARKS and turn[name] is not None}
    choices = {marks[name] for name in _CHOICES if name in marks}
    excluded = any(not marks.get(name, True) for name in _WEIGHTS) or any(marks.get(name, False) for name in _MASKS)
    if excluded:
        choices.add(False)
    if len(choices) > 1:
        raise Refused("bad weight", f"{path} has the marks {marks}, which contradict; keep one of the marks")
    return choices.pop() if choices else None


def _flag(value: Any, path: str) -> bool:
    flag = _FLAGS.get(str(value).lower()) if isinstance(value, bool | int | float | str) else None
    if flag is None:
        raise Refused("bad weight", f"{path} is {excerpt(value)}; use true or false, 1 or 0")
    return flag
