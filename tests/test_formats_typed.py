"""A row of a usual layout is decoded by its types, and reads like a row that is read column by column."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sftstream import Conversation, Message, Refused
from sftstream.config import RowSettings
from sftstream.formats import parse_row
from sftstream.formats.typed import typed_json, typed_row
from sftstream.records import BrokenRow, ToolCall, ToolCalls

HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
CALL = {"name": "f", "arguments": {"a": 1}}
TOOL = {"name": "f", "description": "does"}
LISTED = json.dumps([HI, HELLO])
USUAL: list[dict[str, Any]] = [
    {"messages": [HI, HELLO]},
    {"conversations": SHAREGPT},
    {"instruction": "hi", "output": "hello"},
    {"prompt": "hi", "completion": "hello"},
    {"prompt": [HI], "completion": [HELLO]},
]

PARTS, THOUGHT = json.dumps([{"type": "text", "text": "hi"}]), "<think>hi</think>hello"
texts = st.sampled_from(["", " ", "hi", "hello", "[1]", LISTED, '{"a": 1}', "\ud7ff é", PARTS, THOUGHT])
odd = st.sampled_from([None, 0, 1, 1.5, True, [], {}, ["hi"], {"a": "b"}, [[[[]]]]])
names = st.sampled_from(["human", "gpt", "user", "assistant", "system", "tool", "function_call", "observation", "me"])
roles = st.sampled_from(["user", "assistant", "system", "tool", "gpt", "GPT", None])
called = st.sampled_from([json.dumps(CALL), json.dumps([CALL, CALL]), "[]", "no call"])
sharegpt = st.fixed_dictionaries(
    {"from": names, "value": texts | called | odd}, optional={"weight": st.sampled_from([0, 1, 0.5]), "name": texts}
)
turns = st.fixed_dictionaries(
    {"role": roles, "content": texts | odd},
    optional={
        "train": st.sampled_from([True, False, 1, "no"]),
        "reasoning": texts | odd,
        "tool_calls": st.sampled_from([[CALL], CALL, "x", None, [3]]),
        "thoughts": texts,
    },
)
answered = st.builds(lambda drawn, last: [*drawn, last], st.lists(turns, max_size=3), st.just(HELLO) | turns)
said = st.builds(lambda drawn, last: [*drawn, last], st.lists(sharegpt, max_size=3), st.just(SHAREGPT[1]) | sharegpt)
pairs = st.lists(st.lists(texts, min_size=2, max_size=2) | st.lists(texts | odd, max_size=3) | turns, max_size=2)
beside = {
    "tools": st.sampled_from([None, "", [], [TOOL], TOOL, json.dumps([TOOL]), "x", {"f": TOOL}, 5]),
    "system": texts | odd,
    "history": pairs | odd,
    "context": texts,
}
rows = st.one_of(
    st.fixed_dictionaries({"messages": answered | odd}, optional=beside),
    st.fixed_dictionaries({"conversations": said | answered | odd}, optional=beside),
    st.fixed_dictionaries(
        {"instruction": texts | odd, "output": texts | odd}, optional={"input": texts | odd, **beside}
    ),
    st.fixed_dictionaries({"prompt": texts | answered | odd, "completion": texts | answered | odd}, optional=beside),
)


def read(row: Any, settings: RowSettings) -> Any:
    try:
        return parse_row(row, settings)
    except (Refused, BrokenRow) as refused:
        return str(refused)


@settings(max_examples=600, deadline=None)
@given(rows)
@example({"instruction": LISTED, "output": "hello"})
@example({"instruction": "hi", "input": LISTED, "output": "hello"})
@example({"instruction": "hi", "output": LISTED})
@example({"prompt": LISTED, "completion": "hello"})
@example({"prompt": "hi", "completion": LISTED})
def test_a_row_decoded_by_its_types_reads_like_one_read_column_by_column(row: dict[str, Any]) -> None:
    # No layout of the fast path has a column `id`, and a role is named nowhere: both lead to the other path.
    slow = read({**row, "id": 1}, RowSettings(roles={"nobody": "user"}))
    expected = slow.replace("['id', ", "[").replace(", 'id'", "") if isinstance(slow, str) else slow
    if isinstance(expected, str):
        expected = expected.replace(", nobody", "")
    assert read(row, RowSettings()) == expected
    assert read(msgspec.json.encode(row), RowSettings()) == expected
    assert read(row, RowSettings(ignore=("nothing",))) == expected


@pytest.mark.parametrize("row", USUAL)
def test_rows_of_the_usual_layouts_are_decoded_by_their_types(row: dict[str, Any]) -> None:
    expected = Conversation((Message("user", "hi"), Message("assistant", "hello")))
    assert typed_json(msgspec.json.encode(row)) == expected
    assert typed_row(row, max_size=7) == expected
    assert typed_row(row, max_size=6) is None  # seven letters
    assert typed_json(msgspec.json.encode({**row, "id": 1})) is None
    tool = {"type": "function", "function": TOOL}
    assert typed_json(msgspec.json.encode({**row, "tools": [TOOL]})) == Conversation(expected.messages, (tool,))


def test_calls_of_sharegpt_turns_are_decoded_by_their_types() -> None:
    call, result = {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "3"}
    found = typed_json(msgspec.json.encode({"conversations": [SHAREGPT[1], SHAREGPT[0], call, result]}))
    assert found is not None
    assert found.messages[2:] == (
        Message("assistant", None, tool_calls=ToolCalls([ToolCall("f", {"a": 1})])),
        Message("tool", "3"),
    )


def test_an_ignored_key_of_messages_is_left_out_of_usual_rows_too() -> None:
    row = {"messages": [HI, {**HELLO, "reasoning": "hm"}]}
    settings = RowSettings(ignore=("messages[].reasoning",))
    for stored in (row, msgspec.json.encode(row)):
        assert parse_row(stored, settings).messages[1] == Message("assistant", "hello")
        assert parse_row(stored, RowSettings(ignore=("reasoning",))) == parse_row(row)  # no column
