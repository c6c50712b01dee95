"""Find the conversation, or the part of a conversation, from which an example was made."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sftstream.records import Conversation, Example, Refused, Rendered
from sftstream.rendering.mask import trained_messages
from sftstream.rendering.renderer import up_to
from sftstream.tokenization.encoder import ChatEncoder
from sftstream.tokenization.overflow import shorten


class Part(NamedTuple):
    """An example with the conversation that was rendered for it."""

    example: Example
    conversation: Conversation
    rendered: Rendered


def parts_of(encoder: ChatEncoder, conversation: Conversation) -> list[Part]:
    """Return the examples of a conversation, each with its part of the conversation.

    Without `overflow = "split"` and `history = "per_turn"` there is a single part. Raises
    `Refused` like `ChatEncoder.encode_conversation`.
    """
    rendered = encoder.renderer.render_conversation(conversation)
    (examples,) = encoder.tokenize_all([rendered])
    if isinstance(examples, Refused):
        raise examples
    if len(rendered.texts) > 1:
        heads = [up_to(conversation, i) for i in trained_messages(conversation.messages, encoder.policy)]
        texts = [(head, text) for head in heads if (text := encoder.render(head)).bounds]
        return [Part(example, *pair) for example, pair in zip(examples, texts, strict=True)]
    (text,) = rendered.texts
    whole = encoder.tokenizer.encode(text)
    if len(examples) == 1 and np.array_equal(whole.tokens, examples[0].tokens):
        return [Part(examples[0], conversation, text)]
    return _shortened(encoder, conversation)


def _shortened(encoder: ChatEncoder, conversation: Conversation) -> list[Part]:
    """Return the parts of a conversation that is longer than a pack."""
    tried: list[Part] = []

    def encode(part: Conversation) -> Example:
        example = encoder.encode_part(part)
        tried.append(Part(example, part, encoder.render(part)))
        return example

    examples = shorten(conversation, encoder.policy, encode, encoder.borders(conversation))
    return [
        next(part for part in reversed(tried) if np.array_equal(part.example.tokens, example.tokens))
        for example in examples
    ]
