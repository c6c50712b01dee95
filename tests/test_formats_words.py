"""Words of a row are read, or the row is refused: no column, key or spelling loses words in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sftstream import Conversation, Message, Refused, ToolCall
from sftstream.config import RowSettings
from sftstream.formats import parse_row, unread_columns
from sftstream.formats.keys import NOTES
from sftstream.records import BrokenRow

HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
SAID = (Message("user", "hi"), Message("assistant", "hello"))
FUNCTION = {"name": "add", "arguments": {"a": 1}}
ADD = ToolCall("add", {"a": 1})


def messages(row: Any, **settings: Any) -> tuple[Message, ...]:
    return parse_row(row, RowSettings(**settings)).messages


def refusal(row: Any, **settings: Any) -> str:
    with pytest.raises(Refused) as error:
        parse_row(row, RowSettings(**settings))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": json.dumps([HI]), "completion": json.dumps([HELLO])},
        {"prompt": [HI], "completion": json.dumps([HELLO])},
        {"prompt": "hi", "chosen": json.dumps([HI, HELLO])},
        {"question": "hi", "chosen": "hello", "rejected": "no"},
        {"conversations": json.dumps([HI, HELLO])},
        {"conversations": [json.dumps(HI), json.dumps(HELLO)]},
        {"conversations": ["hi", "hello"]},
        {"messages": ["hi", "hello"], "source": "lima"},
        {"conversations": {"from": ["human", "gpt"], "value": ["hi", "hello"]}},
        {"messages": {"role": ["user", "assistant"], "content": ["hi", "hello"], "name": None}},
        {"query": "hi", "response": "hello"},
        {"input": "hi", "output": "hello"},
        {"messages": [{"role": "User", "content": "hi"}, {"role": "ASSISTANT", "content": "hello"}]},
        {"messages": [{"type": "human", "content": "hi"}, {"type": "ai", "content": "hello"}]},
        {"messages": [{"role": "user", "text": "hi"}, {"role": "assistant", "text": "hello"}]},
        {
            "messages": [
                HI,
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hello"}]},
            ]
        },
        {"messages": [HI, HELLO], "prompt": " hi ", "answer": "hello", "score": 3.5, "functions": []},
    ],
)
def test_layouts_of_others_give_the_same_conversation(row: dict[str, Any]) -> None:
    assert parse_row(row) == Conversation(SAID)
    assert parse_row(json.dumps(row).encode()) == Conversation(SAID)


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_messages_in_another_notation_than_json_are_refused(column: str) -> None:
    row = {"prompt": "hi", "completion": "hello", column: str([HI, HELLO])}
    assert refusal(row).startswith(f"bad messages: {column} spells out messages, but is not a JSON list of messages: ")


@pytest.mark.parametrize("row", [{"instruction": json.dumps([HI]), "output": "x"}, {"data": [json.dumps([HI]), "x"]}])
def test_messages_as_text_are_refused_in_a_layout_of_texts(row: dict[str, Any]) -> None:
    assert " holds a list of messages as text; read it by columns" in refusal(row)


SPELLED = {
    "a turn": json.dumps(HI),
    "a turn in Python's notation": str(HI),
    "turns one a line": f"{json.dumps(HI)}\n{json.dumps(HELLO)}",
    "a row": json.dumps({"messages": [HI, HELLO]}),
    "a row of ShareGPT": json.dumps({"conversations": [{"from": "human", "value": "hi"}]}),
    "a row encoded twice": json.dumps(json.dumps({"messages": [HI]})),
    "turns in Python's notation": str([HI, HELLO]),
}


@pytest.mark.parametrize("text", SPELLED.values(), ids=SPELLED)
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "completion": "x"},
        {"instruction": "hi", "output": "x"},
        {"instruction": "hi", "input": "", "output": "x"},
        {"question": "hi", "answer": "x"},
        {"messages": [HI, HELLO], "system": ""},
    ],
)
def test_a_text_that_spells_out_messages_is_never_trained_as_words(row: dict[str, Any], text: str) -> None:
    for column in [column for column in row if column != "messages"]:
        changed = {**row, column: text}
        for stored in (changed, json.dumps(changed).encode()):
            assert " spells out messages, but is not a JSON list of messages: " in refusal(stored)


@pytest.mark.parametrize("text", SPELLED.values(), ids=SPELLED)
@pytest.mark.parametrize("row", [{"instruction": "hi", "output": "x"}, {"prompt": "hi", "completion": "x"}])
def test_a_history_that_spells_out_messages_is_never_trained_as_words(row: dict[str, Any], text: str) -> None:
    for stored in ({**row, "history": [[text, "x"]]}, json.dumps({**row, "history": [["x", text]]}).encode()):
        assert " spells out messages, but is not a JSON list of messages: " in refusal(stored)


def test_messages_that_are_encoded_several_times_are_read() -> None:
    asked = json.dumps(json.dumps([json.dumps(HI)]))
    assert messages({"prompt": asked, "completion": json.dumps(json.dumps([HELLO]))}) == SAID


def test_messages_as_text_are_found_by_the_roles_of_the_source() -> None:
    text = json.dumps([{"role": "narrator", "content": "hi"}])
    assert messages({"prompt": text, "completion": "hello"})[0].content == text
    assert messages({"prompt": text, "completion": "hello"}, roles={"narrator": "user"}) == SAID
    row = {"instruction": text, "output": "hello"}
    assert "holds a list of messages as text" in refusal(row, roles={"narrator": "user"})


def test_the_refusal_of_spelled_out_messages_ends_if_its_remedy_is_followed() -> None:
    text = json.dumps(HI)
    assert "write a JSON list, or, if the text is meant as words" in refusal({"prompt": text, "completion": "x"})
    assert messages({"prompt": f"[{text}]", "completion": "x"})[0] == Message("user", "hi")
    assert messages({"messages": [{**HI, "content": text}, HELLO]})[0] == Message("user", text)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        '[{"a": 1}]',
        "[{'role': 'admin'}]",
        '{"role": "user"}',
        "[",
        "[]",
        "",
        '"hi"',
        "{x}",
        '{"a": {"role": "user", "content": 5}}',
        "{'role': 'user'}",
    ],
)
def test_text_that_only_looks_like_messages_is_words(text: str) -> None:
    assert messages({"prompt": text, "completion": "hello"})[0].content == text


@pytest.mark.parametrize(
    "history",
    [
        [["a", "b"]],
        {"role": ["user", "assistant"], "content": ["a", "b"]},
        json.dumps([["a", "b"]]),
        ['["a", "b"]'],
        [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}],
    ],
)
@pytest.mark.parametrize("row", [{"instruction": "hi", "output": "hello"}, {"query": "hi", "response": "hello"}])
def test_history_is_read_as_pairs_messages_or_json(history: Any, row: dict[str, Any]) -> None:
    assert messages({**row, "history": history}) == (Message("user", "a"), Message("assistant", "b"), *SAID)


def test_the_context_of_an_instruction_is_its_input() -> None:
    row = {"instruction": "hi", "context": "there", "response": "hello", "category": "qa"}
    assert messages(row)[0] == Message("user", "hi\n\nthere")
    assert messages({**row, "context": ""})[0] == Message("user", "hi")
    assert refusal({**row, "input": "here"}).startswith("unread words: column 'context' holds words that the layout ")


@pytest.mark.parametrize("name", ["functions", "tool_defs", "tool_definitions", "available_tools"])
def test_tool_definitions_are_read_under_each_name(name: str) -> None:
    definition = {"name": "add", "description": "adds", "parameters": {}}
    expected = ({"type": "function", "function": definition},)
    for tools in ([definition], {"add": {"description": "adds", "parameters": {}}}, json.dumps([definition])):
        assert parse_row({"messages": [HI, HELLO], name: tools}).tools == expected


def test_an_object_that_names_no_definitions_is_refused() -> None:
    assert refusal({"messages": [HI, HELLO], "tools": {"add": 5}}).startswith("bad tools: {'add': 5} is neither")


SYSTEM = {"role": "system", "content": "be kind"}
PREFERENCES: list[tuple[dict[str, Any], tuple[Message, ...]]] = [
    ({"prompt": "hi", "chosen": [HI, HELLO]}, SAID),
    ({"prompt": " hi\n", "chosen": [HI, HELLO]}, SAID),
    ({"prompt": [HI], "chosen": [SYSTEM, HI, HELLO]}, (Message("system", "be kind"), *SAID)),
    ({"prompt": [SYSTEM, HI], "chosen": [HI, HELLO]}, (Message("system", "be kind"), *SAID)),
    ({"prompt": "hi", "system": "be kind", "chosen": [SYSTEM, HI, HELLO]}, (Message("system", "be kind"), *SAID)),
    ({"prompt": [SYSTEM], "completion": [HI, HELLO]}, (Message("system", "be kind"), *SAID)),
    ({"prompt": [HI, HELLO], "completion": [HI, HELLO]}, SAID),
    (
        {"prompt": [HI, HELLO], "completion": [{**HI, "content": "and?"}, HELLO]},
        (*SAID, Message("user", "and?"), SAID[1]),
    ),
]


@pytest.mark.parametrize(("row", "said"), PREFERENCES)
def test_a_question_that_the_answer_repeats_is_read_once(row: dict[str, Any], said: tuple[Message, ...]) -> None:
    assert messages(row) == messages(json.dumps(row).encode()) == said
    renamed = {{"chosen": "completion"}.get(column, column): value for column, value in row.items()}
    assert messages(json.dumps(renamed).encode()) == said


def test_an_answer_that_begins_with_another_question_is_refused() -> None:
    for column in ("chosen", "completion"):
        row = {"prompt": "Hi!", column: [HI, HELLO]}
        for stored in (row, json.dumps(row).encode()):
            assert refusal(stored).startswith(
                "two questions: the answer begins with 'hi', and the question with 'Hi!'; "
            )
        assert messages(row, columns={"messages": column}) == SAID
    other = {"role": "system", "content": "be brief"}
    assert refusal({"prompt": [SYSTEM, HI], "chosen": [other, HI, HELLO]}).startswith("two questions: ")


def test_an_answer_that_nobody_wants_is_refused_unless_the_config_says_otherwise() -> None:
    row = {"prompt": "hi", "completion": "hello", "label": False}
    assert refusal(row).startswith("unwanted answer: label is false")
    assert messages(row, ignore=("label",)) == SAID
    for unwanted in (0, 0.0, "0", "false", "False"):
        assert refusal({**row, "label": unwanted}).startswith("unwanted answer: label is ")
    for label in (True, 1, "1", 0.5, 2, -1, "good", None, [0]):
        assert messages({**row, "label": label}) == SAID


@pytest.mark.parametrize("label", [0, "0", 0.0, "0.0"])
def test_a_label_of_zero_is_a_class_beside_turns_and_a_wish_beside_a_pair(label: Any) -> None:
    turns = [HI, HELLO]
    for row in ({"messages": turns}, {"conversations": turns}, {"messages": turns, "prompt": "hi", "answer": "hello"}):
        for stored in (marked := {**row, "label": label}, json.dumps(marked).encode()):
            assert messages(stored) == SAID
    for row in ({"prompt": "hi", "completion": "hello"}, {"instruction": "hi", "output": "hello", "messages": None}):
        assert refusal({**row, "label": label}).startswith(f"unwanted answer: label is {label}, which marks an answer")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [HI, HELLO]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"instruction": "hi", "output": "hello"},
        {"prompt": "hi", "completion": "hello"},
        {"conversation": [{"input": "hi", "output": "hello"}]},
        {"data": ["hi", "hello"]},
    ],
)
def test_a_column_excludes_a_row_of_any_layout(row: dict[str, Any]) -> None:
    for column, value in {"label": "False", "train": False, "weight": 0, "loss_weight": 0.0, "masked": True}.items():
        for stored in (marked := {**row, column: value}, json.dumps(marked).encode()):
            assert refusal(stored).startswith(f"unwanted answer: {column} is {str(value).lower()}, which marks")
            assert messages(stored, ignore=(column,)) == SAID
    for column, value in {"label": 1, "train": True, "weight": 0.5, "loss_mask": [0, 1], "masked": False}.items():
        assert messages({**row, column: value}) == SAID


@pytest.mark.parametrize(
    ("parts", "out_of_order"),
    [
        ([{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "hm"}], "thinking after text"),
        ([{"type": "tool_use", **FUNCTION}, {"type": "text", "text": "a"}], "text after tool calls"),
        ([{"type": "tool_use", **FUNCTION}, {"type": "reasoning", "text": "hm"}], "reasoning after tool calls"),
    ],
)
def test_parts_in_an_order_that_no_template_prints_are_refused(parts: list[Any], out_of_order: str) -> None:
    row = {"messages": [HI, {"role": "assistant", "content": parts}]}
    assert refusal(row).startswith(f"bad messages: messages[1] has {out_of_order}, and templates print reasoning, ")
    divided = [{"role": "assistant", "content": [part]} for part in parts]
    if all("thinking" not in part and part["type"] != "reasoning" for part in parts):
        assert messages({"messages": [HI, *divided]})[1:] == (
            Message("assistant", None, tool_calls=(ADD,)),  # type: ignore[arg-type]
            Message("assistant", "a"),
        )


@pytest.mark.parametrize(
    "column",
    [
        *(
            "context",
            "history",
            "documents",
            "prompt",
            "answer",
            "instruction",
            "knowledge",
            "reasoning",
            "instructions",
        ),
        *("Context", "Chat History", "chatHistory", "SYSTEM-PROMPT", "functionList", "images", "cot"),
    ],
)
def test_a_column_of_words_that_nothing_reads_is_refused_until_the_config_decides(column: str) -> None:
    row = {"messages": [HI, HELLO], column: "other words"}
    for stored in (row, json.dumps(row).encode()):
        if column == "images":
            stored = {"messages": [HI, HELLO], column: [{"bytes": b"\x89PNG", "path": None}]}
        said = refusal(stored)
        assert said.startswith(f"unread words: column {column!r} holds words that the layout messages does not read: ")
        assert said.endswith(f"or leave the column out by ignore = [{column!r}]")
        assert messages(stored, ignore=(column,)) == SAID
        assert messages(stored, columns={"messages": "messages"}) == SAID


def test_a_renamed_column_that_no_layout_reads_is_refused() -> None:
    row = {"q": "hi", "a": "hello", "c": "words"}
    assert refusal(row, columns={"prompt": "q", "completion": "a", "contxt": "c"}).startswith(
        "unread words: column 'contxt'"
    )


def test_a_system_prompt_that_two_places_hold_is_read_once() -> None:
    system = {"role": "system", "content": "be kind"}
    row = {"messages": [system, HI, HELLO], "system": "be kind", "system_prompt": "be kind"}
    assert messages(row) == (Message("system", "be kind"), *SAID)
    assert len(messages({**row, "system": "be brief", "system_prompt": ""})) == 4
    assert refusal({**row, "system_prompt": "be brief"}).startswith("unread words: column 'system_prompt'")


@pytest.mark.parametrize("key", ["tools", "context", "thought", "refusal"])
def test_a_key_of_a_message_with_words_is_refused_until_it_is_ignored(key: str) -> None:
    row = {"messages": [HI, {**HELLO, key: "words"}]}
    assert refusal(row).startswith(f"unread words: messages[1].{key} holds words that no layout reads: 'words'; ")
    assert messages(row, ignore=(key,)) == SAID


@pytest.mark.parametrize("key", sorted(NOTES))
def test_a_single_word_in_a_key_that_is_often_a_note_is_no_word_of_the_conversation(key: str) -> None:
    for note in ("reply", " B ", "src/a.py", 5):
        assert messages({"messages": [HI, {**HELLO, key: note}]}) == SAID
        assert messages({"messages": [HI, {**HELLO, key.title(): note}]}) == SAID
        assert unread_columns({"messages": [HI, {**HELLO, key: note}]}) == {f"messages[].{key}"}
    for words in ("look it up", "x = 1\n", ["reply"], {"a": 1}):
        said = refusal({"messages": [HI, {**HELLO, key: words}]})
        assert said.startswith(f"unread words: messages[1].{key} holds words that no layout reads: ")
        assert messages({"messages": [HI, {**HELLO, key: words}]}, ignore=(f"messages[].{key}",)) == SAID


def test_two_different_contents_of_a_message_are_refused() -> None:
    assert refusal({"messages": [HI, {**HELLO, "value": "bye"}]}) == (
        "two contents: messages[1] has different contents in ['content', 'value']; leave out the wrong keys by ignore "
        "= ['messages[].content'], for example"
    )
    assert messages({"messages": [HI, {**HELLO, "value": "hello"}]}) == SAID
    assert messages({"messages": [HI, {**HELLO, "content": "", "text": "hello"}]}) == SAID


def test_two_different_reasonings_of_a_message_are_refused() -> None:
    twice = {**HELLO, "reasoning": "greet", "reasoning_content": "wave"}
    assert refusal({"messages": [HI, twice]}).startswith(
        "two contents: messages[1] has different contents in ['reasoning_content', 'reasoning']"
    )
    greeted = (Message("user", "hi"), Message("assistant", "hello", "greet"))
    assert messages({"messages": [HI, twice]}, ignore=("messages[].reasoning_content",)) == greeted
    for same in ("greet", "", None):
        assert messages({"messages": [HI, {**twice, "reasoning_content": same}]}) == greeted
    parts = [{"type": "thinking", "thinking": "greet"}, {"type": "text", "text": "hello"}]
    assert messages({"messages": [HI, {**HELLO, "content": parts, "reasoning": "greet"}]}) == greeted
    assert refusal({"messages": [HI, {**HELLO, "content": parts, "reasoning": "wave"}]}).startswith("two contents: ")


TEXT = {"type": "text", "text": "hello"}
CALL = {"id": "c1", "type": "function", "function": FUNCTION}
USE = {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": "3"}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": [{**TEXT, "mark": 1}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "greet", "mark": 1}, TEXT]},
        {"role": "assistant", "content": [TEXT, {**USE, "mark": 1}]},
        {"role": "assistant", "content": [TEXT, {"type": "tool_call", "value": FUNCTION, "mark": 1}]},
        {"role": "assistant", "content": [TEXT, {"type": "tool_call", "value": {**FUNCTION, "mark": 1}}]},
        {"role": "user", "content": [{**RESULT, "mark": 1}]},
        {"role": "assistant", "content": "hello", "tool_calls": [{**CALL, "mark": 1}]},
        {"role": "assistant", "content": "hello", "tool_calls": [{**CALL, "function": {**FUNCTION, "mark": 1}}]},
        {"role": "function_call", "content": json.dumps({**FUNCTION, "mark": 1})},
    ],
)
def test_marks_and_words_in_a_part_of_a_message_are_refused(turn: dict[str, Any]) -> None:
    def marked(name: str, value: Any) -> dict[str, Any]:
        text = json.dumps({"messages": [HELLO, HI, turn]}).replace(
            '\\"mark\\": 1', json.dumps(json.dumps({name: value}))[2:-2]
        )
        row: dict[str, Any] = json.loads(text.replace('"mark": 1', json.dumps({name: value})[1:-1]))
        return row

    for name, value in {"train": False, "weight": 0, "masked": True, "loss_mask": 0}.items():
        assert refusal(marked(name, value)).startswith("bad weight: messages[2]"), name
        assert f"has the mark {name!r} in a part of a message" in refusal(marked(name, value))
        assert refusal(marked(name, value)).endswith(f"leave the key out by ignore = ['messages[].{name}']")
        assert (
            len(messages(marked(name, value), ignore=(f"messages[].{name}",))) == len(messages(marked(name, None))) == 3
        )
    for name in ("refusal", "thoughts", "response"):
        assert refusal(marked(name, "lost")).startswith("unread words: messages[2]")
        assert len(messages(marked(name, "lost"), ignore=(name,))) == len(messages(marked(name, ""))) == 3
    assert len(messages(marked("index", 0))) == 3


def test_two_texts_of_a_part_and_two_arguments_of_a_call_are_refused() -> None:
    for part in ({**TEXT, "value": "lost"}, {"type": "thinking", "thinking": "a", "text": "b"}):
        assert refusal({"messages": [HI, {**HELLO, "content": [part]}]}).startswith(
            "two contents: messages[1] has diff"
        )
    call = {"name": "add", "arguments": {"a": 1}, "parameters": {"a": 2}}
    assert refusal({"messages": [HI, {**HELLO, "tool_calls": [call]}]}).startswith(
        "two contents: messages[1].tool_calls"
    )
    for empty in ({}, None, {"a": 1}):
        row = {"messages": [HI, {**HELLO, "tool_calls": [{**call, "parameters": empty}]}]}
        assert messages(row)[1].tool_calls == (ADD,)


def test_tool_calls_in_two_places_are_read_once_or_refused() -> None:
    parts = [TEXT, USE]
    for turn in (
        {"tool_calls": [CALL], "function_call": FUNCTION},
        {"content": parts, "tool_calls": [CALL]},
        {"content": parts, "function_call": json.dumps(FUNCTION)},
    ):
        assert messages({"messages": [HI, {"role": "assistant", **turn}]})[1].tool_calls[0].arguments == {"a": 1}
        assert len(messages({"messages": [HI, {"role": "assistant", **turn}]})[1].tool_calls) == 1
    other = {"name": "add", "arguments": {"a": 2}}
    row = {"messages": [HI, {"role": "assistant", "tool_calls": [CALL], "function_call": other}]}
    assert refusal(row).startswith(
        "two contents: messages[1] has different tool calls in two of content, tool_calls and"
    )
    assert messages(row, ignore=("messages[].tool_calls",))[1].tool_calls == (ToolCall("add", {"a": 2}),)


@pytest.mark.parametrize("arguments", ["not json", "[1]", 5, '{"a": 1e400}'])
def test_arguments_that_are_no_object_are_named(arguments: Any) -> None:
    row = {"messages": [HI, {**HELLO, "tool_calls": [{"name": "add", "arguments": arguments}]}]}
    assert refusal(row).startswith("bad tool call: messages[1].tool_calls: the arguments of 'add' are ")
    assert refusal(row).endswith('not a JSON object; write "arguments": {"a": 1}')


ROUND = {"input": "hi", "output": "hello"}


def test_the_keys_of_a_round_are_read_or_refused() -> None:
    assert messages({"conversation": [{**ROUND, "weight": 0}]}) == (SAID[0], Message("assistant", "hello", train=False))
    for key in ("instruction", "thoughts", "reasoning", "content"):
        row = {"conversation": [{**ROUND, key: "lost"}]}
        assert refusal(row).startswith(f"unread words: conversation[0].{key} holds words that no layout reads: 'lost'")
        assert messages(row, ignore=(f"conversation[].{key}",)) == SAID
    assert refusal({"conversation": [{**ROUND, "mask": 1}]}).startswith(
        "bad weight: conversation[0].mask has no agreed"
    )
    assert unread_columns({"conversation": [ROUND, ROUND]}) == set()
    assert unread_columns({"conversation": [{**ROUND, "id": 1}, {**ROUND, "system": "x"}]}) == {"conversation[].id"}


CALLED = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}
GIVEN = {"type": "function_call_output", "call_id": "c1", "output": "3"}
THOUGHT = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "greet"}]}


def test_marks_of_items_are_obeyed() -> None:
    called = messages({"messages": [HI, {**CALLED, "weight": 0}, {**GIVEN, "train": False}, HELLO]})
    assert [message.train for message in called] == [None, False, False, None]
    assert called[1].tool_calls == (ToolCall("add", {"a": 1}, "c1"),)
    for thought, said, train in ((None, False, False), (None, True, True), (True, True, True), (None, None, None)):
        row = {"messages": [HI, {**THOUGHT, "train": thought}, {**HELLO, "train": said}]}
        assert messages(row)[1] == Message("assistant", "hello", "greet", train=train)
    for thought, said in ((False, True), (False, None), (True, None)):
        for answer in (HELLO, CALLED):
            row = {"messages": [HI, {**THOUGHT, "train": thought}, {**answer, "train": said}]}
            assert refusal(row).startswith(
                "bad weight: two parts of one turn, such as its text and its call, have the "
            )
            assert f" have the marks {thought} and {said}, where None is no mark; mark both alike" in refusal(row)


@pytest.mark.parametrize("key", ["content", "summary"])
def test_a_text_in_an_item_of_reasoning_is_reasoning(key: str) -> None:
    parts = [{"type": "reasoning_text", "text": "add"}, {"type": "text", "text": " them"}]
    for words in ("add them", [{"type": "text", "text": "add them"}], parts):
        row = {"messages": [HI, {"type": "reasoning", key: words}, HELLO]}
        assert messages(row)[1:] == (Message("assistant", "hello", "add them"),)
    row = {"messages": [HI, {"type": "reasoning", key: [{"type": "tool_call", **FUNCTION}]}, HELLO]}
    assert refusal(row).startswith("unknown content part: messages[1] is reasoning with a call; ")


@pytest.mark.parametrize("part", [{"type": "reasoning", "text": "lost"}, {"type": "tool_call", **FUNCTION}])
def test_a_part_of_a_result_that_is_no_text_is_refused(part: dict[str, Any]) -> None:
    for parts in ([part], [part, TEXT] if part["type"] == "reasoning" else [TEXT, part]):
        row = {"messages": [HI, CALLED, {**GIVEN, "output": parts}, HELLO]}
        assert refusal(row).startswith("unknown content part: messages[2].output is [{")
        assert refusal(row).endswith("; only text can be read")


def test_two_items_of_reasoning_in_a_row_are_one_reasoning() -> None:
    wave = {"type": "reasoning", "content": "wave"}
    said = Message("assistant", "hello", "greet\n\nwave")
    assert messages({"messages": [HI, THOUGHT, wave, HELLO]})[1:] == (said,)
    assert messages({"messages": [HI, THOUGHT, {**HELLO, "reasoning": "wave"}]})[1:] == (said,)
    assert messages({"messages": [HI, THOUGHT, {**HELLO, "reasoning": "greet"}]})[1].reasoning == "greet"
    assert messages({"messages": [HI, THOUGHT, wave, CALLED]})[1].reasoning == "greet\n\nwave"
    marked = {"messages": [HI, THOUGHT, {**wave, "train": False}, {**HELLO, "train": False}]}
    assert messages(marked)[1:] == (Message("assistant", "hello", "greet\n\nwave", train=False),)


def test_words_of_items_are_read_or_refused() -> None:
    for item in (CALLED, GIVEN, THOUGHT):
        row = {"messages": [HI, CALLED, GIVEN, {**item, "thoughts": "lost"}, HELLO]}
        assert refusal(row).startswith("unread words: messages[3].thoughts")
        assert len(messages(row, ignore=("thoughts",))) >= 4
    assert refusal({"messages": [HI, {"type": "reasoning", "text": "lost"}, HELLO]}).startswith(
        "unread words: messages[1].t"
    )
    whole = {**THOUGHT, "content": [{"type": "reasoning_text", "text": "greet kindly"}]}
    assert refusal({"messages": [HI, whole, HELLO]}).startswith("two contents: messages[1] has different contents in")
    assert messages({"messages": [HI, whole, HELLO]}, ignore=("messages[].summary",))[1].reasoning == "greet kindly"
    assert unread_columns({"messages": [HI, {**THOUGHT, "id": "r1", "note": 1}, HELLO]}) == {"messages[].note"}


def test_a_turn_with_a_role_is_no_item_and_its_type_must_fit() -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "type": "reasoning", "value": "greet"}]
    assert refusal({"conversations": turns}).startswith("bad messages: conversations[1] has the type 'reasoning', but ")
    assert messages({"conversations": turns}, ignore=("conversations[].type",))[1] == Message("assistant", "greet")
    call = {"from": "function_call", "type": "function_call", "value": json.dumps(FUNCTION)}
    result = {"from": "tool", "type": "function_call_output", "value": "3"}
    assert [message.role for message in messages({"conversations": [turns[0], call, result]})] == [
        "user",
        "assistant",
        "tool",
    ]
    assert refusal({"conversations": [turns[0], {**call, "from": "gpt"}]}).startswith("bad messages: ")


def test_a_column_without_a_value_is_named() -> None:
    assert "columns ['id', 'messages'], of which ['messages'] have no value, match none of" in refusal(
        {"id": 1, "messages": None}
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'"a\\ud83d"', r"it has half of a surrogate pair, \ud83d"),
        (b"NaN", "it has a number that is NaN, infinite or out of range"),
        (b'[{"x": 1e999}]', "it has a number that is NaN, infinite or out of range"),
    ],
)
def test_a_value_that_cannot_be_read_is_named_with_its_reason(text: bytes, reason: str) -> None:
    for row, column in (
        (b'{"messages": %s}' % text, "messages"),
        (
            b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}], '
            b'"chat_template_kwargs": {"a": %s}}' % text,
            "chat_template_kwargs",
        ),
    ):
        with pytest.raises(BrokenRow) as error:
            parse_row(row)
        assert str(error.value) == f"cannot be decoded: column {column!r}: {reason}"


def test_columns_and_keys_that_nothing_reads_are_named() -> None:
    turns = [{**HI, "id": 1, "train": None}, {**HELLO, "markdown": True, "loss": True}]
    row = {"messages": turns, "topic": "x", "score": 1, "system": None, "tools": [], "prompt": "hi"}
    assert unread_columns(row) == {"topic", "score", "prompt", "messages[].id", "messages[].markdown"}
    assert unread_columns(row, RowSettings(ignore=("topic", "id"))) == {
        "score",
        "prompt",
        "messages[].markdown",
    }
    assert unread_columns(b"{") == set()


def test_an_empty_column_is_not_named_as_unread() -> None:
    row = {"instruction": "Hi", "input": "", "output": "Hello", "history": [], "score": 0}
    assert unread_columns(row) == {"score"}


@pytest.mark.parametrize(
    ("marks", "train"),
    [
        *[({name: False}, False) for name in ("train", "training", "trainable", "loss", "compute_loss")],
        *[({name: True}, True) for name in ("train", "training", "trainable", "loss")],
        *[({name: 0}, False) for name in ("weight", "loss_weight", "loss_scale", "loss_mask", "loss")],
        *[({name: 1}, None) for name in ("loss_weight", "loss_scale", "loss_mask")],
        *[({name: True}, False) for name in ("masked", "is_masked", "no_loss", "ignore_loss")],
        *[({name: False}, None) for name in ("masked", "is_masked", "no_loss")],
        ({"loss": "false"}, False),
        ({"loss_weight": 0.0, "train": None}, False),
        ({"loss": None, "mask": None}, None),
        ({"train": False, "masked": True, "weight": 0}, False),
    ],
)
def test_the_marks_of_others_are_obeyed(marks: dict[str, Any], train: bool | None) -> None:
    assert messages({"conversations": [HI, {**HELLO, **marks}]})[1].train is train


@pytest.mark.parametrize(
    "marks",
    [
        *({"weight": 0.5}, {"weight": 2}, {"loss": "no"}, {"train": []}, {"loss_weight": 0.3}, {"mask": True}),
        *({"train": True, "weight": 0}, {"masked": True, "train": 1}, {"train_detail": [{"begin_offset": 0}]}),
        *({"mask": 0}, {"LOSS": False}, {"Weight": 1}, {"should_train": False}, {"no_train": True}, {"ignore": True}),
        *({"is_trainable": False}, {"loss_masked": 1}, {"supervised": False}, {"exclude": True}, {"skipLoss": True}),
    ],
)
def test_a_mark_that_cannot_be_obeyed_is_refused(marks: dict[str, Any]) -> None:
    row = {"messages": [HI, {**HELLO, **marks}]}
    assert refusal(row).startswith("bad weight: messages[1]")
    if len(marks) == 1:
        assert refusal(row).endswith(f" by ignore = ['messages[].{next(iter(marks))}']")
    assert messages(row, ignore=tuple(f"messages[].{name}" for name in marks)) == SAID


def test_names_of_roles_are_added_by_the_config() -> None:
    row = {"messages": [{"role": "narrator", "content": "hi"}, HELLO]}
    assert refusal(row).endswith("roles = {...} adds names, 'tool_call' for calls")
    assert messages(row, roles={"narrator": "user"}) == SAID


def test_turns_of_tool_calls_and_responses_are_read() -> None:
    turns = [
        HI,
        {"role": "tool_call", "content": json.dumps(FUNCTION)},
        {"role": "tool_response", "content": "2"},
        HELLO,
    ]
    assert messages({"messages": turns}) == (
        SAID[0],
        Message("assistant", tool_calls=(ADD,)),  # type: ignore[arg-type]
        Message("tool", "2"),
        SAID[1],
    )


def test_parts_of_anthropics_messages_are_read() -> None:
    call = {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}}
    thinking = {"type": "thinking", "thinking": "hm"}
    results = [
        {"type": "tool_result", "tool_use_id": "c1", "content": "2"},
        {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "3"}]},
        {"type": "text", "text": "and?"},
    ]
    turns = [
        HI,
        {"role": "assistant", "content": [thinking, {"type": "text", "text": "so"}, call]},
        {"role": "user", "content": results},
        HELLO,
    ]
    assert messages({"messages": turns}) == (
        SAID[0],
        Message("assistant", "so", "hm", (ToolCall("add", {"a": 1}, "c1"),)),  # type: ignore[arg-type]
        Message("tool", "2", tool_call_id="c1"),
        Message("tool", "3", tool_call_id="c2"),
        Message("user", "and?"),
        SAID[1],
    )
    turns[2] = {"role": "user", "content": results[:1]}
    assert [message.role for message in messages({"messages": turns})] == ["user", "assistant", "tool", "assistant"]
    turns[2] = {"role": "user", "content": results[::-1]}
    assert refusal({"messages": turns}).startswith("bad messages: messages[2] has words before a tool_result")
    turns[1] = {"role": "assistant", "content": results}
    assert refusal({"messages": turns}).startswith("unknown content part: messages[1] has a part")


def test_items_of_the_responses_api_are_read() -> None:
    items = [
        HI,
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}', "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
        {"type": "function_call_output", "call_id": "c2", "output": "2"},
        {"type": "reasoning", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hello"}]},
    ]
    calls = (ToolCall("add", {"a": 1}, "c1"), ToolCall("add", {"a": 1}, "c2"))
    assert messages({"messages": items}) == (
        SAID[0],
        Message("assistant", None, "hm", calls),  # type: ignore[arg-type]
        Message("tool", "2", tool_call_id="c1"),
        Message("tool", "2", tool_call_id="c2"),
        SAID[1],
    )
    assert "reasoning is followed by neither a text nor a call" in refusal({"messages": items[:2] + items[4:]})


@pytest.mark.parametrize("row", [{"messages": [HI, HELLO]}, {"prompt": "hi", "completion": "hello"}])
def test_a_row_above_the_limit_is_refused_before_it_is_parsed(row: dict[str, Any]) -> None:
    text = json.dumps(row).encode()
    assert messages(text, max_row_bytes=len(text)) == SAID
    said = refusal(text, max_row_bytes=len(text) - 1)
    assert said.startswith(
        f"row too large: it has {len(text)} bytes, more than max_row_bytes = {len(text) - 1} of its "
    )
    assert refusal(b"{" + b" " * 100, max_row_bytes=100).startswith("row too large: it has 101 bytes")
    large = {**row, "note": "x" * 1000}
    assert messages(large, max_row_bytes=2000) == SAID
    assert refusal(large, max_row_bytes=1000).startswith("row too large: it has 1,0")
    assert refusal(b'{"prompt": "' + b"x" * (16 << 20) + b'"}').startswith("row too large: it has 16,777,230 bytes")
