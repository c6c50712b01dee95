"""Choose the trained spans of a rendered conversation.

The policy decides which messages are trained, and whether the reasoning and the tool calls of a
turn are trained. A conversation is refused if a span would contain text of another message.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence

from sftstream.config import Policy
from sftstream.excerpt import excerpt
from sftstream.records import Message, Refused, Rendered, Span
from sftstream.rendering.locate import Located, require_once
from sftstream.rendering.payloads import PayloadIndex
from sftstream.rendering.turn_format import TurnFormat
from sftstream.rendering.turns import Turn


def rendered(
    messages: Sequence[Message],
    located: Located,
    turns: Sequence[Turn],
    turn_format: TurnFormat,
    policy: Policy,
    control: re.Pattern[str],
) -> Rendered:
    """Return the text with the spans that the policy trains.

    `control` matches the text of any special token. A match inside a payload is text of the
    conversation, not of the template; `Rendered.typed` lists such matches, so that the tokenizer
    treats them as ordinary text. Raises `Refused` if a span contains text of another message, or
    the same text twice, if two spans overlap, or if a payload lies outside its turn.
    """
    by_message = {turn.message: turn for turn in turns}
    payloads = located.index
    spans: list[Span] = []
    for index in trained_messages(messages, policy):
        turn = by_message.get(index)
        message_spans = (
            _turn_spans(turn, policy)
            if turn
            else _payload_spans(index, messages[index], located.text, payloads, turn_format)
        )
        _refuse_foreign_text(message_spans, index, payloads)
        for span in message_spans:
            require_once(located, index, span)
        spans += message_spans
    spans = sorted([span for span in spans if span.start < span.end])
    for before, after in itertools.pairwise(spans):
        if after.start < before.end:
            raise Refused("messages out of order", f"the trained characters {tuple(before)} and {tuple(after)} overlap")
    return Rendered(located.text, tuple(itertools.chain.from_iterable(spans)), tuple(_typed(located, control)))


def require_whole(located: Located, policy: Policy, printed_last: Callable[[Sequence[int]], bool]) -> None:
    """Raise `Refused` if the template left out a payload.

    A template may leave out the reasoning of earlier messages, as at inference, unless
    `policy.history` is "error". `printed_last` tells whether the template prints the reasoning of
    messages, given by index, while each message is the last.
    """
    silent = not printed_last([message for message, kind, _ in located.dropped if kind == "reasoning"])
    for message, kind, text in located.dropped:
        if kind != "reasoning" or silent:
            raise Refused(
                f"template drops {_NAMES[kind]}",
                f"message {message}: {excerpt(text)} is not printed; use a template that prints {_NAMES[kind]}",
            )
        if policy.history == "error":
            raise Refused(
                "history rewritten",
                f"message {message}: its reasoning {excerpt(text)} is not printed; "
                'set history = "per_turn" or "as_rendered"',
            )


_NAMES = {"content": "text", "call": "a tool call", "reasoning": "reasoning"}


def trained_messages(messages: Sequence[Message], policy: Policy) -> list[int]:
    """Return the indices of the messages that the policy trains."""
    roles, every_role = policy.train_on, "all" in policy.train_on
    trained = [i for i, m in enumerate(messages) if m.train is not False and (every_role or m.role in roles)]
    return trained[-1:] if policy.train_turns == "last" else trained


def _turn_spans(turn: Turn, policy: Policy) -> list[Span]:
    """Return the trained spans of an assistant turn.

    The policy may leave out reasoning, tool calls or both. Template text between a left-out payload
    and a trained payload is left out too:

        turn                             <think>hm</think>seven<call>add</call></s>
        without reasoning                seven<call>add</call></s>
        without calls                    <think>hm</think>seven
        without reasoning and calls      seven

    Raises `Refused` if a payload lies outside the turn, or if a left-out reasoning follows another
    payload: the template text between them closes the first and opens the second, and the border is
    unknown.
    """
    if turn.payloads and not (turn.span.start <= turn.payloads[0].start and turn.payloads[-1].end <= turn.span.end):
        raise Refused("payload outside its turn", f"message {turn.message} is not wholly inside its turn")
    if policy.train_reasoning and policy.train_tool_calls:
        return [turn.span]
    left_out = {"reasoning": not policy.train_reasoning, "call": not policy.train_tool_calls}
    runs = [(out, list(run)) for out, run in itertools.groupby(turn.payloads, lambda p: left_out.get(p.kind, False))]
    if not runs:
        return [turn.span]
    if any(out and number and run[0].kind == "reasoning" for number, (out, run) in enumerate(runs)):
        raise Refused(
            "reasoning after other text",
            f"message {turn.message}: the template prints reasoning after a call or a text, so the reasoning cannot be "
            "left out; set train_reasoning = true",
        )
    return [
        Span(
            turn.span.start if number == 0 else run[0].start,
            turn.span.end if number == len(runs) - 1 else run[-1].end,
        )
        for number, (out, run) in enumerate(runs)
        if not out
    ]


def _payload_spans(
    index: int, message: Message, text: str, payloads: PayloadIndex, turn_format: TurnFormat
) -> list[Span]:
    """Return the span of a message without a turn: the first payload and the stop after it.

    The stop must follow the payload directly, or after the white space that ends the content.
    Otherwise the span is the payload alone. A message without printed text has no span.
    """
    payload = next(iter(payloads.of(index)), None)
    if payload is None or payload.start == payload.end:
        return []
    content = message.content or ""
    for space in dict.fromkeys(("", content[len(content.rstrip()) :])):
        for stop in turn_format.stops:
            if text.startswith(space + stop, payload.end):
                return [Span(payload.start, payload.end + len(space + stop))]
    return [Span(payload.start, payload.end)]


def _refuse_foreign_text(spans: Iterable[Span], index: int, payloads: PayloadIndex) -> None:
    """Raise `Refused` if a payload of another message overlaps a span of message `index`."""
    for span in spans:
        if payload := payloads.foreign(index, span):
            raise Refused("foreign text in span", f"message {payload.message} is printed inside message {index}")


def _typed(located: Located, control: re.Pattern[str]) -> Iterable[Span]:
    """Yield the ranges inside payloads that spell a special token."""
    if not control.search("\0".join([located.text[payload.start : payload.end] for payload in located.payloads])):
        return
    for payload in located.payloads:
        for match in control.finditer(located.text, payload.start, payload.end):
            yield Span(match.start(), match.end())
