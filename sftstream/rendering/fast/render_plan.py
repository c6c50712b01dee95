"""Build a render plan from a trace; assemble text and trained spans from a plan and values.

Example. The template

    {% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}

prints the conversation (user "hi", assistant "seven"), values ["hi", "seven"], as

    <user>hi</s><assistant>seven</s>        trained: characters [23, 32), "seven</s>"

The trace of the template gives the plan

    pieces   ["<user>", "", "</s><assistant>", "", "</s>"]
    slots    (Slot(0, str.strip), Slot(1, str.strip))
    bounds   (Offset(1, 21), Offset(2, 25))

Offset(1, 21) means: after the first printed value and 21 template characters, "<user>" and
"</s><assistant>", so at 2 + 21 = 23. Another conversation of equal shape, values ["where? ",
"north"], prints "where?" and "north" into the empty pieces at the indices 1 and 3:

    <user>where?</s><assistant>north</s>    trained: [6 + 21, 11 + 25) = [27, 36), "north</s>"
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial, reduce
from itertools import accumulate
from operator import methodcaller
from typing import Any, NamedTuple

from sftstream.records import Rendered
from sftstream.rendering.fast.symbolic import Op, Trace, ValueRef

STRIP: Op = ("strip", (None,))

Convert = Callable[[Any], Any]


class Offset(NamedTuple):
    """A text offset, stored in a form that fits values of any length.

    In a concrete text: `template_characters` plus the printed lengths of the first `values_before`
    slots.
    """

    values_before: int
    """Number of slots printed before the offset."""
    template_characters: int
    """Number of the template's own characters printed before the offset."""


class Slot(NamedTuple):
    """One print of a value; a value printed twice has two slots."""

    number: int
    """Index into the conversation's values."""
    convert: Convert | None
    """Function from the value to the printed string, `str.strip` for example; None prints as is."""


class Condition(NamedTuple):
    """A question that a conversation must answer as the traced conversation did."""

    number: int
    """Index into the conversation's values."""
    convert: Convert | None
    """Function applied to the value before the question; None asks about the value itself."""
    ask: Callable[[Any], Any]
    """The question, `methodcaller("startswith", "x")` for example."""
    answer: bool


class RenderPlan(NamedTuple):
    """How to print conversations of one shape, and the trained bounds in the printed text."""

    pieces: list[str]
    """Template texts at even indices; empty strings at odd indices, filled by the slots."""
    slots: tuple[Slot, ...]
    """Printed values in order of print; slot `i` goes to piece `2 * i + 1`."""
    untrimmed: tuple[int, ...]
    """Indices of slots that print outer white space: `{{ m.content }}` without `trim`.

    The plan does not hold for a string with white space at an end: the search for turns counts
    outer white space as template text, so the bounds would be wrong.
    """
    must_be_verbatim: tuple[int, ...]
    """Indices of slots with a partial strip: `m.content.strip('xy')`, `m.content.lstrip()`.

    The plan holds only if the strip changes nothing; a shortened text is left to the full path.
    """
    unprinted: tuple[int, ...]
    """Indices of values without a slot: ids in most templates, earlier reasoning in some.

    Unprinted values are searched for markup too: the full path refuses a special token in an id.
    """
    conditions: tuple[Condition, ...]
    bounds: tuple[Offset, ...]
    """Starts and ends of the trained spans by turns, as in `Rendered.bounds`."""


class MarkupSearch:
    """A search for texts that could be taken for a part of the template.

    Almost every text is cleared by one or two `in` tests on a first character, `<` for example.
    """

    def __init__(self, markup: Iterable[str]) -> None:
        self._markup = sorted(markup)
        self._beginnings = {first: self._beginning(first) for first in {text[0] for text in self._markup}}

    def found_in(self, text: str) -> bool:
        """Return True if any of the markup occurs in the text."""
        for first, beginning in self._beginnings.items():
            if first in text and beginning.search(text):
                return bool(self._pattern.search(text))
        return False

    def _beginning(self, first: str) -> re.Pattern[str]:
        """Return a pattern for the first two characters of all markup that begins with `first`."""
        seconds = {re.escape(text[1:2]) for text in self._markup if text[0] == first}
        return re.compile(f"{re.escape(first)}(?:{'|'.join(sorted(seconds))})")

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """A pattern for all markup, compiled on demand: hundreds of special tokens take long."""
        return re.compile("|".join(map(re.escape, self._markup)))


def build_plan(
    trace: Trace, values: Sequence[Any], rendered: Rendered, to_json: Callable[..., str], markup: MarkupSearch
) -> RenderPlan | None:
    """Return the plan of the traced conversation; None unless the plan reproduces `rendered`."""
    texts, refs = _split_pieces(trace.pieces)
    slots = tuple(Slot(ref.number, _converter(ref, to_json)) for ref in refs)
    plan = RenderPlan(
        pieces=[piece for text in texts for piece in (text, "")][:-1],
        slots=slots,
        untrimmed=tuple(
            slot for slot, ref in enumerate(refs) if STRIP not in ref.ops and isinstance(values[ref.number], str)
        ),
        must_be_verbatim=tuple(slot for slot, ref in enumerate(refs) if any(map(_is_partial_strip, ref.ops))),
        unprinted=tuple(sorted(set(range(len(values))) - {slot.number for slot in slots})),
        conditions=tuple(
            Condition(
                guard.ref.number,
                _converter(guard.ref, to_json),
                methodcaller(guard.method, *guard.arguments),
                guard.answer,
            )
            for guard in trace.guards
        ),
        bounds=(),
    )
    printed = print_values(plan, values, markup)
    if printed is None:
        return None
    plan = plan._replace(bounds=tuple(_offsets(rendered.bounds, texts, printed)))
    return plan if assemble(plan, printed) == rendered else None


def fulfils_conditions(plan: RenderPlan, values: Sequence[Any]) -> bool:
    """Return True if the values answer the template's questions as the traced conversation did."""
    for number, convert, ask, answer in plan.conditions:
        value = values[number] if convert is None else convert(values[number])
        if bool(ask(value)) is not answer:
            return False
    return True


def print_values(plan: RenderPlan, values: Sequence[Any], markup: MarkupSearch) -> list[str] | None:
    """Return the printed string of each slot; None if the plan does not hold for a value.

    The plan holds for values free of markup that fulfil `untrimmed` and `must_be_verbatim`.
    """
    printed = [values[number] if convert is None else convert(values[number]) for number, convert in plan.slots]
    for slot in plan.must_be_verbatim:
        if printed[slot] != values[plan.slots[slot].number]:
            return None
    for slot in plan.untrimmed:
        value = printed[slot]
        if value and (value[0].isspace() or value[-1].isspace()):
            return None
    searched = [*printed, *[str(values[number]) for number in plan.unprinted]] if plan.unprinted else printed
    return None if markup.found_in("\0".join(searched)) else printed


def assemble(plan: RenderPlan, printed: Sequence[str]) -> Rendered:
    """Return the text and trained bounds for the slots' printed strings."""
    pieces = plan.pieces.copy()
    pieces[1::2] = printed
    ends = list(accumulate(map(len, printed), initial=0))
    return Rendered("".join(pieces), tuple([offset + ends[values] for values, offset in plan.bounds]))


def _split_pieces(pieces: Iterable[str | ValueRef]) -> tuple[list[str], list[ValueRef]]:
    """Return n + 1 template texts and the n references between the texts.

    Neighbouring references have an empty text in between: ("a", ref, ref) gives ["a", "", ""].
    """
    texts, refs = [""], []
    for piece in pieces:
        if isinstance(piece, str):
            texts[-1] += piece
        else:
            refs.append(piece)
            texts.append("")
    return texts, refs


def _converter(ref: ValueRef, to_json: Callable[..., str]) -> Convert | None:
    """Return one function for all operations of a reference; None without operations."""
    steps = [_step(op, to_json) for op in ref.ops]
    if len(steps) < 2:
        return next(iter(steps), None)
    return lambda value: reduce(lambda result, step: step(result), steps, value)


def _step(op: Op, to_json: Callable[..., str]) -> Convert:
    method, arguments = op
    if method == "tojson":
        return partial(to_json, **dict(arguments))
    # `str.strip` is faster than a methodcaller, and is called for every message.
    return str.strip if op == STRIP else methodcaller(method, *arguments)


def _is_partial_strip(op: Op) -> bool:
    """Return True for a strip of one end or of given characters, `lstrip()` for example."""
    return op[0] in ("strip", "lstrip", "rstrip") and op != STRIP


def _offsets(bounds: Iterable[int], texts: Sequence[str], printed: Sequence[str]) -> Iterator[Offset]:
    """Convert text offsets to plan offsets; skip offsets inside a value or between two values."""
    template_ends = [0, *accumulate(map(len, texts))]
    value_ends = [0, *accumulate(map(len, printed))]
    # The end of each template text within the rendered text.
    ends = [template + value for template, value in zip(template_ends[1:], value_ends, strict=True)]
    for bound in bounds:
        for number in range(bisect_left(ends, bound), len(texts)):
            characters = bound - value_ends[number]
            if characters < template_ends[number]:
                break
            if texts[number] or number == len(printed):
                yield Offset(number, characters)
                break
