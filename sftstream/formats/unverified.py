"""Rows that hold no turns: plain text, or token ids with labels. Read with `verified = false` only.

Nobody can prove what such a row trains, since it does not tell who said what:

    {"text": "It rains."}
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sftstream.config import RowSettings
from sftstream.excerpt import excerpt
from sftstream.formats.exclusions import require_wanted
from sftstream.formats.fields import Row, is_list, require_text
from sftstream.formats.layouts import has_layout
from sftstream.formats.rows import require_small, row_fields
from sftstream.formats.unread import require_in_text
from sftstream.records import IGNORE_INDEX, RawRow, Refused

_MASKS = ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask")
"""Columns of 0 and 1, 1 for a trained token; the first present counts."""


class Unverified(NamedTuple):
    """A row without turns: a text, all of it trained, or token ids with the trained ones marked."""

    text: str | None
    ids: Sequence[int] = ()
    trained: Sequence[bool] = ()


def parse_unverified(row: RawRow, settings: RowSettings) -> Unverified | None:
    """Return the text or the token ids of a row; None of a row with a layout of turns.

    Raises BrokenRow or Refused as `parse_row` does, and Refused if labels and token ids differ.
    """
    fields = row_fields(row, settings)
    require_small(row, fields, settings)
    if has_layout(fields):
        return None
    column = next((column for column in ("input_ids", "text") if fields.get(column) is not None), None)
    if column is None:
        return None
    require_wanted(fields)
    if column == "input_ids":
        return _tokens(fields)
    text = require_text(fields["text"], "text")
    require_in_text(fields)
    return Unverified(text)


def _tokens(row: Row) -> Unverified:
    ids = _integers(row["input_ids"], "input_ids")
    trained = _trained(row, ids)
    seen = _integers(row.get("attention_mask") or [1] * len(ids), "attention_mask", len(ids))
    kept = [position for position, mark in enumerate(seen) if mark]
    return Unverified(None, [ids[position] for position in kept], [trained[position] for position in kept])


def _trained(row: Row, ids: Sequence[int]) -> list[bool]:
    if row.get("labels") is not None:
        labels = _integers(row["labels"], "labels", len(ids))
        for position, (label, token) in enumerate(zip(labels, ids, strict=True)):
            if label not in (IGNORE_INDEX, token):
                raise Refused(
                    "bad labels",
                    f"labels[{position}] is {label}, neither {IGNORE_INDEX} nor input_ids[{position}] = {token}; labels "
                    "are not shifted",
                )
        return [label != IGNORE_INDEX for label in labels]
    name = next((name for name in _MASKS if row.get(name) is not None), None)
    if name is None:
        return [True] * len(ids)
    marks = _integers(row[name], name, len(ids))
    for position, mark in enumerate(marks):
        if mark not in (0, 1):
            raise Refused("bad labels", f"{name}[{position}] is {mark}, neither 0 nor 1")
    return [bool(mark) for mark in marks]


def _integers(values: Any, column: str, length: int | None = None) -> list[int]:
    if not is_list(values) or not all(type(value) in (int, bool) for value in values):
        raise Refused("bad labels", f"{column} is {excerpt(values)}, not a list of integers")
    if length is not None and len(values) != length:
        raise Refused("bad labels", f"{column} has {len(values)} entries for {length} in input_ids")
    return list(values)
