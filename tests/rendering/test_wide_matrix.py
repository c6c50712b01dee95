"""Templates on many shapes of conversation, judged by marker words: nothing wrong, little refused.

`python tests/judge.py DIRECTORY` prints the whole table. SFTSTREAM_SEED and SFTSTREAM_DRAWS set the
quick draw, SFTSTREAM_TEMPLATES the number of templates drawn for the slow tests (default: all).
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import judge
import pytest
import shapes

from sftstream import Refused
from sftstream.formats import parse_row

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.SystemRandom().randrange(10**6))
DRAWS = int(os.environ.get("SFTSTREAM_DRAWS") or 3)
FOLDERS = ("templates", "templates_more")


def templates(realdata: Path) -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((realdata / folder).glob("*.jinja"))]


def wrong(cases: list[judge.Case]) -> list[judge.Case]:
    return [case for case in cases if case.verdict in ("wrong", "crash", "unopened")]


def opened(cases: list[judge.Case]) -> list[judge.Case]:
    """Leave out templates refused at start: a tokenizer may know none of the stops, as of Apriel."""
    return [case for case in cases if case.verdict != "unopened"]


@pytest.mark.realdata
def test_a_draw_of_templates_shapes_and_policies_has_no_wrong_mask(realdata: Path) -> None:
    print(f"SFTSTREAM_SEED={SEED}")
    draw = random.Random(SEED)
    cases = []
    for path in templates(realdata):
        policy = draw.choice(({}, {}, *judge.POLICIES))
        special = draw.random() < 0.8
        judged = judge.judge(path, draw.sample(judge.SHAPES, DRAWS), special=special, **policy)
        cases += judged if special else opened(judged)
    assert wrong(cases) == [], f"SFTSTREAM_SEED={SEED}"
    assert sum(case.verdict == "right" for case in cases) > len(cases) / 4


def plan_differences(path: Path, codes: list[str]) -> list[str]:
    """Return the shapes with a plan that prints other words otherwise than the template."""
    encoder, different = judge.open_encoder(path.read_text(encoding="utf-8")), []
    for shape in codes:
        messages, tools = judge.conversation(shape)
        others = ([], [("q", "qz z")], [("w", "<"), ("q", "]")], [("w", " w"), ("q", "q\n")], [("w", "<think>w")])
        for replaced in others:
            text = json.dumps(messages)
            for word, other in replaced:
                text = judge.WORD.sub(lambda m, a=word, b=other: m[0].replace(a, json.dumps(b)[1:-1]), text)
            try:
                row = parse_row({"messages": json.loads(text), "tools": tools})
                planned = encoder.renderer.render_cache.render(row)
                whole, turns = encoder.renderer.render_whole(row)
            except Refused:
                continue
            if planned is None:
                encoder.renderer.render_cache.learn(row, whole, turns)
            elif planned != whole:
                different.append(f"{path.stem} [{shape}] {replaced}: {planned} is not {whole}")
    return different


@pytest.mark.realdata
def test_a_draw_of_templates_and_shapes_is_printed_as_planned(realdata: Path) -> None:
    draw = random.Random(SEED)
    different = [d for path in templates(realdata) for d in plan_differences(path, draw.sample(judge.SHAPES, DRAWS))]
    assert different == [], f"SFTSTREAM_SEED={SEED}"


@pytest.mark.slow
@pytest.mark.realdata
def test_every_template_and_shape_is_printed_as_planned(realdata: Path) -> None:
    assert [d for path in shapes.drawn(templates(realdata)) for d in plan_differences(path, list(judge.SHAPES))] == []


@pytest.mark.slow
@pytest.mark.realdata
def test_every_template_is_right_on_every_shape(realdata: Path) -> None:
    paths = shapes.drawn(templates(realdata))
    cases = [case for path in paths for case in judge.judge(path)]
    print(judge.table(cases))
    assert wrong(cases) == []
    assert judge.accepted_share(cases) >= 0.97 or paths != templates(realdata)


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize("policy", judge.POLICIES, ids=str)
def test_every_template_is_right_under_every_policy(realdata: Path, policy: dict[str, Any]) -> None:
    assert wrong([case for path in shapes.drawn(templates(realdata)) for case in judge.judge(path, **policy)]) == []


@pytest.mark.slow
@pytest.mark.realdata
def test_templates_whose_stops_the_tokenizer_does_not_know_are_right(realdata: Path) -> None:
    cases = [case for path in shapes.drawn(templates(realdata)) for case in judge.judge(path, special=False)]
    # Without tokens to tell apart, `</call><|end|>` is one stop.
    faults = [case for case in wrong(opened(cases)) if "two stops" not in case.detail]
    assert faults == []


def test_the_oracle_finds_planted_faults(tmp_path: Path) -> None:
    path = tmp_path / "chatml.jinja"
    path.write_text(CHATML)
    encoder = judge.open_encoder(CHATML)
    messages, tools = judge.conversation("u a u a")
    oracle = judge.Oracle(encoder, CHATML, messages, tools)
    text = str(oracle.text)
    spans = [(start := text.index(word), text.index("<|im_end|>", start) + 10) for word in ("wa01cq", "wa03cq")]
    assert oracle.fault(text, spans) is None
    (start, end), second = spans
    planted = {
        "a role marker is trained": [(start - 22, end), second],
        "'assistant\\n' of the generation prompt is trained": [(start - 10, end), second],
        "no stop is trained": [(start, end - 10), second],
        "wa01cq is not trained": [second],
        "wu02cq is trained": [(start, second[1])],
        "two stops are trained": [(start, end + 11), second],
    }
    assert {fault: oracle.fault(text, spans) for fault, spans in planted.items()} == {
        **{fault: fault for fault in planted},
        "two stops are trained": "no stop is trained",
    }
    assert [case.verdict for case in judge.judge(path, ["u a", "u ac t a", "u ar"])] == ["right", "refused", "refused"]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
