"""An edited or damaged state is refused by name, whatever field was edited, or gives the same packs."""

from __future__ import annotations

import copy
import json
import os
import random
import string
from pathlib import Path
from typing import Any

import pytest
import tiny

from sftstream import DataConfig, DataState, PackLoader, describe

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.randrange(10**9))
DRAWS = int(os.environ.get("SFTSTREAM_DRAWS") or 120)
WITHOUT_EFFECT = ("notes", "history")
"""Records for people, with no effect on packs."""


@pytest.fixture(scope="module")
def mixed(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    directory = tmp_path_factory.mktemp("mixed")
    rows = [*tiny.rows(60, seed=1), {"text": "?"}]
    sources = [
        {"path": tiny.write_jsonl(directory / "a.jsonl", rows), "weight": 2},
        {"path": tiny.write_jsonl(directory / "b.jsonl", tiny.rows(30, seed=2)), "weight": 1},
    ]
    return tiny.data_config(tokenizer, sources=sources, overflow="split", capacity=128, mix_by="tokens", window=6)


@pytest.fixture(scope="module")
def state(mixed: DataConfig) -> dict[str, Any]:
    loader = PackLoader(mixed)
    tiny.take(loader, 21)
    return loader.state.builtins()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["packs"], -4, "the state is damaged: packs = -4; use another state"),
        (["packs"], 25, "packs = 6, but the first 25 packs of the run have 7 of this stream"),
        (["packs"], 2**60, f"the state is damaged: packs = {2**60}"),
        (["streams", "0", "drawn", 0], -1, "stream 0: drawn holds -1"),
        (["streams", "0", "drawn", 0], 10**9, "1000000000 rows of source 0 were drawn, but all epochs have 31"),
        (["streams", "0", "drawn"], [3], "drawn has 1 entries for 2 sources"),
        (["streams", "0", "planned", 0, 0, 0], 7, "a row of source 7 waits"),
        (["streams", "0", "planned", 0, 0, 1], 10**6, "row 1000000 waits, but source 0 has 61 rows"),
        (["streams", "0", "planned", 0, 0, 1], 2**64, f"a number of a waiting row is above {2**53}"),
        (["streams", "0", "planned", 0, 0, 3], 2**52, f"a row of epoch {2**52} waits"),
        (["streams", "0", "planned", 0, 0, 3], 1, "waits, but the stream has not drawn it recently"),
        (["streams", "0", "planned", 0, 0, 2], 0, "a part of 0 tokens waits, outside 1 to 128"),
        (["streams", "0", "planned", 0, 0, 4], -1, "part -1 of a row waits"),
        (["streams", "0", "planned"], [], "7 digests for 0 packs and 2 rows waiting"),
        (["streams", "0", "leftovers"], [], "7 digests for 5 packs and 0 rows waiting"),
        (["streams", "0", "stage"], 3, "stage = 3, but the config has 0 mixture stages"),
        (["streams", "0", "dry"], True, "the stream is exhausted, but rows are waiting"),
        (["streams", "0", "tokens"], 5, "tokens were read, but"),
        (["streams", "0", "mixed", 0], 5, "mixed = "),
    ],
)
def test_each_contradiction_is_named(
    mixed: DataConfig, state: dict[str, Any], path: list[Any], value: Any, message: str
) -> None:
    edited = copy.deepcopy(state)
    place = edited
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=r"the state is damaged: .*; use another state") as error:
        PackLoader(mixed, state=tiny.resealed(edited))
    assert message in str(error.value)


def test_an_edited_state_is_refused_by_its_checksum(mixed: DataConfig, state: dict[str, Any]) -> None:
    draw = random.Random(SEED)
    print(f"seed {SEED}")
    content = {key: value for key, value in state.items() if key != "checksum"}
    for path in draw.sample(list(_numbers(content, [])), 20):
        edited = copy.deepcopy(state)
        place = edited
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] += draw.choice([-1, 1])
        with pytest.raises(
            ValueError, match=r"the state was edited or damaged: its checksum is|not a data state|the state has format"
        ):
            PackLoader(mixed, state=edited)


def test_the_message_about_an_edited_state_names_both_checksums_and_the_remedy(state: dict[str, Any]) -> None:
    edited = state | {"packs": 25}
    remedy = "; resume from the state as it was written, and change settings in the config, with data.accept_changed"
    before, now = state["checksum"][:8], tiny.resealed(edited)["checksum"][:8]
    with pytest.raises(ValueError, match=r"^the state was edited or damaged: ") as error:
        DataState.parse(edited)
    assert str(error.value) == (
        f"the state was edited or damaged: its checksum is '{before}..., and its content gives '{now}...{remedy}"
    )
    without = {key: value for key, value in state.items() if key != "checksum"}
    with pytest.raises(
        ValueError, match=r"^the state was edited or damaged: it has no checksum, and its content gives"
    ):
        DataState.parse(without)


def test_a_checksum_holds_for_a_state_written_by_any_json_tool(mixed: DataConfig, state: dict[str, Any]) -> None:
    rewritten = json.loads(json.dumps(state, sort_keys=True, indent=3, ensure_ascii=True))
    assert PackLoader(mixed, state=rewritten).state.builtins() == state


@pytest.mark.parametrize("pair", [("0", "1"), ("1", "3")])
def test_swapped_streams_are_refused(mixed: DataConfig, state: dict[str, Any], pair: tuple[str, str]) -> None:
    first, second = pair
    streams = state["streams"]
    swapped = tiny.resealed(state | {"streams": streams | {first: streams[second], second: streams[first]}})
    with pytest.raises(ValueError, match="the state is damaged: stream"):
        PackLoader(mixed, state=swapped)


@pytest.mark.parametrize("path", [[], ["identity"], ["identity", "sources", 0], ["streams", "1"]])
def test_unknown_keys_are_refused(mixed: DataConfig, state: dict[str, Any], path: list[Any]) -> None:
    edited = copy.deepcopy(state)
    place = edited
    for key in path:
        place = place[key]
    place["drwan"] = 1
    with pytest.raises(ValueError, match="this is not a data state of this version: Object contains unknown field"):
        PackLoader(mixed, state=edited)


def test_a_record_with_more_fields_than_known_is_refused(state: dict[str, Any]) -> None:
    edited = copy.deepcopy(state)
    edited["streams"]["0"]["planned"][0][0].append(1)
    with pytest.raises(
        ValueError, match="this is not a data state of this version: Expected `array` of at most length 5"
    ):
        DataState.parse(edited)


def test_any_number_of_a_state_changed_is_refused_or_without_effect(mixed: DataConfig, state: dict[str, Any]) -> None:
    draw = random.Random(SEED)
    print(f"seed {SEED}")
    expected = tiny.digests(PackLoader(mixed, state=state))
    places = list(_numbers({"packs": state["packs"], "streams": state["streams"]}, []))
    accepted = []
    for path in draw.sample(places, min(len(places), DRAWS)):
        edited = json.loads(json.dumps(state))
        place = edited
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = draw.choice([-1, place[path[-1]] + draw.choice([-1, 1, 2]), 2**40])
        try:
            loader = PackLoader(mixed, state=tiny.resealed(edited))
        except ValueError:
            continue
        try:
            digests = tiny.digests(loader)
        except ValueError as error:
            if "the source changed" not in str(error):
                raise
            continue
        if digests != expected:
            accepted.append(path)
    # A window's number, the time that a leftover waited and the share of refused rows in a mixture
    # contradict nothing else in a state; the number of a part of a row is compared when the row is read.
    free = ("windows", "leftovers", "row_parts", "mixed")
    assert [path for path in accepted if not set(path) & {*free, *WITHOUT_EFFECT}] == []


@pytest.mark.parametrize("list_name", ["planned", "leftovers"])
def test_a_waiting_row_exchanged_for_another_of_equal_length_is_an_error(
    list_name: str, tokenizer: str, tmp_path: Path
) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [tiny.chat("q", letter) for letter in string.ascii_letters])
    config = tiny.data_config(tokenizer, path, streams=1, capacity=64, global_batch=1, epochs=1)
    loader = PackLoader(config)
    states = (loader.state.builtins() for _ in loader)
    edited = next(state for state in states if len(state["streams"]["0"][list_name]) > 1)
    stream = edited["streams"]["0"]
    first, second = (group[0] for group in stream[list_name][:2])
    assert first[2] == second[2]
    first[1], second[1] = second[1], first[1]
    with pytest.raises(
        ValueError, match=r"the tokens or the mask of row \d+ of source 0.* differ .* the source changed"
    ):
        list(PackLoader(config, state=tiny.resealed(edited)))


def _numbers(value: Any, path: list[Any]) -> Any:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(item, [*path, key])
    elif type(value) is int:
        yield path


def test_a_fill_over_two_capacities_is_not_told(tokenizer: str, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.rows(60))
    loader = PackLoader(tiny.data_config(tokenizer, path, capacity=512))
    tiny.take(loader, 8)
    changed = tiny.data_config(tokenizer, path, capacity=128, accept_changed=("data.capacity",))
    assert "% full" in describe(loader.state)
    assert "% full" not in describe(PackLoader(changed, state=loader.state).state)
