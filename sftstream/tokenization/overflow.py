"""Shorten conversations that do not fit into a pack: truncate or split.

Example: the messages are `[system, user 1, answer 1, user 2, answer 2]`, and a pack has room for
the system prompt and one question with its answer.

    truncate  ->  [system, user 1, answer 1]
    split     ->  [system, user 1, answer 1], [system, user 2, answer 2]
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from sftstream.config import Policy
from sftstream.records import Conversation, Example, Message, Refused
from sftstream.rendering.mask import trained_messages

Encode = Callable[[Conversation], Example]
"""Function that renders and tokenizes a conversation; raises `Refused`."""


def shorten(conversation: Conversation, policy: Policy, encode: Encode, borders: Sequence[int]) -> list[Example]:
    """Truncate or split a conversation, as `policy.overflow` says.

    `borders` has for each message the number of tokens up to its end, in one render of the whole
    conversation, and never falls. The borders are a guess of the cuts, each of which is proved by
    encoding the part: a template may print a part differently. Return examples of at most
    `policy.capacity` tokens, each with a note of the treatment. Raises `Refused` if the messages up
    to the first answer do not fit.
    """
    conversation = _marked(conversation, policy)
    if policy.overflow == "truncate":
        return [truncate(conversation, policy.capacity, encode, borders)]
    return list(split(conversation, policy.capacity, encode, borders))


def truncate(conversation: Conversation, capacity: int, encode: Encode, borders: Sequence[int]) -> Example:
    """Return the example of the longest beginning that ends with an answer and fits."""
    example = _longest_beginning(conversation, _ends(conversation.messages), borders, capacity, encode).example
    if example is None:
        raise Refused("nothing to train", "the part that fits into a pack holds no trained token")
    return _noted(example, "conversations truncated")


def split(conversation: Conversation, capacity: int, encode: Encode, borders: Sequence[int]) -> Iterator[Example]:
    """Yield an example for each part of the conversation.

    Each part begins with the system prompt and a message of the user, and is as long as the
    capacity allows. A part without a trained token yields no example.
    """
    system = [index for index, message in enumerate(conversation.messages) if message.role == "system"]
    rest = [index for index, message in enumerate(conversation.messages) if message.role != "system"]
    cut = excess = 0
    while any(conversation.messages[index].role == "assistant" for index in rest):
        indices = [*system, *rest]
        part = msgspec.structs.replace(conversation, messages=tuple(conversation.messages[i] for i in indices))
        own = [max(0, borders[index] - cut) for index in indices]
        beginning = _longest_beginning(part, _ends_before_user(part.messages), own, capacity, encode, excess)
        cut = borders[indices[beginning.messages - 1]]
        excess = beginning.excess
        rest = rest[beginning.messages - len(system) :]
        if beginning.example is not None:
            yield _noted(beginning.example, "parts of split conversations")


class _Beginning(NamedTuple):
    """The beginning of a conversation."""

    messages: int
    """Number of messages."""
    example: Example | None
    """None if no token of the messages is trained."""
    excess: int
    """Number of tokens of the example above the number that the borders tell."""


def _longest_beginning(
    conversation: Conversation,
    ends: Sequence[int],
    borders: Sequence[int],
    capacity: int,
    encode: Encode,
    excess: int = 0,
) -> _Beginning:
    """Return the longest beginning that fits, of a number of messages in `ends`.

    With `ends` [2, 4, 6], `borders` [., 20, ., 40, ., 60] and a capacity of 50, the guess is 4
    messages. They are encoded; if they have 55 tokens instead of 40, the next guess expects 15
    tokens in excess of each border. Raises `Refused` if no beginning fits.
    """
    expected = [borders[count - 1] for count in ends]
    proved, refuted, best = -1, len(ends), None
    while True:
        guess = min(bisect_right(expected, capacity - excess), refuted) - 1
        if guess <= proved:
            if best is not None:
                return best
            guess = 0
        if guess >= refuted:
            raise Refused(
                "longer than capacity",
                f"the messages up to its first answer do not fit into {capacity} tokens; raise data.capacity",
            )
        count = ends[guess]
        try:
            example = encode(msgspec.structs.replace(conversation, messages=conversation.messages[:count]))
        except Refused as refused:
            if refused.reason != "nothing to train":
                raise
            proved, best = guess, _Beginning(count, None, excess)
            continue
        excess = len(example.tokens) - expected[guess]
        if len(example.tokens) <= capacity:
            proved, best = guess, _Beginning(count, example, excess)
        else:
            refuted = guess


def _marked(conversation: Conversation, policy: Policy) -> Conversation:
    """Return the conversation with `train=False` in each message that the policy does not train.

    The policy would choose other messages in a part, such as the last message of each part.
    """
    trained = set(trained_messages(conversation.messages, policy))
    messages = [
        m if i in trained else msgspec.structs.replace(m, train=False) for i, m in enumerate(conversation.messages)
    ]
    return msgspec.structs.replace(conversation, messages=tuple(messages))


def _ends(messages: Sequence[Message]) -> list[int]:
    """Return each count of messages whose last message is an answer.

    `[user, assistant, user, assistant]` gives `[2, 4]`.
    """
    return [count for count, message in enumerate(messages, 1) if message.role == "assistant"]


def _ends_before_user(messages: Sequence[Message]) -> list[int]:
    """Return the counts of `_ends` before a message of the user or at the conversation's end."""
    return [count for count in _ends(messages) if count == len(messages) or messages[count].role == "user"]


def _noted(example: Example, note: str) -> Example:
    return msgspec.structs.replace(example, notes={**example.notes, note: 1})
