"""Build a render plan from a trace; print a conversation by filling its values into a plan.

Example. The template

    {% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}

prints the conversation of a user's "hi" and an assistant's "seven", values ["hi", "seven"], as

    <user>hi</s><assistant>seven</s>        trained: characters [23, 32), "seven</s>"

The plan made from the trace of the template is

    pieces   ["<user>", "", "</s><assistant>", "", "</s>"]
    slots    (Slot(0, str.strip), Slot(1, str.strip))
    bounds   (Offset(1, 21), Offset(2, 25))

The template's texts are at the even indices of `pieces`; the empty pieces at the indices 1 and 3
are filled with printed values. Offset(1, 21) means: after 1 printed value, "hi", and 21 characters
of the template, "<user>" and "</s><assistant>". In this conversation that is 2 + 21 = 23. Another
conversation of the same shape, values ["where? ", "north"], prints "where?" and "north":

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
"""Function from a value of the conversation to the printed string, for example `str.strip`."""


class Offset(NamedTuple):
    """An offset in the printed text, independent of the lengths of the printed values.

    The offset in a printed text is `template_characters` plus the lengths of the first
    `values_before` printed values.
    """

    values_before: int
    """Number of values printed before the offset."""
    template_characters: int
    """Number of the template's own characters printed before the offset."""


class Slot(NamedTuple):
    """A place in the text where a value is printed; a value printed twice has two slots."""

    number: int
    """Index into the conversation's values."""
    convert: Convert | None
    """Function applied to the value before it is printed: `str.strip`; None for no function."""


class Condition(NamedTuple):
    """A question about a value that must have the same answer as in the traced conversation."""

    number: int
    """Index into the conversation's values."""
    convert: Convert | None
    """Function applied to the value before the question; None for no function."""
    ask: Callable[[Any], Any]
    """The question, for example `methodcaller("startswith", "x")`."""
    answer: bool
    """The answer in the traced conversation."""


class RenderPlan(NamedTuple):
    """The pieces and the trained spans of all conversations with one shape and equal answers."""

    pieces: list[str]
    """The template's texts at even indices, empty strings for the printed values at odd indices."""
    slots: tuple[Slot, ...]
    """The slots in text order; slot `i` fills piece `2 * i + 1`."""
    untrimmed: tuple[int, ...]
    """Indices of slots that print a value without stripping it: `{{ m.content }}`.

    If a value in such a slot begins or ends with white space, the plan does not hold: the search
    for turns treats white space at the ends as template text, and would find other bounds.
    """
    must_be_verbatim: tuple[int, ...]
    """Indices of slots with a partial strip: `m.content.strip('xy')`, `m.content.lstrip()`.

    The plan holds only if the strip leaves the value unchanged.
    """
    unprinted: tuple[int, ...]
    """Indices of values without a slot: ids in most templates, earlier reasoning in some.

    Unprinted values are searched for markup too: the full path refuses a conversation with a
    special token in an id, so a plan must not print this conversation.
    """
    conditions: tuple[Condition, ...]
    """Questions that the values must answer as the traced conversation's values did."""
    bounds: tuple[Offset, ...]
    """Bounds of the trained spans, as in `Rendered.bounds`: start, end, start, end, ..."""


class MarkupSearch:
    """A fast search for markup in the values of a conversation.

    Markup is any text that the search for turns looks for: a special token, a stop, the role
    marker. A value that contains markup could be mistaken for template text. Most values do not
    even contain a first character of markup, such as `<`, and need no further search.
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
        """Return a pattern of the first two characters of the markup that begins with `first`."""
        seconds = {re.escape(text[1:2]) for text in self._markup if text[0] == first}
        return re.compile(f"{re.escape(first)}(?:{'|'.join(sorted(seconds))})")

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """A pattern of all markup, compiled at first use, since compilation is slow."""
        return re.compile("|".join(map(re.escape, self._markup)))


def build_plan(
    trace: Trace, values: Sequence[Any], rendered: Rendered, to_json: Callable[..., str], markup: MarkupSearch
) -> RenderPlan | None:
    """Return the plan of the traced conversation; None if the plan does not print `rendered`."""
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
        conditions=conditions_of(trace, to_json),
        bounds=(),
    )
    printed = print_values(plan, values, markup)
    if printed is None:
        return None
    plan = plan._replace(bounds=tuple(_offsets(rendered.bounds, texts, printed)))
    return plan if assemble(plan, printed) == rendered else None


def conditions_of(trace: Trace, to_json: Callable[..., str]) -> tuple[Condition, ...]:
    """Return the questions of a traced template about the values, with their answers."""
    return tuple(
        Condition(
            guard.ref.number,
            _converter(guard.ref, to_json),
            methodcaller(guard.method, *guard.arguments),
            guard.answer,
        )
        for guard in trace.guards
    )


def fulfils_conditions(conditions: Iterable[Condition], values: Sequence[Any]) -> bool:
    """Return True if the values answer the template's questions as the traced conversation did."""
    for number, convert, ask, answer in conditions:
        value = values[number] if convert is None else convert(values[number])
        if bool(ask(value)) is not answer:
            return False
    return True


def print_values(plan: RenderPlan, values: Sequence[Any], markup: MarkupSearch) -> list[str] | None:
    """Return the printed string of each slot; None if the plan does not hold for the values.

    The plan holds if no value contains markup, no value of an `untrimmed` slot begins or ends with
    white space, and every value of a `must_be_verbatim` slot is printed unchanged.
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
    """Return the text and the trained bounds; `printed` holds the printed string of each slot."""
    pieces = plan.pieces.copy()
    pieces[1::2] = printed
    ends = list(accumulate(map(len, printed), initial=0))
    return Rendered("".join(pieces), tuple([offset + ends[values] for values, offset in plan.bounds]))


def _split_pieces(pieces: Iterable[str | ValueRef]) -> tuple[list[str], list[ValueRef]]:
    """Return the template's texts, and the references to values between the texts.

    There is one more text than references. The result for ("a", ref 1, ref 2) is (["a", "", ""],
    [ref 1, ref 2]), with an empty text between the references and at the end.
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
    """Return one function that applies all operations of a reference; None without operations."""
    steps = [_step(op, to_json) for op in ref.ops]
    if len(steps) < 2:
        return next(iter(steps), None)
    return lambda value: reduce(lambda result, step: step(result), steps, value)


def _step(op: Op, to_json: Callable[..., str]) -> Convert:
    method, arguments = op
    if method == "tojson":
        return partial(to_json, **dict(arguments))
    # Called for every message; `str.strip` is faster than `methodcaller("strip", None)`.
    return str.strip if op == STRIP else methodcaller(method, *arguments)


def _is_partial_strip(op: Op) -> bool:
    """Return True for a strip of one end only or of given characters: `lstrip()`, `strip("x")`."""
    return op[0] in ("strip", "lstrip", "rstrip") and op != STRIP


def _offsets(bounds: Iterable[int], texts: Sequence[str], printed: Sequence[str]) -> Iterator[Offset]:
    """Yield the `Offset` of each bound.

    For the texts ["<user>", "</s>"] and the printed value ["hi"], bound 8 (after "hi") is
    Offset(1, 6), and bound 12 (the end) is Offset(1, 10). A bound inside a printed value, or
    between two adjacent values, is left out; `build_plan` then returns None.
    """
    template_ends = [0, *accumulate(map(len, texts))]
    value_ends = [0, *accumulate(map(len, printed))]
    # Offset in the rendered text at which each template text ends.
    ends = [template + value for template, value in zip(template_ends[1:], value_ends, strict=True)]
    for bound in bounds:
        for number in range(bisect_left(ends, bound), len(texts)):
            characters = bound - value_ends[number]
            if characters < template_ends[number]:
                break
            if texts[number] or number == len(printed):
                yield Offset(number, characters)
                break
