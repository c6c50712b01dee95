"""Long conversations: a bounded number of renders finds what renders of every beginning would find."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import judge
import msgspec
import pytest

from sftstream import ChatEncoder, Refused
from sftstream.formats import parse_row
from sftstream.records import Conversation
from sftstream.rendering import overlap
from sftstream.rendering.mask import trained_messages
from sftstream.rendering.shared_renders import representatives
from sftstream.rendering.template import template_message

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.SystemRandom().randrange(10**6))
CODES = ("u a", "u ar", "u ac t a", "u ac t ac t a", "u ai", "u a a", "u a-", "s u a", "u arc t ar", "u a~")
LOOP = (
    "{# <|user|> <|assistant|> <|tool|> <|call|> #}{% for m in messages %}<|{{ m.role }}|>"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Counting(ChatEncoder):
    """An encoder that counts the messages rendered by the template."""

    messages = 0

    def count(self) -> Counting:
        compiled = self.template.compiled
        plain = compiled.render

        def render(**context: Any) -> str:
            self.messages += len(context["messages"])
            return str(plain(**context))

        compiled.render = render
        return self


def talk(codes: str, count: int) -> Conversation:
    messages, tools = judge.conversation(" ".join([codes] * count))
    return parse_row({"messages": messages, "tools": tools})


@pytest.mark.parametrize("codes", ["u a", "u ac t a", "u ac t ac t ac t a"])
@pytest.mark.parametrize("prompt", ["<|assistant|>", "<|assistant|><think></think>", "<|assistant|>Well. "])
def test_turns_are_found_with_three_renders_however_long_the_conversation(codes: str, prompt: str) -> None:
    template = LOOP.replace("%}<|assistant|>{%", f"%}}{prompt}{{%")
    plain = judge.open_encoder(template)
    encoder = Counting(plain.tokenizer.hf, template, capacity=2**24).count()
    long = talk(codes, 50)
    encoder.renderer.render_whole(long)
    assert encoder.messages <= 2.2 * len(long.messages)


COUNTING = (
    "{# <|user|> <|assistant|> <|tool|> <|end|> #}{% set n = namespace(x=0) %}{% for m in messages %}<|{{ m.role }}|>"
    "{% for c in m.tool_calls or [] %}{% set n.x = n.x + 1 %}<call>{{ n.x }} {{ c.function.name }}{{ c.id }}"
    "{{ c.function.arguments | tojson }}{% endfor %}"
    "{{ m.content }}{{ ' id ' + m.tool_call_id if m.tool_call_id }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think></think>{% endif %}"
)
"""A template that prints a running number after each header of a call, and an id after each result."""


def test_numbers_and_ids_around_a_header_cost_no_further_renders() -> None:
    plain = judge.open_encoder(COUNTING)
    encoder = Counting(plain.tokenizer.hf, COUNTING, capacity=2**24).count()
    long = talk("u ac t a", 50)
    rendered, _ = encoder.renderer.render_whole(long)
    said = [rendered.text[span.start : span.end] for span in rendered.spans]
    assert said[:2] == ['<call>1 get_weathercallid1a0{"city": "wa01aq"}<|end|>', "wa03cq<|end|>"]
    assert len(said) == 100
    assert encoder.messages <= 2.2 * len(long.messages)


LAST_DIFFERS = LOOP.replace(
    "|>{% for c", "|>{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{% for c"
)
"""A template that prints an empty thought before the last answer alone, as Qwen 3 does."""


@pytest.mark.parametrize("codes", ["u a", "u ac t a"])
def test_a_header_of_the_last_turn_alone_costs_a_render_of_a_short_beginning(codes: str) -> None:
    plain = judge.open_encoder(LAST_DIFFERS)
    encoder = Counting(plain.tokenizer.hf, LAST_DIFFERS, capacity=2**24).count()
    long = talk(codes, 50)
    rendered, _ = encoder.renderer.render_whole(long)
    assert rendered.text[rendered.spans[-1].start :] == f"<think></think>wa{len(long.messages) - 1:02d}cq<|end|>"
    assert encoder.messages <= 2.2 * len(long.messages)


@pytest.mark.parametrize(
    ("left", "right", "alike"),
    [
        ("", "", True),
        ("id abc123</r>", "id xyz9</r>", True),
        ("id abc</r>", "id xyz</r>", False),
        ("id 1</r>", "id 1</s>", False),
        ("id 1</r>", "id 1 2</r>", False),
        ("id 1</r>", "id one</r>", False),
    ],
)
def test_texts_are_alike_if_only_words_with_digits_differ(left: str, right: str, alike: bool) -> None:
    assert overlap.alike(left, right) is alike


def dialogues(draw: random.Random, count: int) -> Iterator[tuple[str, Conversation]]:
    for _ in range(count):
        codes = " ".join(draw.choices(CODES, k=draw.randint(2, 9)))
        messages, tools = judge.conversation(codes)
        yield codes, parse_row({"messages": messages, "tools": tools})


def verdict_by_every_turn(encoder: ChatEncoder, conversation: Conversation) -> str:
    """Compare every trained message, without a choice of some."""
    whole = encoder.render(conversation).text
    messages = conversation.messages
    for index in trained_messages(messages, encoder.policy):
        if index == len(messages) - 1:
            continue
        before = [msgspec.structs.replace(message, train=False) for message in messages[:index]]
        part = encoder.render(Conversation((*before, messages[index]), conversation.tools))
        if not whole.startswith(part.text[: max(part.bounds, default=0)]):
            return "history rewritten"
    return "printed alike"


def verdict(encoder: ChatEncoder, conversation: Conversation) -> str:
    try:
        encoder.renderer.render_conversation(conversation)
    except Refused as refused:
        return refused.reason
    return "printed alike"


@pytest.mark.realdata
def test_some_turns_tell_whether_any_turn_is_rewritten(realdata: Path) -> None:
    print(f"SFTSTREAM_SEED={SEED}")
    draw, verdicts = random.Random(SEED), []
    paths = [path for folder in ("templates", "templates_more") for path in sorted((realdata / folder).glob("*.jinja"))]
    chosen = draw.sample(paths, int(os.environ.get("SFTSTREAM_DRAWS") or 8))
    templates = {"loop": LOOP} | {path.stem: path.read_text(encoding="utf-8") for path in chosen}
    for name, template in templates.items():
        encoder = judge.open_encoder(template, history="error")
        for codes, conversation in dialogues(draw, 4):
            try:
                expected = verdict_by_every_turn(encoder, conversation)
            except Refused as refused:
                expected = refused.reason
            assert verdict(encoder, conversation) == expected, f"SFTSTREAM_SEED={SEED} {name} [{codes}]"
            verdicts.append(expected)
    assert "printed alike" in verdicts


def test_few_messages_stand_for_all_of_a_long_conversation() -> None:
    messages = [template_message(message) for message in talk("u a u ac t a", 100).messages]
    trained = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = representatives(messages, trained)
    assert len(chosen) <= 16
    assert {1, 3, 5, trained[-1]} <= set(chosen)
    assert representatives(messages[:4], [1, 3]) == [1, 3]


@pytest.mark.parametrize("overflow", ["truncate", "split"])
def test_a_cut_costs_a_render_of_the_whole_and_of_each_part(overflow: str) -> None:
    plain = judge.open_encoder(LOOP)
    long = talk("u a", 100)
    length = len(plain.encode_conversation(long)[0].tokens)
    encoder = Counting(plain.tokenizer.hf, LOOP, capacity=length // 4, overflow=overflow).count()
    examples = encoder.encode_conversation(long)
    assert [len(example.tokens) <= length // 4 for example in examples] == [True] * len(examples)
    assert len(examples) == (1 if overflow == "truncate" else 5)
    assert encoder.messages <= 11 * len(long.messages)
