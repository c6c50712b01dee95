"""Conversations longer than a pack -> examples that fit, by the policy for overflow.

With messages `[system, user 1, answer 1, user 2, answer 2]` and a capacity that holds the system
prompt and a single question with its answer:

    truncate  ->  [system, user 1, answer 1]
    split     ->  [system, user 1, answer 1], [system, user 2, answer 2]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from sftstream.config import Policy
from sftstream.records import Conversation, Example, Message, Refused

Encode = Callable[[Conversation], Example]
"""Renders and tokenizes a conversation; raises `Refused`."""


def shorten(conversation: Conversation, policy: Policy, encode: Encode) -> list[Example]:
    """Truncate or split a conversation by `policy.overflow`.

    Return examples of at most `policy.capacity` tokens, with a note of the policy. Raises `Refused`
    if the first answer does not fit.
    """
    if policy.overflow == "truncate":
        return [truncate(conversation, policy.capacity, encode)]
    return list(split(conversation, policy.capacity, encode))


def truncate(conversation: Conversation, capacity: int, encode: Encode) -> Example:
    """Return the example of the longest beginning within `capacity` with an answer at its end."""
    _, example = _longest_beginning(conversation, _ends(conversation.messages), capacity, encode)
    if example is None:
        raise Refused("nothing to train", "the part that fits into a pack holds no trained token")
    return _noted(example, "conversations truncated")


def split(conversation: Conversation, capacity: int, encode: Encode) -> Iterator[Example]:
    """Yield examples of parts, each beginning with the system prompt and a user's message.

    Parts are as long as fits. A part without a trained token gives no example.
    """
    system = tuple(message for message in conversation.messages if message.role == "system")
    rest = tuple(message for message in conversation.messages if message.role != "system")
    while any(message.role == "assistant" for message in rest):
        part = Conversation((*system, *rest), conversation.tools)
        used, example = _longest_beginning(part, _ends_before_user(part.messages), capacity, encode)
        rest = rest[used - len(system) :]
        if example is not None:
            yield _noted(example, "parts of split conversations")


def _longest_beginning(
    conversation: Conversation, ends: Sequence[int], capacity: int, encode: Encode
) -> tuple[int, Example | None]:
    """Return the largest count of messages in `ends` within `capacity` tokens, and the example.

    The example is None if no token of the beginning is trained. Raises `Refused` if no count fits.
    """
    for count in reversed(ends):
        try:
            example = encode(Conversation(conversation.messages[:count], conversation.tools))
        except Refused as refused:
            if refused.reason != "nothing to train":
                raise
            return count, None
        if len(example.tokens) <= capacity:
            return count, example
    raise Refused(
        "longer than capacity",
        f"the messages up to its first answer do not fit into {capacity} tokens; raise data.capacity",
    )


def _ends(messages: Sequence[Message]) -> list[int]:
    """Return counts of messages that end with an answer, `[2, 4]` for two answered questions."""
    return [count for count, message in enumerate(messages, 1) if message.role == "assistant"]


def _ends_before_user(messages: Sequence[Message]) -> list[int]:
    """Return counts of `_ends` before a user's message or at the end of the conversation."""
    return [count for count in _ends(messages) if count == len(messages) or messages[count].role == "user"]


def _noted(example: Example, note: str) -> Example:
    return msgspec.structs.replace(example, notes={**example.notes, note: 1})
