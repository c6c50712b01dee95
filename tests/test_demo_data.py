"""The demo's data is what its generator writes, in every layout, and the questions at the end are none of training's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from sftstream import ChatEncoder, Conversation, Message, SourceConfig, ToolCall, read_conversations
from sftstream.formats import decode_row
from sftstream.sources import FileSet
from trainer.config_file import load_config

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo"
COLUMNS = {
    "messages.jsonl": {"messages"},
    "sharegpt.json": {"conversations"},
    "alpaca.jsonl": {"instruction", "input", "output"},
    "pairs.parquet": {"prompt", "completion"},
}


@pytest.fixture(scope="module")
def trained() -> list[Conversation]:
    return [conversation for name in COLUMNS for conversation in read_conversations(str(DEMO / "data" / name))]


@pytest.fixture(scope="module")
def held_out() -> list[Conversation]:
    return list(read_conversations(str(DEMO / "data" / "heldout.jsonl")))


@pytest.fixture(scope="module")
def words() -> Any:
    return AutoTokenizer.from_pretrained(DEMO / "tokenizer")


def test_the_generator_writes_what_is_committed(tmp_path: Path) -> None:
    command = [sys.executable, str(DEMO / "generate.py"), str(tmp_path)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    names = [path.relative_to(tmp_path) for path in sorted(tmp_path.glob("*/*"))]
    committed = [path for folder in ("data", "tokenizer") for path in sorted((DEMO / folder).iterdir())]
    assert names == [path.relative_to(DEMO) for path in committed]
    for name in names:
        if name.suffix == ".parquet":  # its footer names the version of pyarrow that wrote it
            assert pq.read_table(tmp_path / name).equals(pq.read_table(DEMO / name)), name
        else:
            assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name


def test_the_data_stays_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 2_500_000


def test_every_layout_has_a_good_part_of_the_conversations() -> None:
    for name, columns in COLUMNS.items():
        rows = FileSet(SourceConfig(path=str(DEMO / "data" / name)))
        assert len(rows) > 1000
        assert all(columns <= set(decode_row(rows.read(row))) for row in range(len(rows)))


def test_the_layouts_together_are_nine_thousand_conversations_of_all_kinds(trained: list[Conversation]) -> None:
    assert len(trained) == 9000
    roles = [[message.role for message in conversation.messages] for conversation in trained]
    assert sum(1 for conversation in trained if conversation.tools) > 900
    assert sum(1 for names in roles if names[0] == "system") > 500
    assert sum(1 for names in roles if names.count("user") > 1) > 4000
    assert {role for names in roles for role in names} == {"system", "user", "assistant", "tool"}


def test_no_training_conversation_begins_like_a_held_out_one(
    trained: list[Conversation], held_out: list[Conversation]
) -> None:
    begun = {
        _plain(conversation, end)
        for conversation in trained
        for end, message in enumerate(conversation.messages)
        if message.role == "assistant"
    }
    assert len(held_out) == 240
    assert len({_plain(conversation, len(conversation.messages)) for conversation in held_out}) == 240
    assert not begun & {_plain(conversation, len(conversation.messages) - 1) for conversation in held_out}


def test_no_held_out_sum_is_worked_out_in_training(trained: list[Conversation], held_out: list[Conversation]) -> None:
    said = {answer.rpartition(", so ")[2] for conversation in trained for answer in _answers(conversation)}
    results = [_answers(conversation)[-1].rpartition(", so ") for conversation in held_out]
    assert not said & {result for _, so, result in results if so}


def test_the_tokenizer_gives_any_text_back_and_splits_numbers_into_digits(words: Any) -> None:
    text = "What is 73 + 18? Žluťoučký 🦊\n\n\tkůň  "
    assert words.decode(words.encode(text)) == text
    assert words.tokenize("What is 173 + 8?") == ["What", "Ġis", "Ġ1", "7", "3", "Ġ+", "Ġ8", "?"]
    assert (words.bos_token, words.eos_token) == ("<|begin_of_text|>", "<|eot_id|>")
    assert words.pad_token == "<|finetune_right_pad_id|>"


def test_the_template_prints_every_kind_of_message(words: Any) -> None:
    tool = {"type": "function", "function": {"name": "get", "parameters": {}}}
    call = {"type": "function", "function": {"name": "get", "arguments": {"day": "Monday"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hello. "},
        {"role": "assistant", "content": "Yes.", "tool_calls": [call, call]},
        {"role": "tool", "content": "[1]"},
    ]
    assert words.apply_chat_template(messages, tools=[tool], tokenize=False, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.\n\nYou can call these functions:\n"
        '{"name": "get", "parameters": {}}<|eot_id|>'
        "<|start_header_id|>user<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.\n"
        '{"name": "get", "parameters": {"day": "Monday"}}\n{"name": "get", "parameters": {"day": "Monday"}}<|eot_id|>'
        "<|start_header_id|>ipython<|end_header_id|>\n\n[1]<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_the_template_tells_of_tools_where_there_is_no_system_prompt(words: Any) -> None:
    tool = {"type": "function", "function": {"name": "get"}}
    text = words.apply_chat_template([{"role": "user", "content": "Hello."}], tools=[tool], tokenize=False)
    assert text == (
        '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou can call these functions:\n{"name": "get"}'
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHello.<|eot_id|>"
    )


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "critic", "content": "No."}, 'role "critic" is none of system, user, assistant, tool'),
        ({"role": "user", "content": [{"type": "text", "text": "Hello."}]}, "content must be text"),
        ({"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}, "no place for reasoning_content"),
    ],
)
def test_the_template_refuses_what_it_has_no_place_for(words: Any, message: dict[str, Any], reason: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=reason):
        words.apply_chat_template([message], tokenize=False)


def test_only_the_assistants_words_of_a_call_and_its_result_are_trained() -> None:
    encoder = ChatEncoder(DEMO / "tokenizer")
    call = ToolCall("set_timer", {"minutes": 20})
    rendered = encoder.render(
        Conversation(
            (
                Message("user", "Wake me in 20 minutes."),
                Message("assistant", tool_calls=(call,)),
                Message("tool", '{"running": true}'),
                Message("assistant", "The timer is set to 20 minutes."),
            )
        )
    )
    assert [rendered.text[span.start : span.end] for span in rendered.spans] == [
        '{"name": "set_timer", "parameters": {"minutes": 20}}<|eot_id|>',
        "The timer is set to 20 minutes.<|eot_id|>",
    ]


def test_the_demos_model_has_a_row_for_every_token_and_its_packs_hold_every_conversation(
    words: Any, trained: list[Conversation]
) -> None:
    config = load_config(ROOT / "examples" / "demo.toml")
    assert config.model.shape is not None
    assert len(words) <= config.model.shape.vocab_size
    encoder = ChatEncoder(DEMO / "tokenizer")
    longest = max(trained, key=lambda conversation: len(str(conversation)))
    (example,) = encoder.encode_conversation(longest)
    assert len(example.tokens) <= config.data.capacity


def _plain(conversation: Conversation, end: int) -> tuple[object, ...]:
    """The first messages and the tools' names, as something that can be in a set; calls without their ids."""
    messages = [
        (message.role, message.content, *(f"{call.name} {call.arguments}" for call in message.tool_calls))
        for message in conversation.messages[:end]
    ]
    return (*messages, *sorted(tool["function"]["name"] for tool in conversation.tools))


def _answers(conversation: Conversation) -> list[str]:
    return [message.content or "" for message in conversation.messages if message.role == "assistant"]
