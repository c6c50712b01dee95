"""The template's own text, with exactly the assistant's text trained, or a refusal."""

from __future__ import annotations

import unicodedata
from datetime import date as Date
from pathlib import Path
from typing import Any

import pytest
import tiny

from sftstream import ChatEncoder, Conversation, Message, Refused, SourceConfig, ToolCall
from sftstream.formats import parse_row
from sftstream.sources.corpus import FileSet

HEADER, STOP = "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"
HI = Message("user", "hi")


def template(text: str = tiny.TEMPLATE, date: Date | None = None) -> ChatEncoder:
    return ChatEncoder(tiny.fast_tokenizer(), text, date=date.isoformat() if date else None)


def trained(encoder: ChatEncoder, *messages: Message, tools: Any = ()) -> list[str]:
    rendered = encoder.render(Conversation(messages, tools))
    return [rendered.text[span.start : span.end] for span in rendered.spans]


def refusal(encoder: ChatEncoder, *messages: Message, tools: Any = ()) -> str:
    with pytest.raises(Refused) as error:
        encoder.render(Conversation(messages, tools))
    return str(error.value)


def test_the_text_is_the_templates_own_and_the_answers_are_its_spans() -> None:
    messages = (
        Message("system", "be brief"),
        HI,
        Message("assistant", " a\n"),
        Message("user", "b"),
        Message("assistant", "c"),
    )
    rendered = template().render(Conversation(messages))
    assert rendered.text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nb<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nc<|eot_id|>"
    )
    assert [rendered.text[span.start : span.end] for span in rendered.spans] == ["a<|eot_id|>", "c<|eot_id|>"]


def test_prompt_and_stop_tokens_are_the_templates() -> None:
    turn_format = template().report.turn_format
    assert (turn_format.prompt, turn_format.role_marker) == (HEADER, HEADER)
    assert (turn_format.stops, turn_format.call_stops, turn_format.open_end) == ((STOP,), (), False)


def test_tool_calls_are_trained_and_tools_and_results_are_not() -> None:
    tools = ({"type": "function", "function": {"name": "add", "description": "adds"}},)
    call = ToolCall("add", {"a": 'two \u00fc "quoted" \\ \n', "b": [1, None, True, {"c": 2**64}]})
    messages = (
        Message("system", "s"),
        HI,
        Message("assistant", tool_calls=(call,)),
        Message("tool", "3"),
        Message("assistant", "3"),
    )
    assert trained(template(), *messages, tools=tools) == [
        '{"name": "add", "parameters": {"a": "two \u00fc \\"quoted\\" \\\\ \\n", "b": [1, null, true, '
        '{"c": 18446744073709551616}]}}<|eot_id|>',
        "3<|eot_id|>",
    ]


def test_an_assistant_may_speak_first_and_twice_in_a_row() -> None:
    assert trained(template(), Message("assistant", "a"), Message("assistant", "b"), HI) == ["a" + STOP, "b" + STOP]


def test_a_user_who_repeats_the_assistants_text_is_not_trained() -> None:
    messages = (
        Message("user", "yes"),
        Message("assistant", "yes"),
        Message("user", "assistant\n\nyes"),
        Message("assistant", "yes"),
    )
    rendered = template().render(Conversation(messages))
    assert [span.end for span in rendered.spans] == [rendered.text.index("yes" + STOP, 80) + 13, len(rendered.text)]
    assert [rendered.text[span.start : span.end] for span in rendered.spans] == ["yes" + STOP] * 2


@pytest.mark.parametrize("text", ["", "  \n", None])
def test_an_assistant_who_says_nothing_is_trained_to_stop(text: str | None) -> None:
    assert trained(template(), HI, Message("assistant", text)) == [STOP]
    assert trained(template(), HI, Message("assistant", text), HI, ANSWER) == [STOP, "Yes, so" + STOP]


def test_an_empty_user_or_system_message_is_no_reason_to_refuse() -> None:
    assert trained(template(), Message("system", ""), Message("user", " "), Message("assistant", "a")) == ["a" + STOP]


CALL = ToolCall("f", {"a": "x"})


@pytest.mark.parametrize(
    "message",
    [
        Message("user", "a", name="<|eot_id|>"),
        Message("tool", "a", tool_call_id="x<|eot_id|>"),
        Message("assistant", tool_calls=(ToolCall("f", {}, id="<|eot_id|>"),)),
        Message("assistant", tool_calls=(ToolCall("f", {"a": {"<|eot_id|>": 1}}),)),
    ],
)
def test_a_name_or_key_that_would_become_a_control_token_is_refused(message: Message) -> None:
    expected = "control token in text: message 0 contains '<|eot_id|>' in a name, key or value; remove the token"
    assert refusal(template(), message, Message("assistant", "b")) == expected


@pytest.mark.parametrize("tool", [{"description": "<|eot_id|>"}, {"<|eot_id|>": 1}, {"enum": [["a", "<|eot_id|>"]]}])
def test_a_tool_whose_text_would_become_a_control_token_is_refused(tool: dict[str, Any]) -> None:
    tools = ({"type": "function", "function": {"name": "f", **tool}},)
    expected = (
        "control token in text: a tool definition contains '<|eot_id|>' in a name, key or value; remove the token"
    )
    assert refusal(template(), HI, Message("assistant", "b"), tools=tools) == expected


@pytest.mark.parametrize(
    "text",
    [
        "ZqM0x1x0bZq",
        "ZqM0x1x0eZq",
        "ZqM1x1x1bZqa",
        "aZqM1x1x1e",
        "Zq",
        "ZqM0x1x0bZqaZqM0x1x0eZq",
        "ZqM7x1x7bZqaZqM7x1x7eZq",
        f"ZqM{'9' * 5000}x0x0bZq",
        "ZqM0x" + "9" * 5000,
    ],
    ids=[
        "begin",
        "end",
        "own begin",
        "half an end",
        "part",
        "pair",
        "foreign pair",
        "5000 digits",
        "5000 digits, half",
    ],
)
def test_text_that_looks_like_a_marker_is_trained_whole(text: str) -> None:
    for messages in ((Message("user", text), Message("assistant", "a")), (HI, Message("assistant", text))):
        assert trained(template(), *messages) == [f"{messages[1].content}{STOP}"]


def test_a_message_of_a_megabyte_is_trained_whole() -> None:
    text = "seven rivers <| \u00e9\U0001f600\n" * 50_000 + "."
    assert trained(template(), HI, Message("assistant", text)) == [text + STOP]


def test_nul_and_other_control_characters_are_text() -> None:
    assert trained(template(), HI, Message("assistant", "a\x00\x1b\u2028b")) == ["a\x00\x1b\u2028b" + STOP]


TURN = "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + %s + '<|eot_id|>' }}"
PROMPT = "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"


def loop(text: str, condition: str = "true") -> str:
    return f"{{%- for message in messages %}}{{%- if {condition} %}}{TURN % text}{{%- endif %}}{{%- endfor %}}{PROMPT}"


ANSWER = Message("assistant", "Yes, so")


def later(text: str) -> str:
    """Return a template that prints `text` in conversations of six messages, unseen by probes."""
    return loop(f"({text} if messages | length == 6 else message.content)")


@pytest.mark.parametrize(
    ("text", "messages", "reason"),
    [
        (loop("message.content", "message.role != 'system'"), (Message("system", "be"), HI, ANSWER), "template drops text"),
        (loop("message.content"), (HI, Message("assistant", tool_calls=(CALL,))), "template drops a tool call: message 1: "),
        (loop("message.content"), (HI, Message("assistant", "x", reasoning="hm")), "template drops reasoning: message 1: 'hm'"),
        (later("message.content | upper"), (HI, ANSWER) * 3, "template alters text: message 0: 'hi' is printed in another form"),
        (loop("message.content | replace('Yes', 'No')"), (HI, ANSWER), "template alters text: message 1: 'Yes, so' is"),
        (loop("message.content | replace('<', '&lt;')"), (HI, Message("assistant", "a<b")), "template alters text: message 1: "),
        (later("message.content | length | string"), (HI, ANSWER) * 3, "template alters text: message 0: 'hi' is"),
        (later("message.content | length | string + message.content"), (HI, ANSWER) * 3, "template rewrites text"),
        (later("message.content[:3]"), (HI, ANSWER) * 3, "template alters text: message 1: 'Yes, so' is"),
        (later("message.content[::-1]"), (HI, ANSWER) * 3, "template alters text: message 0: 'hi' is"),
        (later("(message.content if loop.last else '-')"), (HI, ANSWER) * 3, "template drops text: message 0"),
        (later("message.content + message.nothing.at_all"), (HI, ANSWER) * 3, "template raises: "),
        (later("message.content.split('')[0]"), (HI, ANSWER) * 3, "template raises: empty separator"),
        (later("(1 // 0) | string"), (HI, ANSWER) * 3, "template raises: "),
        (later("message.content.index('?') | string"), (HI, ANSWER) * 3, "template raises: substring not found"),
        (later("raise_exception('no two')"), (HI, ANSWER) * 3, "template raises: no two"),
        (later("'' | attr('x') + 1"), (HI, ANSWER) * 3, "template raises: "),
        (later("''.__class__.__mro__ | string"), (HI, ANSWER) * 3, "template raises: access to attribute '__class__'"),
        ("{%- macro f(x) %}{{ f(x) }}{% endmacro %}" + later("f('x')"), (HI, ANSWER) * 3, "template raises: maximum"),
        (later("(messages[2].content if loop.index0 == 1 else '') + message.content"), (HI, ANSWER) * 3, "messages out of order"),
        (later("message.content + (messages[0].content if loop.index0 == 1 else '')"), (HI, ANSWER) * 3, "foreign text in span"),
        (later("message.content + (messages[2].content if loop.index0 == 1 else '')"), (HI, ANSWER) * 3, "no stop token: "),
    ],
)  # fmt: skip
def test_a_conversation_that_the_template_does_not_print_as_said_is_refused(
    text: str, messages: tuple[Message, ...], reason: str
) -> None:
    refused = refusal(template(text), *messages)
    assert refused.startswith(reason)
    assert len(refused) < 300


def test_turns_that_are_printed_in_another_order_are_refused() -> None:
    backwards = (
        "{%- for message in (messages | reverse if messages | length > 4 else messages) %}"
        + TURN % "message.content"
        + "{%- endfor %}"
        + PROMPT
    )
    answers = (Message("system", "s"), HI, Message("assistant", "a"), Message("user", "u"), Message("assistant", ""))
    assert refusal(template(backwards), *answers) == (
        "messages out of order: message 2 is printed after message 3; use a template that prints messages in order"
    )


def test_a_turn_without_its_stop_token_is_refused() -> None:
    text = loop("message.content").replace("+ '<|eot_id|>'", "+ ('<|eot_id|>' if messages | length != 4 else '')")
    assert refusal(template(text), HI, ANSWER, HI, ANSWER) == ("no stop token: none of ['<|eot_id|>'] ends message 1")


def test_an_answer_without_the_header_is_refused() -> None:
    text = loop("message.content").replace("message.role", "('model' if loop.index0 == 3 else message.role)")
    assert refusal(template(text), HI, ANSWER, HI, ANSWER).startswith("no header: ")


BRACKETS = (
    "{{- bos_token }}{%- for message in messages %}{%- if message.role == 'user' %}{{ '[INST] ' + message.content + '[/INST]' }}"
    "{%- else %}{{ ' ' + message.content + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
)


def test_without_a_generation_prompt_the_answer_begins_where_the_question_ends() -> None:
    brackets = template(BRACKETS)
    assert brackets.report.turn_format.prompt == ""
    assert trained(brackets, HI, Message("assistant", "a"), HI, Message("assistant", "b")) == [" a" + STOP, " b" + STOP]


def test_a_question_printed_differently_once_answered_is_refused() -> None:
    last_user = "(message.content + '!' if loop.last else message.content)"
    text = BRACKETS.replace("message.content + '[/INST]'", f"{last_user} + '[/INST]'")
    assert refusal(template(text), HI, ANSWER).startswith(
        "no header: the template's text before an assistant message is missing before message 1"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for message in messages %}", "the chat template is not valid Jinja: "),
        ("{{ messages | nothing }}", "the chat template is not valid Jinja: "),
        (
            "{%- for message in messages %}{{ message.role + ': ' + message.content }}{% endfor %}",
            "nothing ends an assistant's turn in this chat template, so a model could not learn to stop",
        ),
        (
            "{{ raise_exception('never') }}",
            "the chat template cannot print a user's message, with or without a tool (never)",
        ),
        ("{% include 'other' %}", "the chat template cannot print a user's message"),
    ],
)
def test_a_template_that_cannot_train_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        template(text)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_template_prints_the_given_date_or_the_day_of_construction() -> None:
    messages = Conversation((HI, ANSWER))
    assert (
        template(tiny.DATED_TEMPLATE, Date(2024, 2, 29))
        .render(messages)
        .text.startswith("<|begin_of_text|>29 Feb 2024<")
    )
    today = template(tiny.DATED_TEMPLATE)
    assert today.template.date == Date.today()
    assert today.render(messages).text.startswith(f"<|begin_of_text|>{Date.today():%d %b %Y}<")
    assert template().template.date is None


def test_date_string_is_the_given_date_too() -> None:
    text = "{{- date_string | default('26 Jul 2024') }}" + tiny.TEMPLATE
    messages = Conversation((HI, ANSWER))
    assert template(text, Date(2025, 1, 2)).render(messages).text.startswith("02 Jan 2025<")
    assert template(text).render(messages).text.startswith(f"{Date.today():%d %b %Y}<")


def test_an_encoder_takes_its_template_from_the_tokenizer_a_file_or_the_text(tokenizer: str, tmp_path: Path) -> None:
    text = tiny.TEMPLATE.replace("{{- bos_token }}", "\u00e9")
    (tmp_path / "chat.jinja").write_text(text, encoding="utf-8")
    assert ChatEncoder(tokenizer).template.text == tiny.TEMPLATE
    assert ChatEncoder(tokenizer, template=str(tmp_path / "chat.jinja")).template.text == text
    assert ChatEncoder(tokenizer, template=text).template.text == text


def test_an_encoder_without_a_template_or_with_a_wrong_date_is_an_error(tokenizer: str, tmp_path: Path) -> None:
    bare = tiny.save_tokenizer(tmp_path / "bare", template=None)
    with pytest.raises(
        ValueError, match=r"tokenizer '.*/bare' has no chat template; give the path of a file: template = "
    ):
        ChatEncoder(bare)
    missing = str(tmp_path / f"{'n' * 100}.jinja")
    with pytest.raises(
        ValueError, match=f"chat template '{missing}' cannot be read: No such file.*; give a file or the"
    ):
        ChatEncoder(tokenizer, template=missing)
    with pytest.raises(ValueError, match=r"date = 'today' is not a date; write a date as YYYY-MM-DD"):
        ChatEncoder(tokenizer, date="today")


def test_encode_takes_messages_in_any_spelling_and_raises_refusals(encoder: ChatEncoder) -> None:
    (example,) = encoder.encode([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "seven"}])
    assert encoder.tokenizer.hf.decode(example.tokens[example.loss_mask]) == "seven" + STOP
    with pytest.raises(Refused, match="no assistant message"):
        encoder.encode([{"role": "user", "content": "hi"}])


REAL_FILES = (
    "alpaca/gsm8k_train.jsonl",
    "alpaca/alpaca_zh_demo.json",
    "alpaca/oasst_sft_zh.json",
    "sharegpt/sharegpt_zh_1K.jsonl",
    "sharegpt/glaive_toolcall_en_demo.json",
    "messages/sgd_tools.jsonl",
)


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "stop", "trims"), [("llama3", "<|eot_id|>", True), ("qwen", "<|im_end|>", False)])
def test_real_tokens_that_are_trained_are_what_the_assistant_said(
    realdata: Path, name: str, stop: str, trims: bool
) -> None:
    encoder = ChatEncoder(str(realdata / "tokenizers" / name))
    assert encoder.report.turn_format.stops == (stop,)
    for file in REAL_FILES:
        source = FileSet(SourceConfig(path=str(realdata / "conversations" / file)))
        accepted = 0
        for row in range(0, len(source), max(1, len(source) // 40)):
            conversation = parse_row(source.read(row))
            try:
                (example,) = encoder.encode_conversation(conversation)
            except Refused:
                continue
            accepted += 1
            answers = [message for message in conversation.messages if message.role == "assistant"]
            turns = _turns_of(encoder, example.tokens, example.loss_mask)
            assert len(turns) == len(answers), source.place(row)
            for turn, answer in zip(turns, answers, strict=True):
                _check_turn(turn, answer, stop, trims)
        assert accepted >= 5, file


def _turns_of(encoder: ChatEncoder, tokens: Any, mask: Any) -> list[str]:
    """Each unbroken stretch of trained tokens, decoded."""
    borders = [i for i in range(1, len(mask)) if mask[i] and not mask[i - 1]]
    ends = [i + 1 for i in range(len(mask)) if mask[i] and (i + 1 == len(mask) or not mask[i + 1])]
    return [encoder.tokenizer.hf.decode(tokens[a:b]) for a, b in zip(borders, ends, strict=True)]


def _check_turn(turn: str, answer: Message, stop: str, trims: bool) -> None:
    said = unicodedata.normalize("NFC", answer.content or "")
    said = said.strip() if trims else said
    if answer.tool_calls:
        assert turn.endswith(stop)
        assert turn.startswith(said)
        assert all(f'"{call.name}"' in turn for call in answer.tool_calls)
    else:
        assert turn == said + stop
