"""Which characters of a rendered conversation are trained, by the run's policy, and the proof that they are the right ones."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from sftstream.config import Policy
from sftstream.excerpt import excerpt
from sftstream.records import Message, Refused, Rendered, Span
from sftstream.rendering.markers import Located, Payload
from sftstream.rendering.turns import Turn, TurnFormat


def rendered(
    messages: Sequence[Message],
    located: Located,
    turns: Sequence[Turn],
    turn_format: TurnFormat,
    policy: Policy,
    control: re.Pattern[str],
) -> Rendered:
    """The text with its trained spans; raises `Refused` where a span would hold what nobody trained said.

    Special tokens that somebody typed are listed in `typed`: they are words.
    """
    by_message = {turn.message: turn for turn in turns}
    spans: list[Span] = []
    for index in _trained_messages(messages, policy):
        turn = by_message.get(index)
        wanted = _of_turn(turn, policy) if turn else _of_other(index, located, turn_format)
        _require_own(wanted, index, located.payloads)
        spans += wanted
    spans = sorted(span for span in spans if span.start < span.end)
    for before, after in itertools.pairwise(spans):
        if after.start < before.end:
            raise Refused("messages out of order", f"spans {tuple(before)} and {tuple(after)} overlap")
    return Rendered(located.text, tuple(itertools.chain.from_iterable(spans)), tuple(_typed(located, control)))


def require_whole(
    messages: Sequence[Message], located: Located, policy: Policy, *, prints_reasoning: bool, prints_thoughts: bool
) -> None:
    """Refuses where the template left something out that cannot be missed.

    A template that forgets the thoughts of earlier turns does so at inference as well: that is `policy.history`'s affair.
    """
    for message, kind, words in located.dropped:
        known = prints_reasoning if messages[message].reasoning else prints_thoughts
        if kind != "reasoning" or not known:
            raise Refused(f"template drops {_NAMES[kind]}", f"message {message}: {excerpt(words)} is not printed")
        if policy.history == "error":
            raise Refused("history rewritten", f"message {message}: its reasoning {excerpt(words)} is not printed")


_NAMES = {"content": "text", "call": "a tool call", "reasoning": "reasoning"}


def _trained_messages(messages: Sequence[Message], policy: Policy) -> list[int]:
    trained = [index for index, message in enumerate(messages) if _is_trained(message, policy)]
    return trained[-1:] if policy.train_turns == "last" else trained


def _is_trained(message: Message, policy: Policy) -> bool:
    return message.train is not False and ("all" in policy.train_on or message.role in policy.train_on)


def _of_turn(turn: Turn, policy: Policy) -> list[Span]:
    """An assistant's turn without the parts that the policy leaves out, each with what is printed around it."""
    start, end = turn.span
    kinds = {kind: [p for p in turn.payloads if p.kind == kind] for kind in ("reasoning", "content", "call")}
    if turn.payloads and not (turn.span.start <= turn.payloads[0].start and turn.payloads[-1].end <= turn.span.end):
        raise Refused("payload outside its turn", f"message {turn.message} is not wholly inside its turn")
    if not policy.train_reasoning and kinds["reasoning"]:
        start = min((p.start for p in kinds["content"] + kinds["call"]), default=end)
    if not policy.train_tool_calls and kinds["call"]:
        end = max((p.end for p in kinds["reasoning"] + kinds["content"]), default=start)
    return [Span(start, max(start, end))]


def _of_other(index: int, located: Located, turn_format: TurnFormat) -> list[Span]:
    """Another role's words, each place where they are printed, with the stop token that follows at once."""
    result = []
    for payload in located.payloads:
        if payload.message == index:
            rest = located.text[payload.end :]
            stop = next((stop for stop in turn_format.stops if rest.startswith(stop)), "")
            result.append(Span(payload.start, payload.end + len(stop)))
    return result[:1]


def _require_own(spans: Iterable[Span], index: int, payloads: Iterable[Payload]) -> None:
    for payload in payloads:
        if payload.message != index and any(s.start < payload.end and payload.start < s.end for s in spans):
            raise Refused("foreign text in span", f"message {payload.message} is printed inside message {index}")


def _typed(located: Located, control: re.Pattern[str]) -> Iterable[Span]:
    """Special tokens' text inside somebody's words."""
    for payload in located.payloads:
        for found in control.finditer(located.text, payload.start, payload.end):
            yield Span(found.start(), found.end())
