"""A turn that is stored in parts, or twice, is one message: calls, channels, thoughts and parts as text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sftstream import Message, Refused, ToolCall
from sftstream.config import RowSettings
from sftstream.formats import parse_row, unread_columns
from sftstream.formats.keys import WORDS
from sftstream.formats.unread import WORDS as COLUMNS
from sftstream.records import ToolCalls

HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
ADD = {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 1}}'}
SUB = {"role": "function_call", "content": {"name": "sub", "arguments": {}}}
RESULT = {"role": "tool_response", "content": "3"}
CALLS = ToolCalls((ToolCall("add", {"a": 1}), ToolCall("sub", {})))


def messages(*turns: dict[str, Any], **settings: Any) -> tuple[Message, ...]:
    """The messages after the user's "hi", from a table and from JSON text."""
    row = {"messages": [HI, *turns]}
    read = parse_row(row, RowSettings(**settings)).messages
    assert parse_row(json.dumps(row).encode(), RowSettings(**settings)).messages == read
    return read[1:]


def refusal(*turns: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(Refused) as error:
        messages(*turns, **settings)
    return str(error.value)


def test_calls_in_roles_of_their_own_are_one_turn_with_the_text_before_them() -> None:
    assert messages(ADD, SUB, RESULT, RESULT, HELLO) == (
        Message("assistant", None, tool_calls=CALLS),
        *(Message("tool", "3"), Message("tool", "3"), Message("assistant", "hello")),
    )
    assert messages({**HELLO, "reasoning": "greet"}, ADD, SUB) == (
        Message("assistant", "hello", "greet", tool_calls=CALLS),
    )
    beside = {"role": "assistant", "content": None, "tool_calls": [json.loads(ADD["content"])]}
    assert messages(beside, {**SUB, "role": "TOOL_CALL"}) == (Message("assistant", None, tool_calls=CALLS),)


@pytest.mark.parametrize("role", ["tool-call", "toolCall", "FunctionCall", "function call", "FUNCTION_CALL", "invoke"])
def test_a_role_of_calls_in_any_spelling_belongs_to_the_text_before_it(role: str) -> None:
    roles = {"invoke": "tool_call"} if role == "invoke" else {}
    call = {**ADD, "role": role}
    assert messages(HELLO, call, {**SUB, "role": role}, roles=roles) == (
        Message("assistant", "hello", tool_calls=CALLS),
    )


@pytest.mark.parametrize("name", ["function_call", "tool_call"])
def test_the_config_gives_a_role_of_calls_another_meaning(name: str) -> None:
    said = {"role": name, "content": "hello"}
    assert messages(said, HELLO, roles={name: "user"})[0] == Message("user", "hello")
    assert messages(said, {**said, "role": name.upper()}, roles={name: "assistant"}) == (
        Message("assistant", "hello"),
        Message("assistant", "hello"),
    )
    assert messages(HELLO, {**ADD, "role": name}, roles={name: "tool_call"})[0].tool_calls == CALLS[:1]


def test_calls_of_sharegpt_turns_are_one_turn_with_the_text_before_them() -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    calls = [{"from": "function_call", "value": json.dumps({"name": name, "arguments": {}})} for name in ("add", "sub")]
    joined = Message("assistant", "hello", tool_calls=ToolCalls((ToolCall("add", {}), ToolCall("sub", {}))))
    row = {"conversations": [*turns, *calls]}
    for stored in (row, json.dumps(row).encode(), {**row, "id": 1}):
        assert parse_row(stored).messages == (Message("user", "hi"), joined)
    for no_call in ("[]", ""):
        with pytest.raises(Refused, match="message without content"):
            parse_row({"conversations": [*turns, {"from": "function_call", "value": no_call}, *calls]})


def test_a_call_stays_a_turn_of_its_own_after_other_roles_and_before_a_text() -> None:
    first, second = (Message("assistant", None, tool_calls=ToolCalls((call,))) for call in CALLS)
    assert messages(ADD, RESULT, SUB) == (first, Message("tool", "3"), second)
    assert messages(ADD, HI, SUB) == (first, Message("user", "hi"), second)
    assert messages(ADD, HELLO) == (first, Message("assistant", "hello"))
    whole = {"role": "assistant", "content": None, "tool_calls": [json.loads(ADD["content"])]}
    assert messages(HELLO, whole) == (Message("assistant", "hello"), first)  # two messages of the assistant's role


@pytest.mark.parametrize("call", [ADD, {"type": "function_call", "name": "add", "arguments": '{"a": 1}'}])
def test_a_turn_whose_parts_have_different_marks_is_refused(call: dict[str, Any]) -> None:
    for text, mark in ((False, None), (None, False), (True, False)):
        assert refusal({**HELLO, "train": text}, {**call, "train": mark}).startswith(
            f"bad weight: two parts of one turn, such as its text and its call, have the marks {text} and {mark}, "
        )
    assert messages({**HELLO, "train": False}, {**call, "weight": 0})[0].train is False
    assert len(messages({**HELLO, "train": False}, {**call, "weight": 0})) == 1


THOUGHT = {"role": "assistant", "channel": "analysis", "content": "add them"}
CALL = {"role": "assistant", "channel": "commentary", "recipient": "functions.add", "content": '{"a": 1}'}
GIVEN = {"role": "tool", "name": "functions.add", "channel": "commentary", "recipient": "assistant", "content": "3"}
FINAL = {"role": "assistant", "channel": "final", "recipient": None, "content": [{"type": "text", "text": "3"}]}


def test_channels_of_harmony_are_reasoning_calls_and_text() -> None:
    called = ToolCalls(CALLS[:1])
    assert messages(THOUGHT, CALL, GIVEN, THOUGHT, FINAL) == (
        Message("assistant", None, "add them", called),
        Message("tool", "3", name="add"),
        Message("assistant", "3", "add them"),
    )
    preamble = {**CALL, "recipient": None, "content": "I add."}
    assert messages(THOUGHT, preamble, CALL) == (Message("assistant", "I add.", "add them", called),)
    assert messages({**CALL, "channel": None}) == (Message("assistant", None, tool_calls=called),)
    assert messages({**CALL, "content": ""}) == (
        Message("assistant", None, tool_calls=ToolCalls((ToolCall("add", {}),))),
    )
    assert messages({**THOUGHT, "train": False}, {**FINAL, "train": False})[0].train is False
    assert messages(THOUGHT, {**THOUGHT, "content": "say it"}, FINAL) == (
        Message("assistant", "3", "add them\n\nsay it"),
    )


@pytest.mark.parametrize(
    "result",
    [
        GIVEN,
        {"role": "tool", "name": "functions.add", "content": "3"},
        {"role": "functions.add", "content": "3"},
        {"role": "functions.add", "channel": "commentary", "recipient": "assistant", "content": "3"},
        {"role": "functions.add", "name": "add", "content": [{"type": "text", "text": "3"}]},
        {"from": "functions.add", "value": "3"},
    ],
)
def test_the_name_of_a_tool_is_without_the_namespace_of_harmony(result: dict[str, Any]) -> None:
    assert messages(CALL, result, FINAL)[1] == Message("tool", "3", name="add")


def test_a_role_of_harmony_may_have_another_meaning_in_the_config() -> None:
    said = {"role": "functions.add", "content": "3"}
    assert messages(said, FINAL, roles={"functions.add": "user"})[0] == Message("user", "3")
    assert messages({"role": "user", "name": "functions.add", "content": "3"}, FINAL)[0].name == "functions.add"
    assert refusal({**said, "role": "functions."}).startswith("unknown role: messages[1] has role 'functions.'")


def test_an_object_for_a_function_is_the_arguments_of_its_call() -> None:
    assert messages({**CALL, "content": {"a": 1}}) == messages(CALL)
    assert messages({**CALL, "content": {}})[0].tool_calls == ToolCalls((ToolCall("add", {}),))
    assert refusal({**FINAL, "content": {"a": 1}}).startswith("not text: messages[1] has content {'a': 1}, neither ")


def test_a_key_from_python_that_is_no_text_is_a_note() -> None:
    said = {**HELLO, 5: "y", None: "z", ("a",): True}
    assert parse_row({"messages": [HI, said]}).messages[1] == Message("assistant", "hello")
    assert parse_row({"messages": [HI, said], 5: "y"}).messages[1] == Message("assistant", "hello")
    assert unread_columns({"messages": [HI, said], 5: "y"}) == {
        "5",
        *(f"messages[].{key}" for key in (5, None, ("a",))),
    }
    assert parse_row({"question": "hi", "answer": "hello", 5: "y"}).messages[1] == Message("assistant", "hello")
    settings = RowSettings(ignore=("messages[].note",))
    assert parse_row({"messages": [HI, said]}, settings).messages[1] == Message("assistant", "hello")
    part = {"role": "assistant", "content": [{"type": "text", "text": "hello", 5: "y"}]}
    assert parse_row({"messages": [HI, part]}).messages[1] == Message("assistant", "hello")
    call = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}, 5: "y"}]}
    assert parse_row({"messages": [HI, call]}).messages[1].tool_calls == CALLS[:1]


def test_what_a_channel_cannot_say_is_refused() -> None:
    assert refusal(THOUGHT).startswith("message without content: reasoning is followed by neither a text nor a call")
    assert refusal({**CALL, "content": "a = 1"}).startswith("bad tool call: messages[1]: the arguments of 'add' are ")
    assert refusal({**THOUGHT, "thinking": "other"}, FINAL).startswith("two contents: messages[1]")
    code = {**CALL, "recipient": "python", "content": "1 + 2"}
    assert refusal(code).startswith("bad messages: messages[1] is for 'python', and only a call of functions.NAME can ")
    assert messages(code, ignore=("messages[].recipient",)) == (Message("assistant", "1 + 2"),)


def test_a_channel_of_another_meaning_is_a_note() -> None:
    for note in ({"channel": "mail"}, {"channel": ["analysis"]}, {"recipient": "Bob"}):
        assert messages({**HELLO, **note}) == (Message("assistant", "hello"),)
    assert messages({**HELLO, "channel": "analysis"}, ignore=("messages[].channel",)) == (
        Message("assistant", "hello"),
    )


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize(
    "content",
    [
        "<think>\nadd\n</think>\n\n5",
        "\n<think>add</think>5",
        "add\n</think>\n\n5",
        "<think>\n\n</think>\n\n5",
        "[THINK]add[/THINK]5",
    ],
)
def test_a_thought_that_the_content_repeats_is_read_once(key: str, content: str) -> None:
    said = {"role": "assistant", "content": content, key: " add "}
    assert messages(said) == (Message("assistant", "5", " add "),)
    assert messages(said, ignore=(f"messages[].{key}",)) == (Message("assistant", content),)
    parts = [{"type": "thinking", "thinking": "add"}, {"type": "text", "text": content}]
    assert messages({"role": "assistant", "content": parts}) == (Message("assistant", "5", "add"),)
    item = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "add"}]}
    assert messages(item, {"role": "assistant", "content": content}) == (Message("assistant", "5", "add"),)


def test_a_thought_in_the_content_beside_another_is_refused() -> None:
    said = {"role": "assistant", "content": "<think>add</think>5", "reasoning": "subtract"}
    assert refusal(said).startswith(
        "two contents: messages[1] has the reasoning 'subtract', and another thought in its content: 'add'; keep one of"
    )
    assert messages({**said, "reasoning": ""})[0].content == messages({**said, "reasoning": None})[0].content
    told = "Thoughts end with </think>, for example <think>add</think>."
    assert messages({**said, "content": told}) == (Message("assistant", told, "subtract"),)


TEXT = '[{"type": "text", "text": "hi"}]'


def test_typed_parts_that_are_the_whole_json_text_of_a_content_are_read() -> None:
    for column, content in (("content", TEXT), ("value", '[{"text":"hi","type":"input_text"}]')):
        row = {"messages": [{"role": "user", column: content}, HELLO]}
        for stored in (row, json.dumps(row).encode()):
            assert parse_row(stored).messages[0] == Message("user", "hi")
    result = json.dumps([{"type": "tool_result", "tool_use_id": "c1", "content": "3"}])
    assert messages(HELLO, {"role": "user", "content": result})[1] == Message("tool", "3", tool_call_id="c1")
    picture = json.dumps([{"type": "image_url", "image_url": {"url": "data:"}}])
    assert refusal({"role": "user", "content": picture}, HELLO).startswith("unknown content part: messages[1] has a ")


def test_typed_parts_as_text_of_the_assistant_are_refused_since_they_may_be_an_answer() -> None:
    answer = {"role": "assistant", "content": TEXT}
    assert refusal(answer).startswith("bad messages: messages[1] holds a list of typed parts as text: ")
    assert messages({**answer, "content": json.loads(TEXT)}) == (Message("assistant", "hi"),)
    assert messages({**answer, "content": [{"type": "text", "text": TEXT}]}) == (Message("assistant", TEXT),)
    assert messages({"role": "tool", "content": TEXT}, HELLO)[0] == Message("tool", TEXT)


@pytest.mark.parametrize(
    "text",
    [
        f"{TEXT} there",
        f" {TEXT}",
        "[]",
        "[{}]",
        '[{"type": "text"}]',
        '[{"type": "text", "text": null}]',
        '[{"type": "paragraph", "text": "hi"}]',
        '[{"type": ["text"], "text": "hi"}]',
        '[{"type": "text", "text": "hi"}, 5]',
        '[{"type": "text", "text": "hi"',
        '[{"name": "add", "arguments": {"type": "text"}}]',
        '{"type": "text", "text": "hi"}',
    ],
)
def test_other_json_is_the_words_of_a_message(text: str) -> None:
    said = ({"role": "user", "content": text}, {"role": "assistant", "content": text})
    assert messages(*said) == (Message("user", text), Message("assistant", text))


def test_keys_that_are_read_may_have_another_spelling() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    said = {
        "Role": "assistant",
        "Content": "hello",
        "reasoningContent": "greet",
        "toolCalls": [call],
        "functionCall": None,
    }
    result = {"role": "tool", "content": "3", "toolCallId": "c1", "tool-calls": None}
    read = (Message("assistant", "hello", "greet", ToolCalls(CALLS[:1])), Message("tool", "3", tool_call_id="c1"))
    assert messages(said, result) == read
    assert messages({"role": "assistant", "functionCall": call})[0].tool_calls == CALLS[:1]
    assert messages({"type": "function_call", "callId": "c1", **call})[0].tool_calls[0].id == "c1"
    assert unread_columns({"messages": [HI, {**said, "tokenCount": 5}]}) == {"messages[].tokenCount"}
    assert messages({**HELLO, "tool_calls": [call], "toolCalls": [call]})[0].tool_calls == CALLS[:1]
    assert refusal({**HELLO, "tool_calls": [call], "toolCalls": [{**call, "name": "sub"}]}).startswith(
        "two contents: messages[1] has different contents in ['toolCalls', 'tool_calls']; leave out the wrong keys"
    )


@pytest.mark.parametrize("key", ["reasoning_content", "reasoningContent", "Reasoning-Content"])
def test_a_key_is_ignored_in_all_its_spellings(key: str) -> None:
    said = {**HELLO, key: "greet"}
    for name in ("messages[].reasoning_content", f"messages[].{key}"):
        assert messages(said, ignore=(name,)) == (Message("assistant", "hello"),)
        assert unread_columns({"messages": [said]}, RowSettings(ignore=(name,))) == set()
    thought = {**HELLO, "content": "<think>wave</think>hello", key: "greet"}
    assert refusal(thought).endswith("the key of the reasoning by ignore = ['messages[].reasoning_content']")
    assert messages(thought, ignore=("messages[].reasoning_content",))[0].reasoning is None


def test_of_two_spellings_of_a_key_one_is_ignored_by_its_own_name() -> None:
    said = {**HELLO, "reasoning_content": "greet", "reasoningContent": "wave"}
    assert refusal(said).endswith("by ignore = ['messages[].reasoningContent'], for example")
    assert messages(said, ignore=("messages[].reasoningContent",)) == (Message("assistant", "hello", "greet"),)


def test_a_refusal_of_two_keys_that_cannot_be_ignored_advises_to_keep_one() -> None:
    for said in (
        {"role": "assistant", "content": [{"type": "text", "text": "a", "value": "b"}]},
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}, "input": {"a": 2}}]},
        {"role": "assistant", "content": [{"type": "tool_call", "value": {"name": "a"}, "tool_call": {"name": "b"}}]},
    ):
        assert refusal(said).startswith("two contents: messages[1]")
        assert refusal(said).endswith("; keep one of the keys")


def test_another_thought_in_an_answer_after_an_item_advises_no_key_that_the_item_lacks() -> None:
    item = {"type": "reasoning", "content": "greet"}
    assert refusal(item, {**HELLO, "content": "<think>wave</think>hello"}) == (
        "two contents: an answer has the reasoning 'greet', and another thought in its content: 'wave'; keep one of them"
    )


@pytest.mark.parametrize(
    "key",
    [
        *(
            "function_calls",
            "functionCalls",
            "tool_call",
            "tool_plan",
            "toolPlan",
            "reasoning_details",
            "thinkingBlocks",
        ),
        *("cot", "rationale", "chain_of_thought", "Chain of Thought", "image_urls", "attachments", "chatHistory"),
    ],
)
@pytest.mark.parametrize("words", ["get(a=1)", [{"text": "add"}]])
def test_words_under_a_known_name_in_any_spelling_are_refused_until_they_are_ignored(key: str, words: Any) -> None:
    said = refusal({**HELLO, key: words})
    assert said.startswith(f"unread words: messages[1].{key} holds words that no layout reads: ")
    assert said.endswith(f"or leave them out by ignore = ['messages[].{key}']")
    for ignored in (key, f"messages[].{key}"):
        assert messages({**HELLO, key: words}, ignore=(ignored,)) == (Message("assistant", "hello"),)
    for empty in (None, "", " ", [], {}):
        assert messages({**HELLO, key: empty}) == (Message("assistant", "hello"),)
    part = {"type": "text", "text": "hello", key: words}
    assert refusal({"role": "assistant", "content": [part]}).startswith(f"unread words: messages[1].{key} holds words")


def test_a_column_known_for_words_is_known_as_a_key_of_a_message() -> None:
    unknown = COLUMNS - WORDS
    assert unknown == {"data"}  # too common a name for other things
