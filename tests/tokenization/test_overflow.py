"""Over-long conversations are truncated or split at answers; here each message takes ten tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sftstream.config import Policy
from sftstream.records import Conversation, Example, Message, Refused
from sftstream.tokenization.overflow import shorten

SYSTEM = Message("system", "0")
TALK = (Message("user", "1"), Message("assistant", "2"), Message("user", "3"), Message("assistant", "4"))


def encode(conversation: Conversation) -> Example:
    """Return an example with ten tokens a message, all equal to the message's number."""
    if not any(message.role == "assistant" and message.train is not False for message in conversation.messages):
        raise Refused("nothing to train", "")
    ids = np.array([int(message.content or 0) for message in conversation.messages], np.int32).repeat(10)
    return Example(ids, np.ones(len(ids), bool), len(ids) - 1)


def messages(overflow: str, capacity: int, *talk: Message, **settings: Any) -> list[list[int]]:
    """Return the numbers of the messages in each example."""
    policy = Policy(overflow=overflow, capacity=capacity, **settings)
    return [example.tokens[::10].tolist() for example in shorten(Conversation(talk), policy, encode, borders(talk))]


def borders(talk: Sequence[Message]) -> list[int]:
    return [10 * (index + 1) for index in range(len(talk))]


def test_a_conversation_is_truncated_after_the_last_answer_that_fits() -> None:
    assert messages("truncate", 50, SYSTEM, *TALK) == [[0, 1, 2, 3, 4]]
    assert messages("truncate", 49, SYSTEM, *TALK) == [[0, 1, 2]]
    assert messages("truncate", 30, SYSTEM, *TALK) == [[0, 1, 2]]


def test_each_part_of_a_split_conversation_begins_with_the_system_prompt() -> None:
    assert messages("split", 49, SYSTEM, *TALK) == [[0, 1, 2], [0, 3, 4]]
    assert messages("split", 49, SYSTEM, *TALK, Message("user", "5")) == [[0, 1, 2], [0, 3, 4]]


def test_a_conversation_is_split_only_before_a_users_message() -> None:
    calling = (TALK[0], TALK[1], Message("tool", "7"), TALK[1], *TALK[2:])
    assert messages("split", 50, *calling) == [[1, 2, 7, 2], [3, 4]]
    assert messages("truncate", 39, *calling) == [[1, 2]]


def test_a_part_without_a_trained_token_gives_no_example() -> None:
    untrained = Message("assistant", "2", train=False)
    assert messages("split", 20, TALK[0], untrained, *TALK[2:]) == [[3, 4]]
    with pytest.raises(Refused, match="nothing to train: the part that fits into a pack holds no trained token"):
        messages("truncate", 20, TALK[0], untrained, *TALK[2:])


def test_of_a_split_conversation_only_the_last_answer_is_trained_if_the_policy_trains_the_last() -> None:
    assert messages("split", 20, *TALK, train_turns="last") == [[3, 4]]


def test_a_truncated_conversation_without_its_last_answer_has_nothing_to_train_if_the_policy_trains_the_last() -> None:
    with pytest.raises(Refused, match="nothing to train: the part that fits into a pack holds no trained token"):
        messages("truncate", 20, *TALK, train_turns="last")


@pytest.mark.parametrize("overflow", ["truncate", "split"])
def test_a_conversation_is_refused_if_its_first_answer_does_not_fit(overflow: str) -> None:
    with pytest.raises(Refused, match="longer than capacity: the messages up to its first answer do not fit into 29"):
        messages(overflow, 29, SYSTEM, *TALK)


def test_the_policy_is_noted_in_each_example() -> None:
    for overflow, note in (("truncate", "conversations truncated"), ("split", "parts of split conversations")):
        examples = shorten(
            Conversation((SYSTEM, *TALK)), Policy(overflow=overflow, capacity=30), encode, borders((SYSTEM, *TALK))
        )
        assert all(example.notes == {note: 1} for example in examples)


@pytest.mark.parametrize("wrong", [0, 15, -15, 400])
@pytest.mark.parametrize("overflow", ["truncate", "split"])
def test_wrong_borders_cost_time_and_change_no_cut(overflow: str, wrong: int) -> None:
    """A template may print a part with other text than the whole: each cut is proved by the part's own tokens."""
    talk = (SYSTEM, *(Message(("user", "assistant")[n % 2], str(n)) for n in range(200)))
    tried: list[int] = []

    def counting(conversation: Conversation) -> Example:
        tried.append(len(conversation.messages))
        return encode(conversation)

    policy = Policy(overflow=overflow, capacity=570)
    guessed = [max(0, border + wrong) for border in borders(talk)]
    examples = shorten(Conversation(talk), policy, counting, guessed)
    lengths = [570] * 3 + [330] if overflow == "split" else [570]
    assert [len(example.tokens) for example in examples] == lengths
    assert len(tried) <= len(lengths) + (3 if wrong else 1)
