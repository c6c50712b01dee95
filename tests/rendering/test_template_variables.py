"""Variables of templates, from the config and from rows: printed as at inference, part of the identity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import shapes
import tiny

from sftstream import ChatEncoder, DataConfig, PackLoader, Refused
from sftstream.formats import parse_row
from sftstream.rendering.template import ChatTemplate

STOP = "<|eot_id|>"
TEMPLATE = (
    "{% if xml_tools %}<|start_header_id|>system\n{{ xml_tools | tojson }}<|eot_id|>\n{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{{ m.content }}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
TALK = [shapes.user("ab"), shapes.said("ba"), shapes.user("cd"), shapes.said("dc")]
QUIET = {"enable_thinking": False}


def parts(encoder: ChatEncoder, variables: dict[str, Any] | None = None) -> tuple[str, list[str]]:
    """The text of `TALK` and its trained spans."""
    rendered = encoder.render(parse_row({"messages": TALK, "chat_template_kwargs": variables}))
    return rendered.text, [rendered.text[span.start : span.end] for span in rendered.spans]


@pytest.mark.parametrize("variables", [{}, QUIET, {"xml_tools": [{"name": "f"}]}, {"xml_tools": "T", **QUIET}])
def test_the_text_before_a_turn_is_what_inference_with_the_same_variables_prints(
    tokenizer: str, variables: dict[str, Any]
) -> None:
    configured, plain = ChatEncoder(tokenizer, TEMPLATE, variables=variables), ChatEncoder(tokenizer, TEMPLATE)
    rendered = configured.render(parse_row({"messages": TALK}))
    assert parts(plain, variables) == parts(configured)
    assert [rendered.text[span.start : span.end] for span in rendered.spans] == [f"ba{STOP}", f"dc{STOP}"]
    for index, span in zip((1, 3), rendered.spans, strict=True):
        prompt = configured.tokenizer.hf.apply_chat_template(
            TALK[:index], chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True, **variables
        )
        assert rendered.text[: span.start] == prompt


def test_an_empty_thought_is_trained_unless_the_rows_prompt_holds_it(tokenizer: str) -> None:
    """The config says nothing of thoughts, so its prompt is the shorter one; a row has the longer one."""
    template = TEMPLATE.replace(
        "enable_thinking is defined and not enable_thinking %}<think></think>", "1 %}<think>", 1
    )
    encoder = ChatEncoder(tokenizer, template)
    assert parts(encoder)[1] == [f"<think>ba{STOP}", f"<think>dc{STOP}"]
    assert parts(encoder, {"enable_thinking": True})[1] == [f"<think>ba{STOP}", f"<think>dc{STOP}"]
    opens = template.replace("not enable_thinking %}<think></think>", "not enable_thinking %}<think>")
    assert parts(ChatEncoder(tokenizer, opens), QUIET)[1] == [f"ba{STOP}", f"dc{STOP}"]
    thinking = ChatEncoder(tokenizer, opens, variables=QUIET)
    assert parts(thinking)[1] == [f"ba{STOP}", f"dc{STOP}"]
    assert parts(thinking, {"enable_thinking": True})[1] == [f"<think>ba{STOP}", f"<think>dc{STOP}"]


def test_a_row_overrides_single_variables(tokenizer: str) -> None:
    encoder = ChatEncoder(tokenizer, TEMPLATE, variables={"xml_tools": "T", **QUIET})
    text, _ = parts(encoder, {"xml_tools": "U"})
    assert text.startswith('<|start_header_id|>system\n"U"<|eot_id|>\n<|start_header_id|>user\nab<|eot_id|>\n')
    assert text.count("<think></think>") == 2
    assert parts(encoder, {"xml_tools": None}) == parts(encoder)


def test_plans_hold_for_equal_variables_only(tokenizer: str) -> None:
    encoder = ChatEncoder(tokenizer, TEMPLATE)
    variables: list[dict[str, Any]] = [{}, QUIET, {"enable_thinking": 0}, {"xml_tools": "T"}, {"xml_tools": "U"}]
    first = [parts(encoder, each) for each in variables]
    assert (encoder.renderer.planned, len(encoder.renderer.render_cache.plans)) == (0, 5)
    assert [parts(encoder, each) for each in variables] == first
    assert encoder.renderer.planned == 5
    assert len(dict.fromkeys(text for text, _ in first)) == 4  # 0 and false print the same


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"messages": []}, "the variable 'messages' is set by every render of a chat template; remove the variable"),
        ({"tools": []}, "'tools' is set by every render"),
        ({"add_generation_prompt": True}, "'add_generation_prompt' is set by every render"),
        ({"continue_final_message": True}, "'continue_final_message' is set by every render"),
        ({"eos_token": "x"}, "'eos_token' is set by every render"),
        ({"date_string": "x"}, "'date_string' is set by every render of a chat template; set data.tokenizer.date"),
        ({"day": parse_row}, "is not a text, number, boolean, list or table; write it as a text"),
    ],
)
def test_a_name_that_every_render_sets_is_refused(tokenizer: str, variables: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatEncoder(tokenizer, TEMPLATE, variables=variables)
    with pytest.raises(Refused, match=f"bad template variables: .*{message}"):
        parts(ChatEncoder(tokenizer, TEMPLATE), variables)


def test_a_row_without_an_object_of_variables_is_refused() -> None:
    with pytest.raises(Refused, match="bad template variables: chat_template_kwargs is a list, not an object"):
        parse_row({"messages": TALK, "chat_template_kwargs": [1]})
    row = {"messages": TALK, "chat_template_kwargs": json.dumps(QUIET)}
    assert parse_row(row).variables == parse_row(json.dumps(row).encode()).variables == QUIET


def test_a_special_token_in_a_rows_variables_is_refused(tokenizer: str) -> None:
    with pytest.raises(Refused, match=r"control token in text: chat_template_kwargs contains '<\|eot_id\|>'"):
        parts(ChatEncoder(tokenizer, TEMPLATE), {"xml_tools": ["a<|eot_id|>"]})


def test_a_template_that_needs_a_variable_names_it(tokenizer: str) -> None:
    encoder = ChatEncoder(tokenizer, TEMPLATE)
    assert encoder.template.unset_variables == ("enable_thinking", "xml_tools")
    assert ChatEncoder(tokenizer, TEMPLATE, variables=QUIET).template.unset_variables == ("xml_tools",)
    reads_own = (
        TEMPLATE + "{% set a = 1 %}{{ a }}{% if b is not defined %}{% set b = 2 %}{% endif %}{{ c | default(3) }}"
    )
    assert ChatEncoder(tokenizer, reads_own).template.unset_variables == ("b", "c", "enable_thinking", "xml_tools")
    given = "{% if d or tools %}{% if tools %}{% set d = tools %}{% endif %}{{ d }}{% endif %}"
    given += "{% set e = e if e is defined else 1 %}{% for f in f or [] %}{{ f }}{% endfor %}"
    own = "{% if tools %}{% set g = 1 %}{% endif %}{% if g is defined %}{{ g }}{% endif %}"
    assert ChatTemplate(given + own, {}).unset_variables == ("d", "e", "f")
    with pytest.raises(
        Refused, match=r"a tool call: .*not set \(enable_thinking, xml_tools\); set them in data\.token"
    ):
        encoder.encode([shapes.user("ab"), CALL])
    with pytest.raises(ValueError, match="'city' is undefined"):
        ChatEncoder(tokenizer, "{{ city.name }}" + TEMPLATE)


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"key": "ab"}}}]}


def test_variables_belong_to_the_identity_of_a_stream(tmp_path: Path) -> None:
    tokenizer = tiny.save_tokenizer(tmp_path / "tokenizer", TEMPLATE)
    rows = [{**row, "chat_template_kwargs": {"xml_tools": f"T{n}"}} for n, row in enumerate(tiny.rows(20))]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)

    def config(**variables: Any) -> DataConfig:
        return tiny.data_config({"path": tokenizer, "variables": variables}, path)  # type: ignore[dict-item]

    loader = PackLoader(config(**QUIET))
    texts = [ChatEncoder(tokenizer).tokenizer.hf.decode(pack.ids) for pack in tiny.take(loader, 4)]
    assert sum(text.count('"T') for text in texts) > 4
    assert sum(text.count("<think></think>") for text in texts) > 4
    state = loader.state_dict()
    PackLoader(config(**QUIET), state=state)
    with pytest.raises(ValueError, match=r"data\.variables\.enable_thinking: False -> True"):
        PackLoader(config(enable_thinking=True), state=state)
    with pytest.raises(ValueError, match=r"data\.variables: .*False.* -> None"):
        PackLoader(config(), state=state)
    assert "variables" not in PackLoader(config()).state_dict()["identity"]
