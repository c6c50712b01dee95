"""Render conversations of a known shape without running the template.

The first conversation of a shape takes the full path: the template renders the conversation with
and without markers, and the turns are found and verified. `RenderCache.learn` then traces the
template on symbolic values (`symbolic.py`), and keeps the plan (`render_plan.py`) if the plan
prints the same text with the same trained spans. `RenderCache.render` uses the plan for a later
conversation if four conditions hold:

- The conversation has the same shape (`shape.py`).
- Each condition of the template on a value has the same result as for the first conversation.
- No value contains markup.
- No value that is printed unstripped has white space at its ends, and no partial strip, such as
  `lstrip()`, changes a value.

Example. The template prints `<{{ m.role }}>{{ m.content | trim }}</s>` for each message:

    learn   user "hi", assistant "seven"         full path, then a plan is kept
    render  user "where? ", assistant "north"    "<user>where?</s><assistant>north</s>" by the plan
    render  user "where?", assistant "a </s>"    None: the answer contains the stop
    render  user "where?"                        None: another shape
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from sftstream.records import Conversation, Rendered
from sftstream.rendering.fast.known_tails import NOT_JSON, KnownTails
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
"""Largest number of stored shapes, and of template characters in all stored plans.

Above either limit, the oldest shape is removed with its plans.
"""

PLANS = 8
"""Largest number of plans of a shape; they differ in the answers to the template's questions."""

LONGEST = 64
"""Largest number of messages of a conversation with a plan.

Longer conversations rarely share a shape.
"""


class RenderCache:
    """The render plans of one template under one policy.

    `special` are the texts of the tokenizer's special tokens.
    """

    def __init__(self, template: ChatTemplate, turn_format: TurnFormat, special: Sequence[str]) -> None:
        self._traced = TracedTemplate(template)
        # The filter without the size limit of `bounds`: `max_row_bytes` limits the row already.
        self._to_json: Any = template.environment.filters["tojson"].__wrapped__
        self._markup = MarkupSearch({*special, *_turn_markup(turn_format), "<think", "</think", "ZqM"})
        self.plans: dict[Shape, list[RenderPlan]] = {}
        self.tails = KnownTails(self._traced, lambda: self._reads_inside, self._to_json)
        """The known tails of beginnings, for the search for turns."""
        self._characters = 0

    def render(self, conversation: Conversation) -> Rendered | None:
        """Return the text with the trained spans; None if no plan holds for the conversation."""
        try:
            shape, values = split_conversation(conversation, self._reads_inside)
            for plan in self.plans.get(shape, ()):
                if fulfils_conditions(plan.conditions, values):
                    printed = print_values(plan, values, self._markup)
                    return None if printed is None else assemble(plan, printed)
        except NOT_JSON:
            pass  # the full path refuses the conversation, with the template's own error
        return None

    def learn(self, conversation: Conversation, rendered: Rendered, turns: Sequence[Turn]) -> None:
        """Trace the template on the conversation; keep the plan if it prints exactly `rendered`."""
        if len(conversation.messages) > LONGEST:
            return
        try:
            shape, values = split_conversation(conversation, self._reads_inside)
            plans = self.plans.get(shape, [])
            trace = self._trace(conversation, values, turns) if len(plans) < PLANS else None
            plan = build_plan(trace, values, rendered, self._to_json, self._markup) if trace else None
        except NOT_JSON:
            return
        if plan is None or _leaves_out_a_name(plan, values, conversation):
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
        """Trace the render of the conversation, and each generation prompt rendered for its turns.

        The guards of the generation prompts belong to the trace, because a turn could start
        elsewhere if the answers were different. Return None if the start of a turn was proved for
        this conversation only, or if the template cannot be traced.
        """
        if any(turn.by_comparison for turn in turns):
            return None
        recorder, variables = Recorder(), conversation.variables
        messages, tools = symbolic_conversation(recorder, conversation, values, self._reads_inside)
        for turn in turns:
            earlier = messages[: turn.message]
            if turn.by_prompt and not self._traced.trace(recorder, earlier, tools, prompt=True, variables=variables):
                return None
        return self._traced.trace(recorder, messages, tools, variables=variables)


def _leaves_out_a_name(plan: RenderPlan, values: Sequence[Any], conversation: Conversation) -> bool:
    """Return True if a plan prints a call without the name of the tool: the name is in the id, and
    the id of another call may lack the name."""
    called = [call.name for message in conversation.messages for call in message.tool_calls]
    return any(values[number] in called for number in plan.unprinted)


def _turn_markup(turn_format: TurnFormat) -> set[str]:
    """Return the texts that the search for turns looks for: the role marker and the stops."""
    return {text for text in (turn_format.role_marker.strip(), *turn_format.stops, *turn_format.call_stops) if text}
