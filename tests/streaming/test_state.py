"""State is a small frozen value: it survives JSON, shards' states merge into one, and people can read it."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny
from msgspec import UNSET
from test_packing import packer

from sftstream import DataConfig, DataState, PackLoader, Shard, describe, diff, merge
from sftstream.encoded_stream import WAITING, encode_stream, with_texts
from sftstream.state import RowParts, StreamState, StripePosition


@pytest.fixture(scope="module")
def states(config: DataConfig) -> list[dict[str, Any]]:
    """Of two shards after two steps."""
    result = []
    for index in range(2):
        loader = PackLoader(config, shard=Shard(index, 2))
        tiny.take(loader, 4)
        result.append(loader.state_dict())
    return result


def test_a_state_survives_json_and_msgpack(config: DataConfig) -> None:
    loader = PackLoader(config)
    tiny.take(loader, 8)
    state = loader.state
    for stored in (loader.state_dict(), state.builtins()):
        assert json.loads(json.dumps(stored)) == stored
        assert DataState.parse(json.loads(json.dumps(stored))) == state
        assert DataState.parse(msgspec.msgpack.decode(msgspec.msgpack.encode(stored))) == state
    assert DataState.parse(msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=DataState)) == state
    assert state.state_dict() == loader.state_dict()
    assert DataState.parse(state) is state


def test_a_state_dict_shows_counters_and_has_the_same_keys_at_any_time(config: DataConfig) -> None:
    loader = PackLoader(config)
    before = loader.state_dict()
    tiny.take(loader, 8)
    after = loader.state_dict()
    assert before.keys() == after.keys()
    assert before["streams"].keys() == after["streams"].keys()
    assert {type(after["streams"]["0"][name]) for name in ("planned", "leftovers")} == {str}
    plain = loader.state.builtins()
    for number, stream in loader.state.streams.items():
        shown = after["streams"][str(number)]
        assert (shown["drawn"], shown["packs"], shown["tokens"]) == (list(stream.drawn), stream.packs, stream.tokens)
        assert {k: v for k, v in plain["streams"][str(number)].items() if not isinstance(shown[k], str)} == {
            k: v for k, v in shown.items() if not isinstance(v, str)
        }
    assert {key: value for key, value in plain.items() if key not in ("streams", "checksum")} == {
        key: value for key, value in after.items() if key not in ("streams", "checksum")
    }


def test_a_state_encoded_in_parts_has_the_values_and_order_of_the_whole() -> None:
    node = packer([100 + i % 300 for i in range(3000)], 8192, 256, endless=True)
    next(node)
    states = [
        node.state,
        msgspec.structs.replace(node.state, digests=UNSET),
        msgspec.structs.replace(
            node.state, row_parts=(RowParts(0, 5, 1, 2),), stripe_positions={3: StripePosition(2, 1)}, planning=UNSET
        ),
        StreamState(drawn=(0, 0)),
    ]
    encoded = dict(enumerate(map(encode_stream, states)))
    for number, (state, stream) in enumerate(zip(states, encoded.values(), strict=True)):
        assert msgspec.msgpack.decode(stream.whole, type=StreamState) == state
        plain = msgspec.to_builtins(state, str_keys=True)
        shown = with_texts(encoded)[str(number)]
        assert list(shown) == list(plain) == list(msgspec.msgpack.decode(stream.whole))
        decoded = {k: msgspec.msgpack.decode(base64.b64decode(shown[k])) for k in WAITING if k in shown}
        assert msgspec.json.encode(shown | decoded) == msgspec.json.encode(plain)


@pytest.mark.parametrize("text", ["", "?", "gA", "gA==", "wA==", "k5OT"])
def test_a_text_that_is_no_stream_is_an_error_that_names_the_stream(config: DataConfig, text: str) -> None:
    state = PackLoader(config).state_dict()
    state["streams"]["2"]["planned"] = text
    with pytest.raises(
        ValueError, match=r"the state is damaged: stream '2': |this is not a data state of this version: "
    ):
        DataState.parse(tiny.resealed(state))


def test_a_state_dict_holds_plain_values_only(states: list[dict[str, Any]]) -> None:
    def check(value: Any) -> None:
        assert type(value) in (dict, list, str, int, float, bool, type(None)), value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(item)
        if isinstance(value, dict):
            assert all(type(key) is str for key in value)

    check(states[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packs": "8"}, "Expected `int`, got `str` - at `$.packs`"),
        ({"packs": None}, "Expected `int`, got `null` - at `$.packs`"),
        ({"streams": {"zero": {}}}, "Expected `int`, got `str` - at `key` in `$.streams`"),
        ({"streams": {"0": {}}}, "Object missing required field `drawn` - at `$.streams[...]`"),
        ({"streams": {"0": {"drawn": [0.5]}}}, "Expected `int`, got `float` - at `$.streams[...].drawn[0]`"),
        ({"identity": {}}, "Object missing required field `format` - at `$.identity`"),
    ],
)
def test_a_damaged_state_is_refused_with_its_place(
    states: list[dict[str, Any]], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=r"this is not a data state of this version: .") as error:
        DataState.parse(states[0] | change)
    assert str(error.value).endswith(f"{message}; give a state that this version saved")


def test_an_empty_state_is_refused() -> None:
    with pytest.raises(ValueError, match="this is not a data state of this version: Object missing required field"):
        DataState.parse({})


def test_states_of_all_shards_merge_in_any_order(states: list[dict[str, Any]], config: DataConfig) -> None:
    whole = PackLoader(config)
    tiny.take(whole, 8)
    assert merge(states) == merge(states[::-1]) == whole.state_dict()
    assert list(merge(states)["streams"]) == ["0", "1", "2", "3"]
    assert merge([DataState.parse(state) for state in states]) == merge(states)
    assert merge([whole.state_dict()]) == whole.state_dict()


def test_merging_leaves_the_states_as_they_were(states: list[dict[str, Any]]) -> None:
    before = copy.deepcopy(states)
    merge(states)["streams"]["0"] = ""
    assert states == before


def test_merge_refuses_nothing_twice_and_different_steps(states: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="merge needs at least one state"):
        merge([])
    with pytest.raises(
        ValueError, match=r"streams \[0, 2\] are in state 1 and in an earlier state; pass each shard's state once"
    ):
        merge([states[0], states[0]])
    with pytest.raises(
        ValueError,
        match=r"state 1 was saved after 6 packs and another state after 8 packs; save all states after the same step",
    ):
        merge([states[0], tiny.resealed(states[1] | {"packs": 6})])
    with pytest.raises(
        ValueError,
        match=r"state 0 was saved after 6 packs and another state after 8 packs; save all states after the same step",
    ):
        merge([tiny.resealed(states[0] | {"packs": 6}), states[1]])


def test_merge_refuses_states_of_other_data_and_names_the_difference(states: list[dict[str, Any]]) -> None:
    other = copy.deepcopy(states[1])
    other["identity"]["seed"] = 5
    with pytest.raises(
        ValueError,
        match=r"^state 1 has other data or settings than state 0: data.seed: 0 -> 5; merge states of one run$",
    ):
        merge([states[0], tiny.resealed(other)])


def test_an_exhausted_shard_merges_with_a_shard_that_goes_on(config: DataConfig) -> None:
    loaders = [PackLoader(config, shard=Shard(index, 4)) for index in range(4)]
    for loader in loaders:
        list(loader)
    packs = [loader.packs for loader in loaders]
    assert len(set(packs)) > 1
    merged = merge([loader.state_dict() for loader in loaders])
    assert merged["packs"] == max(packs)
    assert list(PackLoader(config, state=merged)) == []


def test_a_description_says_how_far_the_run_is(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tiny.write_jsonl(tmp_path_factory.mktemp("described") / "d.jsonl", [*tiny.rows(20), {"a": 1}, {"b": 2}])
    loader = PackLoader(tiny.data_config(tokenizer, path, streams=2, global_batch=2, epochs=1))
    assert describe(loader.state) == (
        "pack 0 is next; streams here: 2 of 2\n"
        "returned: 0 packs, 0 conversations, 0 tokens\n"
        "read and waiting: 0 conversations\n"
        "source 0 (d.jsonl): 0 rows drawn, 0.000 epochs"
    )
    packs = list(loader)
    given = sum(bool(pack.segments) for pack in packs)
    tokens = sum(pack.tokens for pack in packs)
    assert describe(loader.state_dict()) == (
        f"pack {len(packs)} is next; streams here: 2 of 2\n"
        f"returned: {given} packs, 20 conversations, {tokens:,} tokens, {tokens / (256 * given):.2%} full\n"
        "read and waiting: 0 conversations\n"
        "source 0 (d.jsonl): 22 rows drawn, 1.000 epochs\n"
        "refused, unknown layout: 2\n"
        "exhausted streams: 2"
    )


def test_a_difference_names_each_field(states: list[dict[str, Any]]) -> None:
    other = tiny.plain(states[0])
    drawn = other["streams"]["2"]["drawn"][0]
    other["packs"] = 12
    other["streams"]["2"]["drawn"] = [99]
    assert diff(states[0], states[0]) == []
    assert diff(states[0], tiny.resealed(other)) == ["state.packs: 8 -> 12", f"state.streams.2.drawn[0]: {drawn} -> 99"]
    assert "state.streams.1: None -> {" in "\n".join(diff(states[0], states[1]))


def test_a_state_does_not_grow_with_what_was_consumed(tokenizer: str, corpus_path: str) -> None:
    endless = tiny.data_config(tokenizer, corpus_path, epochs=None, window=16)
    loader = PackLoader(endless)
    sizes = []
    for _ in range(40):
        tiny.take(loader, 8)
        sizes.append(max(len(json.dumps(stream)) for stream in loader.state.builtins()["streams"].values()))
    assert max(sizes[20:]) <= 1.2 * max(sizes[5:20])  # counters get digits, and the number of leftovers varies
    assert max(sizes) < 16 * 3 * 24 + 400


def test_a_stream_of_full_windows_keeps_a_few_kilobytes() -> None:
    node = packer([100 + i % 300 for i in range(3000)], 8192, 256, endless=True)
    largest = 0
    for _ in range(100):
        next(node)
        largest = max(largest, len(msgspec.json.encode(node.state)))
    assert 3_000 < largest < 8_000


SILENT = """{% for m in messages %}<{{ m.role }}>{{ m.content }}<|eot_id|>{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.mark.parametrize(("listed", "unread"), [("", ["tools"]), ("{{ tools | tojson if tools }}", [])])
def test_tool_definitions_that_the_template_does_not_print_are_unread(
    tmp_path: Path, tokenizer: str, listed: str, unread: list[str]
) -> None:
    tools = [
        {"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": {"type": "object"}}}
    ]
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [*tiny.rows(19), tiny.rows(1)[0] | {"tools": tools}])
    (tmp_path / "chat.jinja").write_text(listed + SILENT)
    loader = PackLoader(tiny.data_config({"path": tokenizer, "template": str(tmp_path / "chat.jinja")}, path))
    assert loader.unread_columns() == [f"source {path!r}: nothing reads {name}" for name in unread]
    assert loader.encoder.report.prints_tools == (not unread)


def test_a_description_names_the_columns_that_nothing_reads(tmp_path: Path, tokenizer: str) -> None:
    rows = [row | {"id": 1, "score": 0.5} for row in tiny.rows(20)]
    paths = [tiny.write_jsonl(tmp_path / "a.jsonl", rows), tiny.write_jsonl(tmp_path / "b.jsonl", tiny.rows(20))]
    loader = PackLoader(tiny.data_config(tokenizer, *paths))
    assert "unread_columns" not in loader.state_dict()
    assert loader.unread_columns() == [f"source {paths[0]!r}: nothing reads id, score"]
    state = loader.state_dict()
    first, second = (line for line in describe(state).splitlines() if line.startswith("source "))
    assert "; nothing reads id, score" in first
    assert "nothing reads" not in second
    resumed = PackLoader(tiny.data_config(tokenizer, *paths), state=state)
    assert resumed.state_dict() == state
