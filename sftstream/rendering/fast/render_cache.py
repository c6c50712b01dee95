"""Render conversations of a known shape without running the template.

The first conversation of a shape goes the full path: rendered, marked, turns found and verified.
`RenderCache.learn` then traces the template on symbolic values (`symbolic.py`) and keeps a plan
(`render_plan.py`, with a worked example) if the plan reproduces the text and the trained spans.
`RenderCache.render` uses the plan for later conversations of equal shape (`shape.py`) that answer
the template's questions alike and hold no text that could be taken for a part of the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from sftstream.records import Conversation, Rendered
from sftstream.rendering.fast.render_plan import (
    MarkupSearch,
    RenderPlan,
    assemble,
    build_plan,
    fulfils_conditions,
    print_values,
)
from sftstream.rendering.fast.shape import (
    ReadsInside,
    Shape,
    probe_reads_inside,
    split_conversation,
    symbolic_conversation,
)
from sftstream.rendering.fast.symbolic import Recorder, Trace, TracedTemplate
from sftstream.rendering.template import ChatTemplate
from sftstream.rendering.turn_format import TurnFormat
from sftstream.rendering.turns import Turn

SHAPES, CHARACTERS = 4096, 16 << 20
"""Limits on the shapes kept and on their plans' template characters; the oldest shapes go first."""

PLANS = 8
"""Most plans of a shape, one for each set of answers to the template's questions."""

NOT_JSON = TypeError, ValueError, RecursionError
"""Errors for values without a JSON form or an exact key."""


class RenderCache:
    """The render plans of a template under a policy.

    `special` are the texts of the tokenizer's special tokens.
    """

    def __init__(self, template: ChatTemplate, turn_format: TurnFormat, special: Sequence[str]) -> None:
        self._traced = TracedTemplate(template)
        self._to_json: Any = template.environment.filters["tojson"].__wrapped__  # rows print no more than they hold
        self._markup = MarkupSearch({*special, *_turn_markup(turn_format), "<think", "</think", "ZqM"})
        self.plans: dict[Shape, list[RenderPlan]] = {}
        self._characters = 0

    def render(self, conversation: Conversation) -> Rendered | None:
        """Return the text and the trained spans; None if no plan holds."""
        try:
            shape, values = split_conversation(conversation, self._reads_inside)
            for plan in self.plans.get(shape, ()):
                if fulfils_conditions(plan, values):
                    printed = print_values(plan, values, self._markup)
                    return None if printed is None else assemble(plan, printed)
        except NOT_JSON:
            pass  # the full path refuses with the template's own message
        return None

    def learn(self, conversation: Conversation, rendered: Rendered, turns: Sequence[Turn]) -> None:
        """Keep a plan of the conversation if one can be traced and reproduces `rendered`."""
        try:
            shape, values = split_conversation(conversation, self._reads_inside)
            plans = self.plans.get(shape, [])
            trace = self._trace(conversation, values, turns) if len(plans) < PLANS else None
            plan = build_plan(trace, values, rendered, self._to_json, self._markup) if trace else None
        except NOT_JSON:
            return
        if plan is None:
            return
        self.plans[shape] = [*plans, plan]
        self._characters += sum(map(len, plan.pieces))
        while len(self.plans) > SHAPES or self._characters > CHARACTERS:
            for oldest in self.plans.pop(next(iter(self.plans))):
                self._characters -= sum(map(len, oldest.pieces))

    @cached_property
    def _reads_inside(self) -> ReadsInside:
        return probe_reads_inside(self._traced)

    def _trace(self, conversation: Conversation, values: Sequence[Any], turns: Sequence[Turn]) -> Trace | None:
        """Trace the render of the conversation and each prompt that the search for turns rendered.

        The guards of the prompts count too: other answers could move a turn's start.
        """
        if any(turn.by_comparison for turn in turns):
            return None
        recorder = Recorder()
        messages, tools = symbolic_conversation(recorder, conversation, values, self._reads_inside)
        for turn in turns:
            if turn.by_prompt and self._traced.trace(recorder, messages[: turn.message], tools, prompt=True) is None:
                return None
        return self._traced.trace(recorder, messages, tools)


def _turn_markup(turn_format: TurnFormat) -> set[str]:
    """Return the role marker and the stops, the texts that the search for turns looks for."""
    return {text for text in (turn_format.role_marker.strip(), *turn_format.stops, *turn_format.call_stops) if text}
