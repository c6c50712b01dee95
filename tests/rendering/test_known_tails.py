"""The tail of a beginning that another conversation left is the tail that a render would give."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import judge
import pytest

from sftstream import Refused
from sftstream.formats import parse_row
from sftstream.rendering.locate import locate
from sftstream.rendering.template import template_message
from sftstream.rendering.turns import find_turns

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.SystemRandom().randrange(10**6))
DRAWS = int(os.environ.get("SFTSTREAM_DRAWS") or 3)
ASKING = (
    "{# <|user|> <|assistant|> <|end|> #}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if '/think' in messages[-1].content %}<think>{% endif %}{% endif %}"
)
"""A template whose generation prompt, but not its text before an answer, depends on the question's words."""


def test_a_known_tail_saves_a_render_and_holds_only_for_words_that_change_nothing() -> None:
    encoder = judge.open_encoder(ASKING)
    compiled = encoder.template.compiled
    plain, renders = compiled.render, []

    def render(**context: Any) -> str:
        renders.append(len(context["messages"]))
        return str(plain(**context))

    compiled.render = render

    def trained(question: str) -> tuple[list[str], list[int]]:
        renders.clear()
        answer = {"role": "assistant", "content": "seven", "reasoning_content": "hm"}
        row = parse_row({"messages": [{"role": "user", "content": question}, answer]})
        rendered, _ = encoder.renderer.render_whole(row)
        return [rendered.text[span.start : span.end] for span in rendered.spans], list(renders)

    whole = ["<think>hm</think>seven<|end|>"]
    assert trained("hi") == (whole, [2, 2, 1])
    assert trained("where?") == (whole, [2, 2])
    assert trained("where? /think") == (["hm</think>seven<|end|>"], [2, 2, 1])
    assert trained("now? /think") == (["hm</think>seven<|end|>"], [2, 2])
    assert trained(" hi\n") == (whole, [2, 2, 1])
    assert trained("x") == (whole, [2, 2])


def test_a_template_that_cannot_be_traced_is_asked_again() -> None:
    encoder = judge.open_encoder(
        ASKING.replace("'/think' in messages[-1].content", "messages[-1].content | length > 30")
    )
    found = []
    for question in ("hi", "x" * 40, "where?"):
        answer = {"role": "assistant", "content": "seven", "reasoning_content": "hm"}
        row = parse_row({"messages": [{"role": "user", "content": question}, answer]})
        rendered, _ = encoder.renderer.render_whole(row)
        found.append([rendered.text[span.start : span.end] for span in rendered.spans])
    assert found == [["<think>hm</think>seven<|end|>"], ["hm</think>seven<|end|>"], ["<think>hm</think>seven<|end|>"]]


def differences(path: Path, shapes: list[str]) -> list[str]:
    """Return the shapes whose turns are found elsewhere with tails that other conversations left."""
    encoder, different = judge.open_encoder(path.read_text(encoding="utf-8")), []
    renderer = encoder.renderer
    for shape in shapes:
        messages, tools = judge.conversation(shape)
        for word in ("w", "q", "é ", "1 ", "/no_think w", "w\n"):
            text = judge.WORD.sub(lambda m, w=word: json.dumps(w)[1:-1] + m[0], json.dumps(messages))
            try:
                row = parse_row({"messages": json.loads(text), "tools": tools})
                given = [template_message(message) for message in row.messages]
                located = locate(renderer.template, given, row.tools)
                arguments = (
                    renderer.template,
                    renderer.report.turn_format,
                    renderer._control,
                    given,
                    row.tools,
                    located,
                )
                alone = find_turns(*arguments)
            except Refused:
                continue
            if find_turns(*arguments, known=renderer.render_cache.tails.of(row)) != alone:
                different.append(f"{path.stem} [{shape}] {word!r}")
    return different


@pytest.mark.realdata
def test_tails_of_other_conversations_change_no_turn_of_a_draw(realdata: Path) -> None:
    print(f"SFTSTREAM_SEED={SEED}")
    paths = [path for folder in ("templates", "templates_more") for path in sorted((realdata / folder).glob("*.jinja"))]
    draw = random.Random(SEED)
    assert [d for path in draw.sample(paths, 10) for d in differences(path, draw.sample(judge.SHAPES, DRAWS))] == []


@pytest.mark.slow
@pytest.mark.realdata
def test_tails_of_other_conversations_change_no_turn(realdata: Path) -> None:
    paths = [path for folder in ("templates", "templates_more") for path in sorted((realdata / folder).glob("*.jinja"))]
    assert [d for path in paths for d in differences(path, list(judge.SHAPES))] == []
