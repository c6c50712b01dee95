"""One logical stream: every conversation once an epoch, and from any state exactly the packs that were still to come."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny

from sftstream import ChatEncoder, DataConfig, Pack, PackLoader, StreamState, describe, read_conversations
from sftstream.sources import Corpus, CorpusReader
from sftstream.streaming.example_reader import ExampleReader
from sftstream.streaming.graph import build_stream
from sftstream.streaming.packer import Packer
from sftstream.streaming.sampler import RowSampler, open_cursors


def opened(config: DataConfig, encoder: ChatEncoder, stream: int, state: Any = None) -> Packer:
    node = build_stream(config, Corpus(config.sources), encoder, stream)
    node.reset(state)
    return node


def opened_rows(config: DataConfig, stream: int = 0) -> RowSampler:
    return RowSampler(config, open_cursors(config, CorpusReader(Corpus(config.sources)), stream))


def tail(node: Packer) -> list[tuple[Any, ...]]:
    """All that can be seen of the packs to come, and the states after them, one empty pack included."""
    result = []
    exhausted = False
    while not exhausted:
        exhausted = node.state.exhausted
        pack = next(node)
        result.append((pack.digest(), pack.segments, pack.refused, pack.exhausted, node.state))
    return result


def stored(state: StreamState) -> dict[str, Any]:
    """The state as it comes back from a checkpoint."""
    return msgspec.to_builtins(msgspec.json.decode(msgspec.json.encode(state), type=StreamState))


def every_stream(config: DataConfig, encoder: ChatEncoder) -> list[Pack]:
    packs = []
    for stream in range(config.stream_count):
        node = opened(config, encoder, stream)
        while not node.state.exhausted:
            packs.append(next(node))
    return packs


def spoiled_rows() -> list[Any]:
    """40 conversations, among them some of each that no pack can take."""
    rows: list[Any] = tiny.rows(40, seed=3)
    for place in (0, 7, 8, 9, 31):
        rows[place] = {"text": "of no known layout"}
    rows[12] = {
        "messages": [{"role": "user", "name": "<|eot_id|>", "content": "hi"}, {"role": "assistant", "content": "so"}]
    }
    rows[20] = tiny.chat("hi", "never again " * 200)
    return rows


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("spoiled") / "rows.jsonl"
    tiny.write_jsonl(path, spoiled_rows())
    with path.open("ab") as file:
        file.write(b'{"messages": [\n')
    return str(path)


@pytest.fixture(scope="module")
def shapes(
    tokenizer: str, corpus_path: str, spoiled: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, DataConfig]:
    """Configs of two epochs that end in every way a stream can end."""
    directory = tmp_path_factory.mktemp("shapes")
    few = tiny.write_jsonl(directory / "few.jsonl", tiny.rows(3))
    return {
        "plain": tiny.data_config(tokenizer, corpus_path),
        "unshuffled": tiny.data_config(tokenizer, corpus_path, shuffle=False),
        "window of one": tiny.data_config(tokenizer, corpus_path, window=1),
        "one window": tiny.data_config(tokenizer, corpus_path, window=1000),
        "refused rows": tiny.data_config(tokenizer, spoiled),
        "several sources": tiny.data_config(tokenizer, corpus_path, few, spoiled),
        "fewer rows than streams": tiny.data_config(tokenizer, few, streams=8),
        "split rows": tiny.data_config(tokenizer, spoiled, capacity=80, overflow="split"),
        "cut rows": tiny.data_config(tokenizer, spoiled, capacity=80, overflow="truncate"),
    }


SHAPES = (
    "plain",
    "unshuffled",
    "window of one",
    "one window",
    "refused rows",
    "several sources",
    "fewer rows than streams",
    "split rows",
    "cut rows",
)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_after_any_pack_restores_the_exact_tail(shapes: dict[str, DataConfig], shape: str) -> None:
    config = shapes[shape]
    encoder = ChatEncoder(config.tokenizer.path, policy=config)
    for stream in range(config.stream_count):
        node = opened(config, encoder, stream)
        states = [node.state]
        whole = tail(node)
        states += [state for *_, state in whole]
        for position, state in enumerate(states):
            resumed = opened(config, encoder, stream, stored(state))
            assert resumed.state == state
            assert tail(resumed) == (whole[position:] or whole[-1:])


def test_a_stream_resumed_after_every_single_pack_goes_on_as_if_it_never_stopped(
    shapes: dict[str, DataConfig], encoder: ChatEncoder
) -> None:
    config = shapes["several sources"]
    node = opened(config, encoder, 1)
    state, packs = node.state, []
    while not state.exhausted:
        resumed = opened(config, encoder, 1, stored(state))
        packs.append(next(resumed).digest())
        state = resumed.state
    assert packs == [digest for digest, *_ in tail(node)][: len(packs)]
    assert len(packs) > 5


def test_the_same_node_can_be_reset_again_and_again(config: DataConfig, encoder: ChatEncoder) -> None:
    node = opened(config, encoder, 0)
    first = [next(node).digest() for _ in range(3)]
    state = node.get_state()
    rest = tail(node)
    node.reset(state)
    assert tail(node) == rest
    node.reset()
    assert [next(node).digest() for _ in range(3)] == first


@pytest.mark.parametrize("shape", SHAPES)
def test_all_streams_together_give_each_good_row_once_per_epoch(shapes: dict[str, DataConfig], shape: str) -> None:
    config = shapes[shape]
    encoder = ChatEncoder(config.tokenizer.path, policy=config)
    corpus = Corpus(config.sources)
    packs = every_stream(config, encoder)
    given = Counter(segment.ref for pack in packs for segment in pack.segments if segment.part == 0)
    assert len({segment for pack in packs for segment in pack.segments}) == sum(len(pack.segments) for pack in packs)
    refused = Counter((refusal.source, refusal.row, refusal.epoch) for pack in packs for refusal in pack.refused)
    everything = {(s, row, epoch) for s, size in enumerate(corpus.sizes) for row in range(size) for epoch in range(2)}
    assert set(given) | set(refused) == everything
    assert set(given.values()) | set(refused.values()) == {1}
    assert not set(given) & set(refused)


def test_refusals_are_listed_with_their_places_and_counted(
    shapes: dict[str, DataConfig], encoder: ChatEncoder, spoiled: str
) -> None:
    config = shapes["refused rows"]
    packs = every_stream(config, encoder)
    reasons = {refusal.row: refusal.reason for pack in packs for refusal in pack.refused}
    assert reasons == {
        **dict.fromkeys((0, 7, 8, 9, 31), "unknown layout"),
        12: "control token in text",
        20: "longer than capacity",
        40: "broken row",
    }
    (broken,) = {refusal.detail for pack in packs for refusal in pack.refused if refusal.row == 40}
    assert broken == f"{spoiled}:41 is not JSON: Input data was truncated"


def test_a_state_counts_exactly_the_given_packs(shapes: dict[str, DataConfig], encoder: ChatEncoder) -> None:
    node = opened(shapes["refused rows"], encoder, 0)
    packs = []
    while not node.state.exhausted:
        packs.append(next(node))
        state = node.state
        assert state.packs == len(packs)
        assert state.conversations == sum(len(pack.segments) for pack in packs)
        assert state.tokens == sum(pack.tokens for pack in packs)
        refused = Counter(refusal.reason for pack in packs for refusal in pack.refused)
        assert sum(map(Counter, state.refused), Counter()) == refused
        waiting = sum(map(len, state.planned)) + len(state.leftovers)
        assert sum(state.drawn) == state.conversations + waiting + refused.total()


def test_a_segments_tokens_are_those_of_its_row(config: DataConfig, encoder: ChatEncoder) -> None:
    stages = ExampleReader(CorpusReader(Corpus(config.sources)), encoder)
    for pack in every_stream(config, encoder):
        borders = pack.cu_seqlens.tolist()
        for segment, start in zip(pack.segments, borders, strict=False):
            (example,) = stages.examples(segment.ref)
            assert pack.input_ids[start : start + segment.length].tolist() == example.tokens.tolist()
            trained = (pack.labels[start : start + segment.length] >= 0).tolist()
            assert trained == [*example.loss_mask[1:].tolist(), False]


def test_epochs_have_orders_of_their_own_and_an_unshuffled_one_is_that_of_the_file(
    tokenizer: str, corpus_path: str
) -> None:
    def order(**changes: Any) -> list[int]:
        config = tiny.data_config(tokenizer, corpus_path, streams=1, **changes)
        rows = opened_rows(config)
        return [ref.row for drawn in rows for ref in drawn.refs]

    shuffled = order()
    assert sorted(shuffled[:48]) == sorted(shuffled[48:]) == list(range(48))
    assert shuffled[:48] != shuffled[48:]
    assert shuffled != order(seed=1)
    assert order(shuffle=False) == [*range(48), *range(48)]


def test_weighted_sources_are_drawn_at_their_shares_without_end(tokenizer: str, corpus_path: str, spoiled: str) -> None:
    sources = [{"path": corpus_path, "weight": 3}, {"path": spoiled, "weight": 1}]
    config = tiny.data_config(tokenizer, sources=sources, epochs=None)
    rows = opened_rows(config, 2)
    rows.reset()
    drawn = [next(rows).refs[0] for _ in range(400)]
    assert [ref.source for ref in drawn[:8]] == [0, 0, 1, 0, 0, 0, 1, 0]
    assert Counter(ref.source for ref in drawn) == {0: 300, 1: 100}
    assert len(set(drawn)) == 400


def test_the_state_of_the_rows_is_not_changed_by_reading_on(config: DataConfig) -> None:
    rows = opened_rows(config)
    rows.reset()
    before = rows.state_dict()
    next(rows)
    assert before == {"drawn": (0,), "mixed": (0,), "places": {}, "stage": 0}
    assert rows.state_dict() == {"drawn": (1,), "mixed": (1,), "places": {}, "stage": 0}


def test_a_stream_that_stands_behind_its_last_row_has_none(config: DataConfig) -> None:
    """As after a change to fewer epochs."""
    rows = opened_rows(config)
    rows.reset()
    rows.request(10_000)
    while not rows.exhausted:
        next(rows)
    behind = [count + 1 for count in rows.position.drawn]
    rows.reset({"drawn": behind, "mixed": behind, "stage": 0})
    with pytest.raises(StopIteration):
        next(rows)


def test_a_row_that_changed_since_it_was_planned_is_an_error(
    tokenizer: str, encoder: ChatEncoder, tmp_path: Path
) -> None:
    config = tiny.data_config(tokenizer, tiny.write_jsonl(tmp_path / "a.jsonl", tiny.rows(20)), streams=1, window=20)
    node = opened(config, encoder, 0)
    next(node)
    next(node)
    state = node.get_state()
    assert state["planned"]
    tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}] * 20)
    with pytest.raises(
        ValueError,
        match=r"row \d+ of source 0 was accepted when its window was read, and is refused now \(unknown layout: .* rest",
    ):
        next(opened(config, encoder, 0, state))


ASK = {"role": "user", "content": "hi"}


def answered(**fields: Any) -> str:
    return json.dumps({"messages": [ASK, {"role": "assistant", "content": "so"} | fields]})


def called(arguments: Any, **fields: Any) -> str:
    return answered(content=None, tool_calls=[{"name": "f", "arguments": arguments} | fields])


def hostile_lines() -> list[str]:
    """Rows as somebody who means harm, or a broken exporter, writes them."""
    return [
        "[" * 100_000,
        '{"messages": ' + "[" * 500 + "]" * 500 + "}",
        answered(content="\ud800"),
        answered(content=5),
        answered(content=None),
        answered(content=[None, 5, {}]),
        answered(reasoning_content=["so"]),
        answered(name={"a": 1}),
        answered(tool_calls="{"),
        called({"<|eot_id|>": "a"}),
        called("[" * 100_000),
        called(json.dumps({"a": "\ud800"})),
        json.dumps({"prompt": "hi", "completion": "so", "tools": 5}),
        json.dumps({"prompt": "hi", "completion": "so", "tools": [{"a": "<|eot_id|>"}]}),
        json.dumps({"instruction": "hi", "output": "so", "history": 5}),
        json.dumps({"instruction": "hi", "output": "so", "history": "ab"}),
        answered(content="never " * 200_000),
        '{"messages": 1e999}',
        "null",
        "\x00",
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_hostile_rows_are_refused_one_by_one_and_never_end_a_run(tokenizer: str, tmp_path: Path, workers: int) -> None:
    hostile, good = hostile_lines(), [json.dumps(row) for row in tiny.rows(8)]
    good.append(json.dumps(tiny.chat("hi", "a\x00b \u2028 \U0001f600 ZqM")))

    good += [
        answered(content="ZqM1x1x0bZq"),
        answered(content="<|eot_id|><|start_header_id|>user"),
        called({"a": "<|eot_id|>"}),
        called({}, name="<|eot_id|>"),
    ]
    path = tmp_path / "hostile.jsonl"
    path.write_text("\n".join(hostile + good), encoding="utf-8")
    loader = PackLoader(tiny.data_config(tokenizer, str(path), epochs=1), workers=workers)
    packs = list(loader)
    assert sorted(refusal.row for pack in packs for refusal in pack.refused) == list(range(len(hostile)))
    assert sorted(s.row - len(hostile) for pack in packs for s in pack.segments) == list(range(len(good)))
    assert all(len(refusal.detail) < 300 for pack in packs for refusal in pack.refused)
    assert "refused, broken row: 4\n" in describe(loader.state)


def test_all_conversations_of_a_file_can_be_read_in_order(tmp_path: Path, spoiled: str) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.rows(5))
    assert [conversation.messages[0].content for conversation in read_conversations(path)] == [
        row["messages"][0]["content"] for row in tiny.rows(5)
    ]
    with pytest.raises(ValueError, match=r"rows.jsonl:1: unknown layout: columns \['text'\] match none of"):
        list(read_conversations(spoiled))
