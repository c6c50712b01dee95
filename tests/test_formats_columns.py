"""Columns beside the messages: reasoning, system prompt, tools; and what the settings of a source leave out or rename."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_formats_words import refusal

from sftstream import Message, ToolCall
from sftstream.config import RowSettings
from sftstream.formats import parse_row, unread_columns
from sftstream.records import ToolCalls

HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
SAID = (Message("user", "hi"), Message("assistant", "hello"))
THOUGHT = (Message("user", "hi"), Message("assistant", "hello", "greet"))
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"name": "weather", "description": "d", "parameters": SCHEMA}
CALL = {"name": "add", "arguments": {"a": 1}}


def messages(row: Any, **settings: Any) -> tuple[Message, ...]:
    found = parse_row(row, RowSettings(**settings)).messages
    assert found == parse_row(json.dumps(row).encode(), RowSettings(**settings)).messages
    return found


def tools(given: Any) -> tuple[dict[str, Any], ...]:
    row = {"messages": [HI, HELLO], "tools": given}
    assert parse_row(row).tools == parse_row(json.dumps(row).encode()).tools
    return parse_row(row).tools


@pytest.mark.parametrize(
    "tool",
    [
        WEATHER,
        {"name": "weather", "description": "d", "input_schema": SCHEMA},
        {"type": "custom", "name": "weather", "description": "d", "input_schema": SCHEMA},
        {"name": "weather", "description": "d", "inputSchema": SCHEMA},
        {"name": "weather", "description": "d", "inputSchema": SCHEMA, "parameters": SCHEMA},
        {"name": "weather", "description": "d", "input_schema": SCHEMA, "parameters": None, "function": None},
        {"name": "weather", "description": "d", "parameters": json.dumps(SCHEMA)},
        {"type": "function", **WEATHER},
        {"type": "function", "function": {"name": "weather", "description": "d", "input_schema": SCHEMA}},
        {"type": "function", "function": json.dumps(WEATHER)},
    ],
)
def test_the_schema_of_a_tool_is_its_parameters_in_every_layout(tool: dict[str, Any]) -> None:
    expected = ({"type": "function", "function": WEATHER},)
    assert tools([tool]) == tools(json.dumps([tool])) == expected
    if "type" not in tool and "function" not in tool:
        assert tools({"weather": tool}) == expected


def test_two_schemas_of_a_tool_are_refused() -> None:
    row = {"messages": [HI, HELLO], "tools": [{**WEATHER, "input_schema": {}}, {**WEATHER, "input_schema": {"a": 1}}]}
    assert refusal(row).startswith("two contents: tools has different contents in ['parameters', 'input_schema']")
    assert refusal(row).endswith("; keep one of the keys")


@pytest.mark.parametrize("kind", ["web_search_20250305", "custom", "computer_20250124"])
def test_a_tool_that_is_no_function_is_refused(kind: str) -> None:
    tool = {"type": kind, "name": "web_search", "max_uses": 5}
    assert refusal({"messages": [HI, HELLO], "tools": [WEATHER, tool]}) == (
        f"bad tools: the tool {tool} has the type {kind!r}, no parameters and no description; write it as a function "
        "with parameters, or leave it out of the tools"
    )


def test_a_described_tool_of_another_type_is_a_function() -> None:
    clock = {"name": "get_time", "description": "now"}
    for kind in ("tool", "custom", "function"):
        assert tools([{**clock, "type": kind}]) == ({"type": "function", "function": clock},)


@pytest.mark.parametrize("score", [0.93, 5])
@pytest.mark.parametrize("column", ["reasoning", "thinking"])
def test_a_number_in_a_column_of_reasoning_is_a_score(column: str, score: float) -> None:
    assert messages({"question": "hi", "answer": "hello", column: score}) == SAID
    assert messages({"question": "hi", "answer": "hello", column: score, "reasoning_content": "greet"}) == THOUGHT


def test_json_null_is_no_list_and_no_object() -> None:
    assert tools("null") == ()
    assert messages({"messages": [HI, {**HELLO, "tool_calls": "null"}], "chat_template_kwargs": "null"}) == SAID
    called = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": "null"}]}
    assert messages({"messages": [HI, called]})[1].tool_calls == (ToolCall("add", {}),)


@pytest.mark.parametrize("nulls", [{"name": None, "arguments": None}, {"id": None, "function": {"name": None}}])
def test_a_call_of_nulls_in_a_table_is_no_call(nulls: dict[str, Any]) -> None:
    assert messages({"messages": [HI, {**HELLO, "function_call": nulls}]}) == SAID
    both = {"role": "assistant", "tool_calls": [nulls, CALL]}
    assert messages({"messages": [HI, both]})[1].tool_calls == (ToolCall("add", {"a": 1}),)


def test_a_call_that_is_numbered_has_its_number_as_id() -> None:
    turns = [
        HI,
        {"role": "assistant", "tool_calls": [{**CALL, "id": 1}]},
        {"role": "tool", "content": "3", "tool_call_id": 1},
        {"role": "assistant", "content": [{"type": "tool_use", "id": 2, "name": "add", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": 2, "content": "3"}]},
    ]
    assert messages({"messages": turns})[1:] == (
        Message("assistant", tool_calls=ToolCalls([ToolCall("add", {"a": 1}, "1")])),
        Message("tool", "3", tool_call_id="1"),
        Message("assistant", tool_calls=ToolCalls([ToolCall("add", {"a": 1}, "2")])),
        Message("tool", "3", tool_call_id="2"),
    )
    assert refusal({"messages": [HI, {**HELLO, "tool_calls": [{**CALL, "id": True}]}]}).startswith("not text: ")


def test_a_tool_may_return_nothing() -> None:
    called, output = {"type": "function_call", **CALL, "call_id": "c"}, {"type": "function_call_output", "call_id": "c"}
    assert messages({"messages": [HI, HELLO, {"role": "tool", "content": None}]})[2] == Message("tool", "")
    assert messages({"messages": [HI, called, {**output, "output": None}]})[2] == Message("tool", "", tool_call_id="c")
    for nothing in ({"role": "tool"}, {"role": "tool", "content": None, "result": "3"}):
        assert refusal({"messages": [HI, HELLO, nothing]}).startswith("message without content: messages[2] (tool)")
    assert refusal({"messages": [HI, called, output]}).startswith("not text: messages[2].output")
    assert refusal({"messages": [{"role": "system", "content": None}, HI, HELLO]}).startswith("message without content")


def test_a_column_of_flags_is_ignored_without_the_thoughts_of_the_messages() -> None:
    row = {"reasoning": "step by step", "messages": [HI, {**HELLO, "reasoning": "greet"}]}
    assert refusal(row).endswith("or leave the column out by ignore = ['reasoning']")
    assert messages(row, ignore=("reasoning",)) == THOUGHT
    assert messages(row, ignore=("reasoning", "messages[].reasoning")) == SAID
    marked = {"weight": 0, "messages": [HI, {**HELLO, "weight": 0}]}
    assert messages(marked, ignore=("weight",))[1].train is False


def test_a_key_of_messages_is_ignored_without_the_column_of_its_name() -> None:
    row = {"system": "Be brief.", "messages": [HI, {**HELLO, "system": "Be long."}]}
    assert refusal(row).endswith("or leave them out by ignore = ['messages[].system']")
    assert messages(row, ignore=("messages[].system",)) == (Message("system", "Be brief."), *SAID)
    assert "messages[1].system holds words" in refusal(row, ignore=("system",))
    assert unread_columns({"messages": [{**HI, "note": 1}, HELLO]}, RowSettings(ignore=("messages[].note",))) == set()


def test_the_input_of_a_round_cannot_be_ignored_away() -> None:
    row = {"conversation": [{"input": "hi", "output": "hello"}]}
    assert messages(row, ignore=("input",)) == SAID
    assert refusal(row, ignore=("conversation[].input",)).startswith("not text: conversation[0].input is a NoneType")


@pytest.mark.parametrize(
    "mode", ["on", "off", "True", "none", "low", "detailed thinking off", " ", " OFF ", "/no_think"]
)
@pytest.mark.parametrize("column", ["reasoning", "thinking", "Thoughts", "CoT"])
def test_a_value_that_switches_reasoning_is_no_reasoning(mode: str, column: str) -> None:
    assert messages({"messages": [HI, HELLO], column: mode}) == SAID
    assert messages({"prompt": "hi", "completion": "hello", column: mode}) == SAID


def test_words_of_a_column_are_not_found_inside_of_other_words() -> None:
    turns = [HI, {**HELLO, "content": "Once upon 21 times (here)."}]
    for inside in ("on", "1", "time"):
        assert refusal({"messages": turns, "answer": inside}).startswith("unread words: column 'answer'")
    for found in ("21", "upon 21", "(here)", "Once"):
        assert len(messages({"messages": turns, "answer": found})) == 2
    assert len(messages({"messages": [HI, {**HELLO, "content": "答案是四。"}], "answer": "是四"})) == 2


@pytest.mark.parametrize("column", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize(
    "row",
    [
        {"question": "hi", "answer": "hello"},
        {"instruction": "hi", "output": "hello"},
        {"prompt": [HI], "completion": [HELLO]},
        {"prompt": "hi", "chosen": [HI, HELLO]},
        {"question": "hi", "answer": [{**HELLO, "reasoning": " greet\n"}]},
    ],
)
def test_a_column_of_reasoning_is_the_thought_of_the_answer(row: dict[str, Any], column: str) -> None:
    said = messages({**row, column: "greet"})
    assert [(message.content, (message.reasoning or "").strip()) for message in said] == [
        ("hi", ""),
        ("hello", "greet"),
    ]
    assert unread_columns({**row, column: "greet"}) == set()


def test_a_column_of_reasoning_is_read_under_any_name_by_the_setting_columns() -> None:
    row = {"Question": "hi", "Complex_CoT": "greet", "Response": "hello"}
    columns = {"question": "Question", "response": "Response", "reasoning": "Complex_CoT"}
    assert messages(row, columns=columns) == THOUGHT
    assert (
        messages(
            {"input": "hi", "reasoning_content": "greet", "content": "hello", "id": 1},
            columns={"question": "input", "answer": "content", "thinking": "reasoning_content"},
        )
        == THOUGHT
    )


@pytest.mark.parametrize(
    "answer",
    [
        *("<think>\ngreet\n</think>\n\nhello", "greet</think>hello", "<reasoning>greet</reasoning>hello"),
        *("<think></think>hello", "</think>\n\nhello", "<|begin_of_thought|>greet<|end_of_thought|>\nhello"),
    ],
)
def test_a_thought_that_the_answer_repeats_is_read_once(answer: str) -> None:
    assert messages({"question": "hi", "answer": answer, "reasoning": "greet"}) == THOUGHT
    assert messages({"question": "hi", "answer": [{**HELLO, "content": answer, "reasoning": "greet"}]}) == THOUGHT
    assert messages({"question": "hi", "answer": [{**HELLO, "content": answer}], "reasoning": "greet"}) == THOUGHT


@pytest.mark.parametrize("answer", ["<think>greet</think>hello", "<|begin_of_thought|>greet<|end_of_thought|>hello"])
def test_a_thought_in_the_answer_beside_another_in_a_column_is_refused(answer: str) -> None:
    row = {"question": "hi", "answer": answer}
    for other in ("gree", "greet twice"):
        assert refusal({**row, "reasoning": other}) == (
            f"two contents: the answer has the reasoning {other!r}, and another thought in its content: 'greet'; keep one "
            "of them, or leave out the key of the reasoning by ignore = ['reasoning']"
        )
        assert messages({**row, "reasoning": other}, ignore=("reasoning",)) == messages(row)


@pytest.mark.parametrize("answer", ["The tag </think> closes.", "</think> closes.", "a </think> b <think> c </think>"])
def test_a_tag_among_the_words_of_an_answer_is_no_thought(answer: str) -> None:
    said = (Message("user", "hi"), Message("assistant", answer, "greet"))
    assert messages({"question": "hi", "answer": answer, "reasoning": "greet"}) == said
    assert messages({"messages": [HI, {**HELLO, "content": answer, "reasoning": "greet"}]}) == said


def test_a_thought_ends_at_the_first_of_its_tags() -> None:
    answer = "<thinking>greet</thinking>The tag </think> closes."
    said = (Message("user", "hi"), Message("assistant", "The tag </think> closes.", "greet"))
    assert messages({"question": "hi", "answer": answer, "reasoning": "greet"}) == said
    assert messages({"messages": [HI, {**HELLO, "content": answer, "reasoning": "greet"}]}) == said


def test_an_answer_that_repeats_its_thought_without_a_tag_stays_as_it_is() -> None:
    assert messages({"question": "hi", "answer": "greet: hello", "reasoning": "greet"})[1].reasoning == "greet"


def test_a_reasoning_that_belongs_to_no_single_answer_is_refused() -> None:
    for row in (
        {"question": "hi", "answer": [HELLO, HI, HELLO], "reasoning": "greet"},
        {"question": "hi", "answer": "hello", "reasoning": "greet", "thinking": "wave"},
        {"question": "hi", "answer": [{**HELLO, "thinking": "wave"}], "reasoning": "greet"},
    ):
        assert refusal(row).startswith("two contents: the reasoning in column 'reasoning' is not that of one answer")
    assert messages({"question": "hi", "answer": "hello", "reasoning": "greet", "thinking": "greet"}) == THOUGHT
    assert refusal({"question": "hi", "answer": "hello", "reasoning": {"steps": ["greet"]}}).startswith(
        "not text: reaso"
    )


def test_turns_with_their_answer_in_a_column_name_the_columns_that_read_it() -> None:
    row = {"messages": [HI], "tools": [WEATHER], "reasoning": "greet", "answer": "hello", "model": "m"}
    columns = {"prompt": "messages", "completion": "answer", "reasoning": "reasoning", "tools": "tools"}
    listed = ", ".join(f'{name} = "{column}"' for name, column in columns.items())
    assert refusal(row).endswith(f"; read the answer in column 'answer' by columns = {{{listed}}}")
    assert messages(row, columns=columns) == THOUGHT
    assert refusal({"messages": [HI]}) == "no assistant message: its roles are ['user']"


@pytest.mark.parametrize("spaces", ["", "\n", "  "])
def test_a_system_prompt_is_read_once_whatever_the_white_space_around_it(spaces: str) -> None:
    system = {"role": "system", "content": f"Be brief.{spaces}"}
    expected = (Message("system", f"Be brief.{spaces}"), *SAID)
    assert messages({"system": "Be brief.", "messages": [system, HI, HELLO]}) == expected
    assert messages({"system": "Be brief.", "prompt": [system, HI], "completion": "hello"}) == expected
    asked = {"prompt": [{**system, "content": "Be brief."}, HI], "chosen": [system, HI, HELLO]}
    assert messages(asked) == expected
    assert refusal({**asked, "chosen": [system, system, HI, HELLO]}).startswith("two questions: ")


def test_a_system_prompt_may_be_a_list_of_text_parts() -> None:
    parts = [
        {"type": "text", "text": "Be "},
        {"type": "text", "text": "brief.", "cache_control": {"type": "ephemeral"}},
    ]
    assert messages({"system": parts, "messages": [HI, HELLO]}) == (Message("system", "Be brief."), *SAID)
    assert messages({"system": json.dumps(parts), "messages": [HI, HELLO]})[0] == Message("system", "Be brief.")
    alpaca = {"instruction": "hi", "output": "hello", "system": json.dumps(parts)}
    assert messages(alpaca) == (Message("system", "Be brief."), *SAID)
    marked = {"system": [{**parts[0], "loss": 1}], "messages": [HI, HELLO]}
    assert refusal(marked).endswith("or leave the key out by ignore = ['system[].loss']")
    assert messages(marked, ignore=("system[].loss",)) == (Message("system", "Be "), *SAID)
    thinking = [{"type": "thinking", "thinking": "hm"}]
    assert refusal({"system": thinking, "messages": [HI, HELLO]}).startswith("unknown content part: system has parts")


@pytest.mark.parametrize(("call", "result"), [("function-call", "function-response"), ("toolCall", "Tool Result")])
def test_roles_are_known_in_every_spelling(call: str, result: str) -> None:
    turns = [
        {"from": "Human", "value": "hi"},
        {"from": call, "value": json.dumps(CALL)},
        {"from": result, "value": "3"},
    ]
    assert messages({"conversations": turns}) == (
        Message("user", "hi"),
        Message("assistant", tool_calls=ToolCalls([ToolCall("add", {"a": 1})])),
        Message("tool", "3"),
    )


def test_a_role_of_the_source_may_hold_calls() -> None:
    for name in ("invoke", "gpt"):
        turns = [HI, {"role": name, "content": json.dumps(CALL)}]
        called = Message("assistant", tool_calls=ToolCalls([ToolCall("add", {"a": 1})]))
        assert messages({"messages": turns}, roles={name: "tool_call"}) == (SAID[0], called)
    assert refusal({"messages": [HI, {"role": "invoke", "content": "x"}]}).endswith("adds names, 'tool_call' for calls")
