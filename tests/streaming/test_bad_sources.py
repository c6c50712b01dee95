"""A source without one conversation is an error in the first window, under every mixture and on every topology."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from sftstream import PackLoader, Shard

MIXTURES = ["conversations", "tokens", "trained_tokens"]


def _bad(count: int) -> list[dict[str, Any]]:
    return [{"text": "?"} for _ in range(count)]


@pytest.mark.parametrize("mix_by", MIXTURES)
@pytest.mark.parametrize("bad", [{}, {"streaming": True, "shuffle": "shards"}])
@pytest.mark.parametrize("epochs", [None, 1])
@pytest.mark.parametrize("streams", [1, 4])
def test_a_source_without_a_conversation_is_an_error_at_once(
    tokenizer: str, tmp_path: Path, mix_by: str, bad: dict[str, Any], epochs: int | None, streams: int
) -> None:
    sources = [
        {"path": tiny.write_jsonl(tmp_path / "good.jsonl", tiny.rows(40)), "weight": 1},
        {"path": tiny.write_jsonl(tmp_path / "bad.jsonl", _bad(3)), "weight": 1, **bad},
    ]
    loader = PackLoader(tiny.data_config(tokenizer, sources=sources, mix_by=mix_by, epochs=epochs, streams=streams))
    with pytest.raises(
        ValueError,
        match=r"source 1 holds no conversation to train: each of its 3 rows is refused \(unknown layout: 3",
    ):
        list(loader)


@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("epochs", [1, 4, None])
def test_an_all_refused_run_is_an_error_with_any_number_of_streams_and_shards(
    tokenizer: str, tmp_path: Path, streams: int, epochs: int | None
) -> None:
    path = tiny.write_jsonl(tmp_path / "bad.jsonl", _bad(4))
    config = tiny.data_config(tokenizer, path, streams=streams, epochs=epochs)
    for index in range(streams):
        with pytest.raises(ValueError, match="source 0 holds no conversation to train: each of its 4 rows is refused"):
            list(PackLoader(config, shard=Shard(index, streams)))


@pytest.mark.parametrize("mix_by", MIXTURES)
def test_one_good_row_is_enough(tokenizer: str, tmp_path: Path, mix_by: str) -> None:
    rows = [*_bad(30), *tiny.rows(1), *_bad(30)]
    sources = [
        {"path": tiny.write_jsonl(tmp_path / "poor.jsonl", rows), "weight": 1},
        {"path": tiny.write_jsonl(tmp_path / "good.jsonl", tiny.rows(30)), "weight": 1},
    ]
    packs = list(PackLoader(tiny.data_config(tokenizer, sources=sources, mix_by=mix_by, max_refused=1.0)))
    assert sum(segment.source == 0 for pack in packs for segment in pack.segments) == 2
    assert sum(len(pack.refused) for pack in packs) == 120


def test_rows_too_long_for_a_pack_are_no_conversations(tokenizer: str, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "long.jsonl", [tiny.chat("Hello?", "north " * 500)] * 3)
    with pytest.raises(ValueError, match=r"each of its 3 rows is refused \(longer than capacity: 3"):
        list(PackLoader(tiny.data_config(tokenizer, path, epochs=None)))


def test_the_largest_number_of_epochs_is_like_no_end(tokenizer: str, corpus_path: str) -> None:
    huge = PackLoader(tiny.data_config(tokenizer, corpus_path, epochs=10**12))
    few = PackLoader(tiny.data_config(tokenizer, corpus_path, epochs=None))
    assert tiny.digests(tiny.take(huge, 12)) == tiny.digests(tiny.take(few, 12))
    again = PackLoader(tiny.data_config(tokenizer, corpus_path, epochs=10**12), state=huge.state_dict())
    assert next(again).digest() == next(few).digest()
