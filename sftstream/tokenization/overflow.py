"""Shorten conversations that do not fit into a pack: truncate or split.

Example: the messages are `[system, user 1, answer 1, user 2, answer 2]`, and a pack has room for
the system prompt and one question with its answer.

    truncate  ->  [system, user 1, answer 1]
    split     ->  [system, user 1, answer 1], [system, user 2, answer 2]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from sftstream.config import Policy
from sftstream.records import Conversation, Example, Message, Refused

Encode = Callable[[Conversation], Example]
"""Function that renders and tokenizes a conversation; raises `Refused`."""


def shorten(conversation: Conversation, policy: Policy, encode: Encode) -> list[Example]:
    """Truncate or split a conversation, as `policy.overflow` says.

    Return examples of at most `policy.capacity` tokens, each with a note of the treatment. Raises
    `Refused` if the messages up to the first answer do not fit.
    """
    if policy.overflow == "truncate":
        return [truncate(conversation, policy.capacity, encode)]
    return list(split(conversation, policy.capacity, encode))


def truncate(conversation: Conversation, capacity: int, encode: Encode) -> Example:
    """Return the example of the longest beginning that ends with an answer and fits."""
    _, example = _longest_beginning(conversation, _ends(conversation.messages), capacity, encode)
    if example is None:
        raise Refused("nothing to train", "the part that fits into a pack holds no trained token")
    return _noted(example, "conversations truncated")


def split(conversation: Conversation, capacity: int, encode: Encode) -> Iterator[Example]:
    """Yield an example for each part of the conversation.

    Each part begins with the system prompt and a message of the user, and is as long as the
    capacity allows. A part without a trained token yields no example.
    """
    system = tuple(message for message in conversation.messages if message.role == "system")
    rest = tuple(message for message in conversation.messages if message.role != "system")
    while any(message.role == "assistant" for message in rest):
        part = msgspec.structs.replace(conversation, messages=(*system, *rest))
        used, example = _longest_beginning(part, _ends_before_user(part.messages), capacity, encode)
        rest = rest[used - len(system) :]
        if example is not None:
            yield _noted(example, "parts of split conversations")


def _longest_beginning(
    conversation: Conversation, ends: Sequence[int], capacity: int, encode: Encode
) -> tuple[int, Example | None]:
    """Return the largest count in `ends` whose messages fit, and the example of these messages.

    With `ends` [2, 4], first try the first 4 messages, then the first 2. The example is None if no
    token of the messages is trained. Raises `Refused` if no count fits.
    """
    for count in reversed(ends):
        try:
            example = encode(msgspec.structs.replace(conversation, messages=conversation.messages[:count]))
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
    """Return each count of messages whose last message is an answer.

    `[user, assistant, user, assistant]` gives `[2, 4]`.
    """
    return [count for count, message in enumerate(messages, 1) if message.role == "assistant"]


def _ends_before_user(messages: Sequence[Message]) -> list[int]:
    """Return the counts of `_ends` before a message of the user or at the conversation's end."""
    return [count for count in _ends(messages) if count == len(messages) or messages[count].role == "user"]


def _noted(example: Example, note: str) -> Example:
    return msgspec.structs.replace(example, notes={**example.notes, note: 1})
