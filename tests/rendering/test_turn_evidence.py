"""Where a turn begins and ends: each rule on a template made for it, as published ones are."""

from __future__ import annotations

from typing import Any

import judge
import pytest
import shapes

from sftstream import ChatEncoder, Refused
from sftstream.formats import parse_row
from sftstream.rendering.turn_format import TurnFormat

END = "<|end|>"
CALL = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}({{ c.function.arguments | tojson }})</call>{% endfor %}"
SPECIAL = "{# <|user|> <|assistant|> <|tool|> <|system|> #}"
"""Texts that the judge makes special tokens."""
LOOP = SPECIAL + "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}" + CALL + "<|end|>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def trained(template: str, shape: str, **policy: Any) -> list[str] | str:
    """The trained texts of a shape of the judge, or the reason of the refusal."""
    encoder = judge.open_encoder(template, **policy)
    messages, tools = judge.conversation(shape)
    try:
        examples = encoder.encode(messages, tools)
    except Refused as refused:
        return refused.reason
    return [encoder.tokenizer.hf.decode(e.tokens[e.loss_mask]) for e in examples]


def turn_format(template: str) -> TurnFormat:
    return judge.open_encoder(template).report.turn_format


def test_the_token_that_begins_the_next_turn_is_no_stop() -> None:
    body = "{% for m in messages %}<|start|><|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|start|>"
    template = body + "<|system|>Act.<|end|>{% if add_generation_prompt %}<|start|><|assistant|>{% endif %}"
    assert turn_format(template).stops == (END,)
    assert trained(template, "u a u a") == [f"wa01cq{END}wa03cq{END}"]
    assert judge.open_encoder(template).stop_ids == judge.open_encoder(template).tokenizer.ids(END)


def test_a_call_without_a_stop_is_refused_and_never_ends_in_the_next_message() -> None:
    template = LOOP.replace("<|end|>{% endfor %}", "{% if not m.tool_calls %}<|end|>{% endif %}{% endfor %}") + PROMPT
    for shape in ("u ac t a", "u ac t- a", "u ac u- a", "u ac u_ a"):
        assert trained(template, shape) == "no stop token", shape


def test_the_report_names_a_shape_without_evidence() -> None:
    template = LOOP.replace("<|end|>{% endfor %}", "{% if not m.tool_calls %}<|end|>{% endif %}{% endfor %}") + PROMPT
    shapes_ = judge.open_encoder(template).report.shapes
    assert shapes_["ends with a tool call"].startswith("whole, but no stop token")
    assert shapes_["question, answer"] == "whole"


STOP_BY_KIND = (
    LOOP.replace("<|end|>{% endfor %}", "{{ '<|call|>' if m.tool_calls else '<|end|>' }}{% endfor %}") + PROMPT
)


@pytest.mark.parametrize("shape", ["u ac t a", "u ac t- a", "u ac t_ a", "u ac u- a", "u ac u_ a"])
def test_the_first_stop_by_place_ends_a_turn(shape: str) -> None:
    assert trained(STOP_BY_KIND, shape) == [f'<call>get_weather({{"city": "wa01aq"}})</call><|call|>wa03cq{END}']


def test_a_token_between_two_calls_is_no_stop() -> None:
    template = LOOP.replace("<|end|>", "").replace("</call>", "<|endcall|>") + "{{ '' }}" + PROMPT
    assert turn_format(template).call_stops == ("<|tool|>",)
    assert trained(template, "u acc t t a u a")[0].count("<|tool|>") == 1


def test_a_header_that_the_generation_prompt_leaves_out_is_not_trained() -> None:
    """Reka and GigaChat print the generation prompt only behind a message that is no assistant's."""
    prompt = "{% if add_generation_prompt and messages[-1].role != 'assistant' %}<|assistant|>{% endif %}"
    assert trained(LOOP + prompt, "u a a") == [f"wa01cq{END}wa02cq{END}"]
    assert trained(LOOP + prompt, "u ac ac") == [
        f'<call>get_weather({{"city": "wa01aq"}})</call>{END}<call>get_weather({{"city": "wa02aq"}})</call>{END}'
    ]


def test_a_system_prompt_that_the_template_adds_is_not_trained() -> None:
    template = "{% if messages and messages[0].role != 'system' %}<|system|>Think well.{% endif %}" + LOOP + PROMPT
    assert trained(template, "a") == [f"wa00cq{END}"]
    assert trained(template, "a u a") == [f"wa00cq{END}wa02cq{END}"]


@pytest.mark.parametrize("more", ["<think></think>", "<|think|>none<|endthink|>", "Here are my steps:\n"])
def test_a_prompt_may_hold_more_than_the_header_of_an_answer(more: str) -> None:
    template = LOOP + PROMPT.replace("<|assistant|>", f"<|assistant|>{more}")
    assert turn_format(template).role_marker == "<|assistant|>"
    assert trained(template, "u a u a") == [f"wa01cq{END}wa03cq{END}"]
    assert trained(template, "u ac t a") == [f'<call>get_weather({{"city": "wa01aq"}})</call>{END}wa03cq{END}']


def test_the_end_of_the_prompt_is_not_trained_where_an_answer_leaves_its_middle_out() -> None:
    """DeepSeek 3.2 prompts with an empty thought, and prints only the end of the thought before an answer."""
    template = (LOOP + PROMPT).replace("<|assistant|>{%", "<|assistant|><think></think>{%")
    template = template.replace("{{ m.content }}", "{{ '</think>' if m.role == 'assistant' }}{{ m.content }}")
    assert trained(template, "u a") == [f"wa01cq{END}"]
    assert trained(template, "u ac") == [f'<call>get_weather({{"city": "wa01aq"}})</call>{END}']


AFTER_TOOL = (
    "{% set ns = namespace(tool=false) %}{% for m in messages %}"
    "{% if not (ns.tool and m.role == 'assistant') %}<|{{ m.role }}|>{% endif %}{% set ns.tool = m.role == 'tool' %}"
    "{{ m.content }}" + CALL + "<|end|>{% endfor %}" + PROMPT
)


def test_an_answer_to_a_tool_may_have_no_header() -> None:
    assert trained(AFTER_TOOL, "u ac t a") == [f'<call>get_weather({{"city": "wa01aq"}})</call>{END}wa03cq{END}']
    assert trained(AFTER_TOOL, "u ac t ac") == [
        f'<call>get_weather({{"city": "wa01aq"}})</call>{END}<call>get_weather({{"city": "wa03aq"}})</call>{END}'
    ]


def test_another_header_than_the_prompts_is_refused() -> None:
    template = (LOOP + PROMPT).replace("<|{{ m.role }}|>", "<|{{ 'caller' if m.tool_calls else m.role }}|>")
    assert trained(template, "u a") == [f"wa01cq{END}"]
    assert trained(template, "u ac t a") == "no header"


def test_the_white_space_of_an_answer_that_nothing_ends_is_trained() -> None:
    open_end = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if not loop.last %}<|end|>{% endif %}{% endfor %}"
    )
    assert trained(open_end + PROMPT, "u a~") == [" \nwa01cq  \n"]
    assert trained(open_end.replace("m.content", "m.content | trim") + PROMPT, "u a~") == ["wa01cq"]
    assert trained(open_end.replace("{{ m.content }}", "{{ m.content | trim }}  \n") + PROMPT, "u a~") == ["wa01cq"]


REASONING = LOOP.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}",
)


@pytest.mark.parametrize("shape", ["u ai", "u ar"])
def test_reasoning_is_left_out_of_content_and_of_its_own_field_alike(shape: str) -> None:
    assert trained(REASONING + PROMPT, shape) == [f"<think>\nwa01rq\n</think>\n\nwa01cq{END}"]
    assert trained(REASONING + PROMPT, shape, train_reasoning=False) == [f"wa01cq{END}"]


@pytest.mark.parametrize("shape", ["u ai", "u ar"])
@pytest.mark.parametrize("opened", ["<think>\n", "<think>\n</think>"])
def test_a_tag_that_the_prompt_opens_is_not_trained(shape: str, opened: str) -> None:
    template = REASONING + PROMPT.replace("<|assistant|>", f"<|assistant|>{opened}")
    assert trained(template, shape) == [f"wa01rq\n</think>\n\nwa01cq{END}"]


def test_a_content_after_the_calls_is_trained_without_the_calls() -> None:
    template = LOOP.replace("{{ m.content }}" + CALL, CALL + "{{ m.content }}") + PROMPT
    assert trained(template, "u atc", train_tool_calls=False) == [f"wa01cq{END}"]


FORGETS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}"
    "</think>{% endif %}{{ m.content }}" + CALL + "<|end|>{% endfor %}" + PROMPT
)


@pytest.mark.parametrize("history", ["per_turn", "error", "as_rendered"])
@pytest.mark.parametrize("role", ["user", "tool", "system", "assistant"])
@pytest.mark.parametrize("shape", ["u arc t ar", "u ar u ar", "s u ac t a", "u arc"])
def test_every_history_policy_gives_examples_or_a_reason(history: str, role: str, shape: str) -> None:
    for more in ({}, {"train_reasoning": False, "train_tool_calls": False}):
        result = trained(FORGETS, shape, history=history, train_on=(role,), **more)
        assert result in ("nothing to train", "history rewritten") or result == [text for text in result if text]


def test_history_is_compared_before_every_trained_message() -> None:
    """Mistral prints the tools before the last user's message only, so they move."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' and messages[loop.index0:] | selectattr('role', 'equalto', 'user')"
        " | list | length == 1 %}{{ tools | tojson }}{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        + PROMPT
    )
    assert trained(template, "u a u a+T", history="error") == "history rewritten"
    assert trained(template, "u a u a+T", history="per_turn") == [f"wa01cq{END}", f"wa03cq{END}"]
    assert trained(template, "u a+T", history="error") == [f"wa01cq{END}"]


def test_a_template_that_reads_content_as_parts_is_given_parts() -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
        "{% endfor %}<|end|>{% endfor %}" + PROMPT
    )
    assert trained(template, "u a u a") == [f"wa01cq{END}wa03cq{END}"]
    encoder = judge.open_encoder(template)
    for number in range(3):
        encoder.encode([shapes.user(f"hi {number}"), shapes.said("a")])
    assert encoder.renderer.planned == 2


def test_an_empty_answer_that_the_template_does_not_end_has_no_turn(tokenizer: str) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content + '<|end|>' if m.content }}{% endfor %}" + PROMPT
    assert trained(template, "u a- u a") == [f"wa03cq{END}"]
    assert isinstance(ChatEncoder(tokenizer, template), ChatEncoder)


def test_white_space_of_an_answer_is_trained_though_the_prompt_ends_with_the_same() -> None:
    template = (
        "{# <|user|> <|assistant|> <|end|> #}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
    )
    encoder = judge.open_encoder(template)
    for said in ("\nseven", "seven", "\n\nseven"):
        rendered = encoder.render(
            parse_row({"messages": [*judge.conversation("u")[0], {"role": "assistant", "content": said}]})
        )
        assert [rendered.text[span.start : span.end] for span in rendered.spans] == [f"{said}<|end|>"]


CHANNELS = (
    "{# <|start|> <|channel|> <|message|> <|call|> #}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>{% endif %}"
    "{% for c in m.tool_calls or [] %}<|start|>assistant to={{ c.function.name }}<|message|>"
    "{{ c.function.arguments | tojson }}<|call|>{% endfor %}"
    "{% if m.content or not m.tool_calls %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""A template with a header for each reasoning, call and text of a message."""


def test_an_empty_text_beside_reasoning_is_trained_with_its_stop() -> None:
    thought, final = (
        "<|channel|>analysis<|message|>wa01rq<|end|>",
        "<|start|>assistant<|channel|>final<|message|><|end|>",
    )
    assert trained(CHANNELS, "u ar-") == [thought + final]
    assert trained(CHANNELS, "u ar-", train_reasoning=False) == ["<|end|>"]
    assert trained(CHANNELS, "u ar- u a") == [f"{thought}{final}<|channel|>final<|message|>wa03cq<|end|>"]


def test_blank_reasoning_beside_a_text_is_trained() -> None:
    encoder = judge.open_encoder(CHANNELS)
    messages, _ = judge.conversation("u ar")
    messages[1] |= {"reasoning_content": " ", "reasoning": " ", "thinking": " "}
    (example,) = encoder.encode(messages)
    final = "<|start|>assistant<|channel|>final<|message|>wa01cq<|end|>"
    assert (
        encoder.tokenizer.hf.decode(example.tokens[example.loss_mask])
        == f"<|channel|>analysis<|message|> <|end|>{final}"
    )


def test_a_token_between_two_calls_is_a_stop_if_the_next_call_has_a_header() -> None:
    assert turn_format(CHANNELS).call_stops == ("<|call|>",)
    assert trained(CHANNELS, "u ac t a") == [
        ' to=get_weather<|message|>{"city": "wa01aq"}<|call|><|channel|>final<|message|>wa03cq<|end|>'
    ]


@pytest.mark.parametrize(
    ("kind", "text"), [("content", "\nhm"), ("reasoning_content", "\nhm"), ("reasoning_content", "\n")]
)
def test_white_space_that_begins_a_text_is_trained_though_the_prompt_goes_on_with_a_line_end(
    kind: str, text: str
) -> None:
    """Apriel prompts with a sentence after the header; an answer begins in its place."""
    steps = "{% if m.reasoning_content %}{{ m.reasoning_content }}[ANSWER]{% endif %}{{ m.content }}"
    template = LOOP.replace("<|{{ m.role }}|>{{ m.content }}", "<|{{ m.role }}|>\n" + steps)
    encoder = judge.open_encoder(template + PROMPT.replace("<|assistant|>", "<|assistant|>\nMy steps:\n"))
    message = {"role": "assistant", "content": "seven", kind: text}
    if kind == "reasoning_content":
        message |= {"reasoning": text, "thinking": text}
    (example,) = encoder.encode([{"role": "user", "content": "hi"}, message])
    said = encoder.tokenizer.hf.decode(example.tokens[example.loss_mask])
    assert said == (f"{text}<|end|>" if kind == "content" else f"{text}[ANSWER]seven<|end|>")


def test_no_turn_starts_inside_a_header() -> None:
    """Qwen 1.5 ends the last message only with a prompt, and prints no prompt after an answer."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if (loop.last and add_generation_prompt) or not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'assistant' %}<|im_start|>assistant\n{% endif %}"
    )
    assert trained(template, "u a a-") == ["wa01cq<|im_end|>"]
    assert trained(template, "u a a") == ["wa01cq<|im_end|>wa02cq"]


def test_a_thought_after_the_prompts_tag_is_found_though_equal_gaps_precede_other_texts() -> None:
    template = LOOP + PROMPT.replace("<|assistant|>", "<|assistant|><think>")
    assert trained(template, "u a u a u ai u a") == [
        f"wa01cq{END}wa03cq{END}\nwa05rq\n</think>\n\nwa05cq{END}wa07cq{END}"
    ]


@pytest.mark.parametrize(
    ("again", "after"),
    [(0, "loop.last"), (1, "loop.last"), (3, "loop.last"), (0, "loop.index == 3"), (1, "loop.index == 3")],
)
def test_a_second_print_of_a_text_moves_no_turn(again: int, after: str) -> None:
    printed = f"{{% if {after} and loop.length == 4 %}}<|again|>{{{{ messages[{again}].content }}}}<|end|>{{% endif %}}"
    template = LOOP.replace("<|end|>{% endfor %}", f"<|end|>{printed}{{% endfor %}}") + PROMPT
    assert trained(template, "u a u a") == [f"wa01cq{END}wa03cq{END}"]
