"""Templates of styles that no published family has, written for this test, judged by the oracle on many shapes."""

from __future__ import annotations

import os
import random
from pathlib import Path

import judge
import pytest

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.SystemRandom().randrange(10**6))
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
THOUGHT = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
LOOP = "{% for m in messages %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TOKENS = "{# <|user|> <|assistant|> <|tool|> <|system|> <|im_end|> <|im_start|> <|eot|> <|observation|> #}"
ROLE = "<|im_start|>{{ m.role }}\n"
STYLES = {
    "no generation prompt": LOOP + "<|{{ m.role }}|>{{ m.content }}" + CALLS + "<|im_end|>{% endfor %}",
    "no generation prompt, thoughts": LOOP
    + "[{{ m.role }}]"
    + THOUGHT
    + "{{ m.content }}"
    + CALLS
    + "<|eot|>{% endfor %}",
    "no generation prompt, no header": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}" + CALLS + "<|eot|>{% endif %}{% endfor %}",
    "trimmed contents": LOOP + ROLE + THOUGHT + "{{ m.content | trim }}" + CALLS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "tools as the user": LOOP
    + "<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{% if m.role == 'tool' %}<result>{{ m.content }}</result>"
    "{% else %}{{ m.content }}" + CALLS + "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "prompt opens a thought": LOOP
    + "<|{{ m.role }}|>{% if m.role == 'assistant' %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    + CALLS
    + "<|eot|>{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}",
    "thoughts of the last turn alone": LOOP
    + "<|{{ m.role }}|>{% if loop.last %}"
    + THOUGHT
    + "{% endif %}{{ m.content }}"
    + CALLS
    + "<|eot|>{% endfor %}"
    + PROMPT,
    "calls before the text": LOOP + "<|{{ m.role }}|>" + CALLS + "{{ m.content }}<|eot|>{% endfor %}" + PROMPT,
    "system prompt in the first user's message": "{% set ns = namespace(s='') %}"
    + LOOP
    + "{% if m.role == 'system' %}{% set ns.s = ns.s ~ m.content ~ '\n\n' %}{% else %}<|{{ m.role }}|>{{ ns.s }}"
    "{% set ns.s = '' %}{{ m.content }}" + CALLS + "<|eot|>{% endif %}{% endfor %}" + PROMPT,
    "roles beside the end": LOOP
    + "{{ m.content }}"
    + CALLS
    + "<|im_end|>{% if not loop.last %}\n{% endif %}{% endfor %}",
    "the next role ends a turn": LOOP
    + "<|{{ 'observation' if m.role == 'tool' else m.role }}|>{{ m.content }}"
    + CALLS
    + "{% endfor %}"
    + PROMPT,
    "one end token for the whole text": LOOP
    + "<|{{ m.role }}|>{{ m.content }}"
    + CALLS
    + "{% if m.role == 'assistant' %}<|eot|>{% endif %}{% endfor %}"
    + PROMPT,
    "numbered messages": LOOP + "<|im_start|>{{ loop.index }} {{ m.role }}\n{{ m.content }}" + CALLS + "<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{{ messages | length + 1 }} assistant\n{% endif %}",
    "a greeting in the prompt": LOOP
    + "<|{{ m.role }}|>{{ 'Sure. ' if m.role == 'assistant' }}{{ m.content }}"
    + CALLS
    + "<|eot|>{% endfor %}{% if add_generation_prompt %}<|assistant|>Sure. {% endif %}",
    "the last message has no end": LOOP
    + "<|{{ m.role }}|>{{ m.content }}"
    + CALLS
    + "{% if not loop.last %}<|eot|>{% endif %}{% endfor %}"
    + PROMPT,
    "words as roles": LOOP + "### {{ m.role }}:\n{{ m.content }}" + CALLS + "<|eot|>\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}",
    "tags as roles": LOOP + "<{{ m.role }}>{{ m.content }}" + CALLS + "</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "a header for each reasoning, call and text": LOOP
    + "{% if m.role != 'assistant' %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% else %}"
    "{% if m.reasoning_content %}<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>{% endif %}"
    "{% for c in m.tool_calls or [] %}<|start|>assistant to={{ c.function.name }}<|message|>"
    "{{ c.function.arguments | tojson }}<|call|>{% endfor %}{% if m.content or not m.tool_calls %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    "a stop before every message but the first": LOOP
    + ROLE
    + "{{ m.content }}"
    + CALLS
    + "{% if (loop.last and add_generation_prompt) or not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'assistant' %}<|im_start|>assistant\n{% endif %}",
    "the header of the answer in the question": LOOP
    + "{% if m.role == 'assistant' %}{{ m.content }}"
    + CALLS
    + "<|eot|>{% else %}<|{{ m.role }}|>{{ m.content }}<|assistant|>{% endif %}{% endfor %}",
    "results of one message together": LOOP
    + "{% if m.role != 'tool' or loop.previtem is not defined or loop.previtem.role != 'tool' %}<|{{ m.role }}|>{% endif %}"
    "{{ m.content }}"
    + CALLS
    + "{% if m.role != 'tool' or loop.nextitem is not defined or loop.nextitem.role != 'tool' %}<|eot|>{% endif %}"
    "{% endfor %}" + PROMPT,
}
SHAPES = (
    "u a",
    "u a u a",
    "s u a u a",
    "u ac t a",
    "u ac t a u a",
    "u ar u ar",
    "u acc t t a",
    "u~ a~",
    "u a a",
    "a u a",
)
"""Shapes judged of every style in the quick suite, besides a draw."""


def judged(tmp_path: Path, style: str, shapes: list[str] | tuple[str, ...]) -> list[judge.Case]:
    path = tmp_path / f"{style}.jinja"
    path.write_text(TOKENS + STYLES[style])
    return judge.judge(path, shapes)


@pytest.mark.parametrize("style", STYLES)
def test_a_style_of_no_published_family_is_right_or_refused(tmp_path: Path, style: str) -> None:
    cases = judged(tmp_path, style, (*SHAPES, *random.Random(SEED).sample(judge.SHAPES, 6)))
    assert [case for case in cases if case.verdict in ("wrong", "crash")] == [], f"SFTSTREAM_SEED={SEED}"
    assert style == "roles beside the end" or sum(case.verdict == "right" for case in cases) >= 5, cases


@pytest.mark.slow
def test_every_style_is_right_on_every_shape_and_mostly_accepted(tmp_path: Path) -> None:
    cases = [case for style in STYLES for case in judged(tmp_path, style, judge.SHAPES)]
    print(judge.table(cases))
    assert [case for case in cases if case.verdict in ("wrong", "crash")] == []
    assert judge.accepted_share(cases) >= 0.9
