"""A row of any known layout becomes one conversation, or is refused with the field that is not as it should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftstream import Conversation, Message, Refused, ToolCall
from sftstream.config import RowSettings
from sftstream.formats import LAYOUTS, ROLES, parse_row
from sftstream.formats.layouts import parse_layout
from sftstream.formats.typed import typed_json, typed_messages
from sftstream.records import BrokenRow, ToolCalls

USER, ANSWER = Message("user", "hi"), Message("assistant", "hello")
HI = {"role": "user", "content": "hi"}
CALL = ToolCall("add", {"a": 1, "b": [2]})
FUNCTION = {"name": "add", "arguments": {"a": 1, "b": [2]}}


def messages(row: Any) -> tuple[Message, ...]:
    return parse_row(row).messages


def said(**turn: Any) -> Message:
    """The assistant's message after "hi"."""
    return messages({"messages": [HI, {"role": "assistant", **turn}]})[1]


def refusal(row: Any) -> str:
    with pytest.raises(Refused) as error:
        parse_row(row)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [HI, {"role": "assistant", "content": "hello"}]},
        {"messages": json.dumps([HI, {"role": "assistant", "content": "hello"}])},
        {"messages": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"conversations": [HI, {"role": "assistant", "content": "hello"}]},
        {"conversation": [{"input": "hi", "output": "hello"}]},
        {"data": ["hi", "hello"]},
        {"instruction": "hi", "input": "", "output": "hello"},
        {"instruction": "hi", "output": "hello", "system": "", "history": []},
        {"instruction": "hi", "response": "hello"},
        {"prompt": "hi", "completion": "hello"},
        {"prompt": "hi", "response": "hello"},
        {"prompt": [HI], "completion": [{"role": "assistant", "content": "hello"}]},
        {"question": "hi", "answer": "hello", "id": 7},
        {"messages": None, "prompt": "hi", "completion": "hello"},
        {
            "messages": [
                {"role": "user", "from": None, "content": "hi", "value": None},
                {"role": None, "from": "gpt", "content": None, "value": "hello"},
            ]
        },
    ],
)
def test_every_layout_gives_the_same_conversation(row: dict[str, Any]) -> None:
    assert parse_row(row) == Conversation((USER, ANSWER))


def test_the_layouts_are_those_the_error_lists() -> None:
    assert refusal({"text": "hi", "b": 1}) == (
        "unknown layout: columns ['b', 'text'] match none of messages | conversations | conversation | "
        "instruction + output/response/answer/completion/chosen | "
        "prompt/question/query/input + completion/response/answer/output/chosen | data; verified = false of the "
        "source trains plain text or token ids, of which nothing can be proved"
    )
    assert refusal({"Instruction": "hi"}).endswith(
        "| data; columns = {...} of the source reads columns under these names"
    )
    assert len(LAYOUTS) == 6


def test_alpaca_joins_the_input_to_the_instruction_by_an_empty_line() -> None:
    assert messages({"instruction": "add", "input": "1 2", "output": "3"})[0] == Message("user", "add\n\n1 2")


def test_alpaca_history_comes_before_the_question() -> None:
    row = {"instruction": "hi", "output": "hello", "history": [["a", "b"], ("c", "d")], "system": "s"}
    texts = [(message.role, message.content) for message in messages(row)]
    assert texts == [
        ("system", "s"),
        *(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        *(("user", "hi"), ("assistant", "hello")),
    ]


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_prompt_in_a_column_of_its_own_comes_first(column: str) -> None:
    for row in ({"conversations": [HI, {"from": "gpt", "value": "hello"}]}, {"prompt": "hi", "completion": "hello"}):
        assert messages({**row, column: "be kind"}) == (Message("system", "be kind"), USER, ANSWER)


@pytest.mark.parametrize(("name", "role"), ROLES.items())
def test_every_name_of_a_role_is_known(name: str, role: str) -> None:
    content = FUNCTION if name.endswith("_call") else "x"
    turns = [HI, {"role": name, "content": content}, {"role": "assistant", "content": "hello"}]
    assert messages({"messages": turns})[1].role == role


@pytest.mark.parametrize(
    "turn",
    [
        {"tool_calls": [{"type": "function", "function": FUNCTION}]},
        {"tool_calls": [{"function": {"name": "add", "arguments": json.dumps(FUNCTION["arguments"])}}]},
        {"tool_calls": [FUNCTION]},
        {"tool_calls": FUNCTION},
        {"tool_calls": json.dumps([FUNCTION])},
        {"tool_calls": [json.dumps(FUNCTION)]},
        {"tool_calls": [{"name": "add", "parameters": FUNCTION["arguments"]}]},
        {"tool_calls": [{"name": "add", "arguments": None, "parameters": FUNCTION["arguments"]}]},
        {"function_call": FUNCTION},
        {"function_call": {"name": "add", "arguments": json.dumps(FUNCTION["arguments"])}},
        {"content": [{"type": "tool_call", "value": FUNCTION}]},
        {"content": [{"type": "tool_call", "value": json.dumps(FUNCTION)}]},
        {"role": "function_call", "content": json.dumps(FUNCTION)},
        {"role": "function_call", "content": FUNCTION},
    ],
)
def test_a_tool_call_is_the_same_in_every_spelling(turn: dict[str, Any]) -> None:
    assert said(**{"content": None, **turn}) == Message("assistant", None, tool_calls=(CALL,))


def test_a_tool_call_keeps_its_id_and_text_beside_it() -> None:
    message = said(content="let me see", tool_calls=[{"id": "c1", "function": FUNCTION}, FUNCTION])
    assert message == Message("assistant", "let me see", tool_calls=(ToolCall("add", CALL.arguments, "c1"), CALL))


@pytest.mark.parametrize("arguments", [{}, None, "", "{}", " {} "])
def test_a_call_without_arguments_has_none(arguments: Any) -> None:
    assert said(tool_calls=[{"name": "now", "arguments": arguments}]).tool_calls == (ToolCall("now", {}),)


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": {"name": "add"}}],
        [{"name": "add"}],
        {"name": "add"},
        json.dumps([{"name": "add"}]),
        [json.dumps({"name": "add"})],
        json.dumps({"name": "add"}),
    ],
)
def test_tools_are_the_same_in_every_spelling(tools: Any) -> None:
    row = {"prompt": "hi", "completion": "hello", "tools": tools}
    assert parse_row(row).tools == ({"type": "function", "function": {"name": "add"}},)


@pytest.mark.parametrize("tools", [None, [], "", "[]", "{}"])
def test_no_tools_are_none(tools: Any) -> None:
    assert parse_row({"prompt": "hi", "completion": "hello", "tools": tools}).tools == ()


def test_typed_parts_are_text_reasoning_and_calls() -> None:
    parts = [
        {"type": "reasoning", "reasoning": "hm"},
        {"type": "thinking", "thinking": ", well"},
        {"type": "text", "text": "a", "value": None},
        {"type": "output_text", "value": "b"},
        {"type": "input_text", "text": None, "value": "c"},
        {"type": "tool_call", "value": FUNCTION},
    ]
    assert said(content=parts) == Message("assistant", "abc", "hm, well", (CALL,))


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_a_field_of_its_own_is_kept(field: str) -> None:
    assert said(content="hello", **{field: "hm"}) == Message("assistant", "hello", "hm")


def test_a_tools_result_may_be_an_object_and_keeps_its_name_and_id() -> None:
    result = {"role": "tool", "content": {"sum": 3}, "name": "add", "tool_call_id": "c1"}
    message = messages({"messages": [HI, result, {"role": "assistant", "content": "3"}]})[1]
    assert message == Message("tool", '{"sum":3}', name="add", tool_call_id="c1")


def test_text_is_taken_as_it_is() -> None:
    text = " \x00\u2028 é {not json \ud83d\ude00 ".encode("utf-16", "surrogatepass").decode("utf-16")
    assert said(content=text).content == text
    assert said(content="").content == ""


ANSWERED = {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'["hi"]', "unknown layout: the row is a list, not an object with columns"),
        (b"5", "unknown layout: the row is a int, not an object with columns"),
        (b"null", "unknown layout: the row is a NoneType, not an object with columns"),
        ({"messages": []}, "empty conversation: it has no messages"),
        ({"messages": [HI]}, "no assistant message: its roles are ['user']"),
        ({"messages": "hi"}, "bad messages: messages is a str, not a list of messages"),
        ({"messages": {"a": 1}}, "bad messages: messages is a dict, not a list of messages"),
        ({"messages": 7}, "bad messages: messages is a int, not a list of messages"),
        ({"conversations": [HI, "hello"]}, "bad messages: conversations[1] is a str, not an object"),
        ({"messages": [{"content": "hi"}]}, "unknown role: messages[0] has role None; known are system, "),
        (
            {"messages": [HI, {"role": "narrator", "content": "x"}]},
            "unknown role: messages[1] has role 'narrator'; known",
        ),
        ({"messages": [HI, {"role": ["user"], "content": "x"}]}, "unknown role: messages[1] has role ['user']; known"),
        (
            {"messages": [HI, {"role": "assistant", "content": None}]},
            "message without content: messages[1] (assistant) has neither content nor tool calls",
        ),
        ({"messages": [HI, {"role": "assistant", "content": []}]}, "message without content: messages[1]"),
        ({"messages": [{"role": "user"}, ANSWERED]}, "message without content: messages[0] (user)"),
        ({"messages": [HI, {"from": "function_call"}]}, "message without content: messages[1] (assistant)"),
        (
            {"messages": [HI, {"role": "assistant", "content": 5}]},
            "not text: messages[1] has content 5, neither text nor a list of parts",
        ),
        ({"messages": [HI, {"role": "assistant", "content": False}]}, "not text: messages[1] has content False"),
        ({"messages": [{"role": "user", "content": {"a": 1}}, ANSWERED]}, "not text: messages[0] has content {'a': 1}"),
        ({"messages": [{"role": "user", "content": b"hi"}, ANSWERED]}, "not text: messages[0] has content b'hi'"),
        (
            {"messages": [HI, {"role": "assistant", "content": ["hello"]}]},
            "unknown content part: messages[1] has a part 'hello'; text, reasoning, tool_call are known",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWERED]},
            "unknown content part: messages[0] has a part {'type': 'image_url', 'image_url': 'x'}; text, ",
        ),
        (
            {"messages": [HI, {"role": "assistant", "content": [{"type": "text", "text": 5}]}]},
            "not text: messages[1] is a int: 5",
        ),
        (
            {"messages": [HI, {**ANSWERED, "reasoning_content": ["hm"]}]},
            "not text: messages[1].reasoning_content is a list: ['hm']",
        ),
        ({"messages": [{**HI, "name": 5}, ANSWERED]}, "not text: messages[0].name is a int: 5"),
        ({"messages": [{**HI, "tool_call_id": {}}, ANSWERED]}, "not text: messages[0].tool_call_id is a dict: {}"),
        ({"messages": [HI, {**ANSWERED, "tool_calls": 5}]}, "bad tool call: messages[1].tool_calls: 5 has no name"),
        (
            {"messages": [HI, {**ANSWERED, "tool_calls": "add(1)"}]},
            "bad tool call: messages[1].tool_calls: 'add(1)' has no",
        ),
        (
            {"messages": [HI, {**ANSWERED, "tool_calls": [{"name": "add"}]}]},
            "bad tool call: messages[1].tool_calls: {'name'",
        ),
        ({"messages": [HI, {**ANSWERED, "tool_calls": [{"name": "f", "args": {"a": 1}}]}]}, "bad tool call: "),
        ({"messages": [HI, {**ANSWERED, "tool_calls": [{"function": "add"}]}]}, "bad tool call: "),
        ({"messages": [HI, {**ANSWERED, "tool_calls": [{"name": 5, "arguments": {}}]}]}, "bad tool call: "),
        ({"messages": [HI, {**ANSWERED, "tool_calls": [{"name": "f", "arguments": "a=1"}]}]}, "bad tool call: "),
        (
            {"messages": [HI, {**ANSWERED, "tool_calls": [{"name": "f", "arguments": '{"a": "\\ud800"}'}]}]},
            "bad tool call: ",
        ),
        (
            {"messages": [HI, {**ANSWERED, "tool_calls": [{**FUNCTION, "id": 5.5}]}]},
            "not text: messages[1].tool_calls.id is",
        ),
        (
            {"messages": [HI, {**ANSWERED, "function_call": {"name": "f"}}]},
            "bad tool call: messages[1].function_call: ",
        ),
        ({"prompt": "hi", "completion": "x", "tools": 5}, "bad tools: 5 is not a list of tool definitions"),
        ({"prompt": "hi", "completion": "x", "tools": True}, "bad tools: True is not a list of tool definitions"),
        ({"prompt": "hi", "completion": "x", "tools": "add"}, "bad tools: 'add' is not a list of tool definitions"),
        ({"prompt": "hi", "completion": "x", "tools": ["add"]}, "bad tools: ['add'] is not a list of tool definitions"),
        ({"instruction": 5, "output": "x"}, "not text: instruction is a int: 5"),
        ({"instruction": "hi", "input": [1], "output": "x"}, "not text: input is a list: [1]"),
        ({"instruction": "hi", "output": ["x"]}, "not text: output is a list: ['x']"),
        ({"instruction": "hi", "output": "x", "system": 5}, "not text: system is a int: 5"),
        ({"instruction": "hi", "output": "x", "history": 5}, "bad history: 5 is not a pair of question and answer"),
        (
            {"instruction": "hi", "output": "x", "history": ["ab"]},
            "bad history: 'ab' is not a pair of question and answer",
        ),
        ({"instruction": "hi", "output": "x", "history": [["a"]]}, "bad history: ['a'] is not a pair of question and"),
        ({"instruction": "hi", "output": "x", "history": [["a", 5]]}, "not text: history[1] is a int: 5"),
        ({"prompt": 5, "completion": "x"}, "bad messages: prompt is a int, not a list of messages"),
        (
            {"messages": [HI, {**ANSWERED, "content": [{"type": "x" * 200}]}]},
            "unknown content part: messages[1] has a part",
        ),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_with_its_path(row: Any, message: str) -> None:
    text = refusal(row)
    assert text.startswith(message)
    assert len(text) < 300


def nested(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("levels", [64, 900])
def test_a_row_nested_too_deep_is_refused_wherever_the_depth_is(levels: int) -> None:
    deep = "nested too deep: the row nests lists and objects more than 64 levels deep; flatten it"
    call = {"name": "f", "arguments": json.dumps({"a": nested(levels)})}
    assert refusal({"messages": [HI, ANSWERED], "note": nested(levels)}) == deep
    assert refusal({"messages": [HI, {**ANSWERED, "tool_calls": [call]}]}) == deep
    assert refusal({"messages": [HI, ANSWERED], "tools": json.dumps([nested(levels)])}) == deep


SPOKEN = {"name": "f", "arguments": {"a": 1}}
scalars = st.sampled_from([None, "", "x", " ", 0, 1, 1.0, True, False, [], {}, ["x"], {"a": "b"}, nested(70)])
calls = st.sampled_from(
    [SPOKEN, [SPOKEN], json.dumps([SPOKEN]), [{"id": "c", "type": "function", "function": SPOKEN}], [3]]
)
roles = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "function_call", "oracle", None, 1])
turns = st.dictionaries(
    st.sampled_from(
        ["content", "value", "reasoning", "reasoning_content", "name", "tool_call_id", "tool_calls", "train", "n"]
    ),
    scalars | calls,
    max_size=3,
).flatmap(lambda fields: roles.map(lambda role: {"role": role, "content": "words", **fields}))
columns = st.dictionaries(
    st.sampled_from(["tools", "system", "system_prompt", "id", "conversations", "prompt"]), scalars | calls, max_size=2
)


def read(way: Callable[[Any], Any], row: Any) -> Any:
    try:
        return way(row)
    except Refused as refused:
        return refused.reason, refused.detail


@settings(max_examples=500, deadline=None)
@given(st.lists(turns, max_size=3), columns)
def test_what_is_recognised_by_its_types_is_what_is_read_field_by_field(
    messages: list[dict[str, Any]], columns: dict[str, Any]
) -> None:
    row = {"messages": messages, **columns}
    found = read(typed_messages, row)
    assert found is None or found == read(parse_layout, row)
    assert read(parse_row, msgspec.json.encode(row)) == read(parse_row, row)


def test_messages_are_recognised_by_their_types() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [SPOKEN]}
    calling = Message("assistant", tool_calls=ToolCalls([ToolCall("f", {"a": 1})]))
    assert typed_messages({"messages": [HI, called, ANSWERED], "id": 3}) == (USER, calling, ANSWER)
    row = {"messages": [HI, called, ANSWERED], "tools": [{"name": "f"}]}
    found = typed_json(msgspec.json.encode(row))
    assert found == Conversation((USER, calling, ANSWER), ({"type": "function", "function": {"name": "f"}},))
    assert typed_json(msgspec.json.encode(row | {"id": 3})) is None


@pytest.mark.parametrize("levels", range(57, 66))
def test_nesting_counts_alike_in_json_and_in_objects(levels: int) -> None:
    rows = [
        {"messages": [HI, {**ANSWERED, "tool_calls": [{"name": "f", "arguments": {"a": nested(levels)}}]}]},
        {"messages": [HI, ANSWERED], "tools": [{"name": "f", "a": nested(levels)}]},
        {"messages": [HI, ANSWERED], "note": nested(levels)},
    ]
    for row in rows:
        general = read(parse_layout, row)
        assert isinstance(general[0], str) == isinstance(read(parse_row, row), tuple)
        assert read(parse_row, msgspec.json.encode(row)) == read(parse_row, row)


def test_nesting_within_the_limit_is_kept() -> None:
    row = {"messages": [HI, {**ANSWERED, "tool_calls": [{"name": "f", "arguments": json.dumps({"a": nested(63)})}]}]}
    assert parse_row({**row, "note": nested(63)}).messages[1].tool_calls[0].arguments == {"a": nested(63)}


def test_text_that_looks_like_json_too_deep_to_decode_is_no_tool_call() -> None:
    call = {"name": "f", "arguments": "[" * 100_000}
    assert refusal({"messages": [HI, {**ANSWERED, "tool_calls": [call]}]}).startswith("bad tool call: messages[1]")


def test_rounds_of_input_and_output_are_a_conversation() -> None:
    row = {"conversation": [{"system": "be brief", "input": "a", "output": "b"}, {"input": "c", "output": "d"}]}
    assert parse_row(row).messages == (
        Message("system", "be brief"),
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("assistant", "d"),
    )
    named = {"conversation": [{"role": "human", "content": "a"}, {"role": "bot", "content": "b"}]}
    assert parse_row(named).messages == (Message("user", "a"), Message("assistant", "b"))
    with pytest.raises(Refused, match=r"not text: conversation\[0\].output is a NoneType"):
        parse_row({"conversation": [{"input": "a"}]})


def test_texts_by_turns_are_a_conversation() -> None:
    assert parse_row({"id": "7", "data": ["a", "b", "c"]}).messages == (
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
    )
    with pytest.raises(Refused, match=r"bad messages: data is a int, not a list of texts"):
        parse_row({"data": 5})


@pytest.mark.parametrize(
    ("flag", "train"), [({"train": False}, False), ({"weight": 0}, False), ({"weight": 1.0}, True), ({}, None)]
)
def test_a_message_says_whether_it_is_trained(flag: dict[str, Any], train: bool | None) -> None:
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"} | flag]}
    assert parse_row(row).messages[1].train is train


def test_a_message_cannot_be_trained_half() -> None:
    with pytest.raises(Refused, match="bad weight"):
        parse_row({"messages": [{"role": "assistant", "content": "b", "weight": 0.5}]})


def test_columns_are_renamed_and_the_others_left_out() -> None:
    columns = {"instruction": "q", "output": "r"}
    for row in ({"q": "hi", "r": "hello", "messages": 5}, b'{"messages": 5, "r": "hello", "q": "hi"}'):
        assert parse_row(row, RowSettings(columns=columns)) == Conversation((USER, ANSWER))
    typed = {"messages": [HI, ANSWERED], "q": "a", "r": "b"}
    for row in (typed, msgspec.json.encode(typed)):
        assert parse_row(row, RowSettings(columns=columns)).messages == (
            Message("user", "a"),
            Message("assistant", "b"),
        )
    with pytest.raises(
        Refused, match=r"^unknown layout: columns \['output'\], of which \['output'\] have no value, match none of"
    ):
        parse_row({"r": None}, RowSettings(columns=columns))
    with pytest.raises(BrokenRow) as error:
        parse_row({"s": 1, "messages": 2}, RowSettings(columns=columns))
    assert str(error.value) == "has none of the columns ['q', 'r']; it has ['messages', 's']"
    with pytest.raises(Refused, match="unknown layout: the row is a list, not an object"):
        parse_row(b"[1]", RowSettings(columns=columns))


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b'{"messages": [', b'{"messages": [{"role": "\xff"}]}', b'{"messages": ' + b"[" * 100_000, b"x"],
    ids=["nothing", "cut off", "cut off after messages", "no UTF-8", "deep", "no JSON"],
)
def test_a_row_that_is_not_json_is_broken(text: bytes) -> None:
    with pytest.raises(BrokenRow, match=r"^is not JSON: .") as error:
        parse_row(text)
    assert "\n" not in str(error.value)
