"""The number of streams that a new run chooses, kept by every resume; and the packs that a run can expect."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny
from test_earlier_versions import FIXTURES, mixed_sources

from sftstream import DataConfig, PackLoader, Shard, merge
from sftstream.sources import Corpus
from sftstream.streaming.forecast import Content, Forecast, choose_streams, estimate_content, foresee
from sftstream.streaming.length_sample import TO_CHOOSE, LengthSample, SampleSize, sample_lengths

STATE = FIXTURES if FIXTURES.name == "version_0_1_0" else FIXTURES / "version_0_1_0"


@pytest.fixture
def thousand(tokenizer: str, tmp_path: Path) -> DataConfig:
    """1,000 rows; tests vary their lengths."""
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [tiny.chat(str(number), "x") for number in range(1000)])
    return tiny.data_config(tokenizer, path, streams="auto", capacity=1000, window=8, epochs=1)


@pytest.mark.parametrize(
    ("length", "shards", "streams"),
    [
        (10, 1, 1),  # 10 packs
        (10, 8, 8),
        (127, 1, 1),  # 127 packs: two streams would hold 63 each
        (128, 1, 2),
        (256, 1, 4),
        (256, 3, 3),
        (512, 3, 6),
        (1000, 1, 8),  # 1,000 packs would do for 15 streams
        (1000, 6, 12),
        (1000, 100, 100),
    ],
)
def test_each_stream_holds_enough_packs_unless_there_are_more_shards(
    thousand: DataConfig, length: int, shards: int, streams: int
) -> None:
    samples = [LengthSample(4, (length,) * 4)]
    assert choose_streams(thousand, Corpus(thousand.sources), samples, shards) == streams


@pytest.mark.parametrize(
    ("changes", "streams"),
    [
        ({"window": 32}, 4),  # 1,000 examples are 31 windows of 32
        ({"window": 256}, 1),
        ({"window": 64, "epochs": 2}, 4),
        ({"window": 1, "epochs": 1000}, 64),
        ({"capacity": 5000}, 2),
        ({"epochs": None}, 8),  # as one epoch
    ],
)
def test_windows_epochs_and_capacity_decide_as_well(
    thousand: DataConfig, changes: dict[str, Any], streams: int
) -> None:
    config = msgspec.structs.replace(thousand, **changes)
    assert choose_streams(config, Corpus(config.sources), [LengthSample(4, (1000,) * 4)], 1) == streams


def test_refused_rows_and_rows_in_several_parts_count_as_what_they_give(thousand: DataConfig) -> None:
    corpus = Corpus(thousand.sources)
    assert estimate_content(thousand, corpus, [LengthSample(10, (7, 9))]) == [Content(200, 1600)]
    assert estimate_content(thousand, corpus, [LengthSample(2, (7, 9, 8, 8))]) == [Content(2000, 16000)]
    assert choose_streams(thousand, corpus, [LengthSample(10, ())], 2) == 2


@pytest.mark.parametrize(("files", "shards", "streams"), [(1, 1, 1), (1, 3, 3), (5, 1, 4), (12, 3, 12), (100, 1, 64)])
def test_streams_of_a_streamed_source_read_a_file_each(
    tokenizer: str, tmp_path: Path, files: int, shards: int, streams: int
) -> None:
    for number in range(files):
        tiny.write_jsonl(tmp_path / f"{number}.jsonl", tiny.rows(2))
    source = {"path": str(tmp_path / "*.jsonl"), "streaming": True}
    config = tiny.data_config(tokenizer, sources=[source], streams="auto", shuffle="shards")
    loader = PackLoader(config, shard=Shard(0, shards))
    assert loader.config.streams == streams
    assert loader.forecast() == Forecast(streams, 4, 256, None, None)


def test_a_sample_has_equal_rows_on_every_shard_and_leaves_refused_rows_out(tokenizer: str, tmp_path: Path) -> None:
    rows = [tiny.chat("a", "b"), {"text": "?"}, tiny.chat("a", "river " * 300), tiny.chat("a", "b", "c", "d")]
    config = tiny.data_config(tokenizer, tiny.write_jsonl(tmp_path / "rows.jsonl", rows))
    loader = PackLoader(config)
    samples = sample_lengths(loader.corpus, loader.encoder, TO_CHOOSE)
    assert samples is not None
    assert (samples[0].rows, sorted(samples[0].lengths)) == (
        4,
        sorted(
            len(e.tokens)
            for e in (*loader.encoder.encode(rows[0]["messages"]), *loader.encoder.encode(rows[3]["messages"]))
        ),
    )  # type: ignore[index]
    many = PackLoader(tiny.data_config(tokenizer, tiny.write_jsonl(tmp_path / "many.jsonl", tiny.rows(400))))
    few = sample_lengths(many.corpus, many.encoder, SampleSize(1000, 500))
    assert few is not None
    assert few[0].rows == 16
    assert few == sample_lengths(many.corpus, many.encoder, SampleSize(1000, 500))


@pytest.fixture
def auto(tokenizer: str, tmp_path: Path) -> DataConfig:
    """1,500 rows in two epochs: 8 streams for one shard, 6 for three."""
    path = tiny.write_jsonl(tmp_path / "many.jsonl", tiny.rows(1500))
    return tiny.data_config(tokenizer, path, streams="auto", capacity=512, global_batch=6)


def test_a_resume_on_another_topology_keeps_the_chosen_streams_and_their_packs(auto: DataConfig) -> None:
    loaders = [PackLoader(auto, shard=Shard(index, 3), workers=index % 2) for index in range(3)]
    assert {loader.config.streams for loader in loaders} == {6}
    begun = [pack for packs in zip(*(loader.next_step() for loader in loaders), strict=True) for pack in packs]
    state = merge([loader.state_dict() for loader in loaders])
    for loader in loaders:
        loader.close()
    assert state["identity"]["streams"] == 6
    explicit = PackLoader(msgspec.structs.replace(auto, streams=6))
    assert tiny.digests(explicit.next_step()) == tiny.digests(begun)
    rest = tiny.digests(explicit)
    assert PackLoader(auto).config.streams == 8
    for workers in (0, 2):
        resumed = PackLoader(auto, state=state, workers=workers)
        assert resumed.config.streams == 6
        assert tiny.digests(resumed) == rest


def test_more_shards_than_streams_are_an_error_whose_remedy_works(auto: DataConfig) -> None:
    loader = PackLoader(auto)
    given = Counter((s.row, s.epoch) for _ in range(3) for pack in loader.next_step() for s in pack.segments)
    state = loader.state_dict()
    with pytest.raises(ValueError, match=r"^streams = 8 is too low for 9 shards") as error:
        PackLoader(auto, state=state, shard=Shard(0, 9))
    remedy = 'set data.streams = 9 and data.accept_changed = ["data.streams"] to rebase the state'
    assert str(error.value) == f"streams = 8 is too low for 9 shards, which need a stream each; {remedy}"
    wider = msgspec.structs.replace(auto, streams=9, accept_changed=("data.streams",))
    shards = [PackLoader(wider, state=state, shard=Shard(index, 9)) for index in range(9)]
    given += Counter((s.row, s.epoch) for loader in shards for pack in loader for s in pack.segments)
    assert given == Counter((row, epoch) for row in range(1500) for epoch in range(2))


def test_a_run_begun_under_format_3_goes_on_with_its_streams_and_its_packs(tmp_path: Path, tokenizer: str) -> None:
    config = tiny.data_config(
        {"path": tokenizer, "backend": "huggingface"},
        sources=mixed_sources(tmp_path),
        streams="auto",
        capacity=96,
        overflow="split",
        mix_by="tokens",
        window=6,
    )
    saved = json.loads((STATE / "state.json").read_text())
    loader = PackLoader(config, state=saved["state"])
    assert loader.config.streams == 4
    assert tiny.digests(loader) == saved["digests"]


def test_a_forecast_says_packs_steps_and_fill(auto: DataConfig) -> None:
    loader = PackLoader(auto)
    forecast = loader.forecast()
    packs = [pack for pack in loader if pack.segments]
    assert forecast.packs == pytest.approx(len(packs), rel=0.05)
    assert forecast.fill == pytest.approx(sum(pack.tokens for pack in packs) / (len(packs) * 512), abs=0.01)
    assert forecast.steps == -(-forecast.packs // 6)
    endless = PackLoader(msgspec.structs.replace(auto, epochs=None)).forecast()
    assert (endless.packs, endless.steps) == (None, None)
    assert endless.fill == pytest.approx(1, abs=0.02)


def test_a_forecast_begun_with_the_workers_is_the_same(auto: DataConfig) -> None:
    loader = PackLoader(auto, workers=1)
    expected = loader.forecast()
    loader.start(foresees=True)
    assert loader.forecast() == expected
    loader.close()


def test_a_forecast_begun_with_the_workers_is_made_by_another_process(
    auto: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftstream.loader.foresee", lambda *_: Forecast(1, 1, 1, os.getpid(), None))
    loader = PackLoader(auto, workers=1)
    loader.start(foresees=True)
    assert loader.forecast().packs != os.getpid()
    assert loader.forecast().packs == os.getpid()
    loader.close()
    loader.start(foresees=True)
    loader.close()
    assert loader.forecast().packs == os.getpid()


def test_a_forecast_counts_the_ends_of_streams(thousand: DataConfig) -> None:
    """10,000 tokens are 10 packs; eight streams leave half a pack each."""
    corpus, samples = Corpus(thousand.sources), [LengthSample(2, (10, 10))]
    one, eight = (foresee(msgspec.structs.replace(thousand, streams=streams), corpus, samples) for streams in (1, 8))
    assert one == Forecast(1, 4, 1000, 10, 1.0)
    assert eight == Forecast(8, 4, 1000, 14, pytest.approx(10 / 14))


@pytest.mark.parametrize(
    ("forecast", "steps", "line"),
    [
        (
            Forecast(1, 4, 512, 80, 0.99),
            None,
            "about 80 packs of 512 tokens in 20 steps, about 99.0% full; 1 logical stream",
        ),
        (
            Forecast(8, 4, 512, 79, 0.99),
            50,
            "about 79 packs of 512 tokens in 20 steps, about 99.0% full; 8 logical streams",
        ),
        (Forecast(8, 4, 512, 80, 0.99), 1, "4 packs of 512 tokens in 1 step, about 99.0% full; 8 logical streams"),
        (Forecast(8, 4, 512, None, None), None, "packs of 512 tokens; 8 logical streams"),
        (Forecast(8, 4, 512, None, 1.0), 9, "36 packs of 512 tokens in 9 steps, about 100.0% full; 8 logical streams"),
        (
            Forecast(1, 64, 8192, 71, 0.991),
            None,
            "about 71 packs of 8,192 tokens in 2 steps, about 99.1% full; 1 logical stream; about 57 of the 64 "
            "packs of the last step are empty: a smaller data.global_batch leaves fewer packs empty",
        ),
    ],
)
def test_a_forecast_in_words(forecast: Forecast, steps: int | None, line: str) -> None:
    assert forecast.describe(steps) == line


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("rows", "epochs", "most", "over"), [(1000, 3, 0.96, None), (7473, 1, 0.97, None), (400, 1, None, 2)]
)
def test_defaults_fill_the_packs_of_small_sets(
    realdata: Path, tmp_path: Path, rows: int, epochs: int, most: float | None, over: int | None
) -> None:
    lines = (realdata / "conversations" / "alpaca" / "gsm8k_train.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(lines[:rows]))
    table = {
        "sources": [{"path": str(path)}],
        "tokenizer": {"path": str(realdata / "tokenizers" / "llama3")},
        "epochs": epochs,
        "workers": 0,
    }
    packs = [pack for pack in PackLoader(msgspec.convert(table, DataConfig)) if pack.segments]
    tokens = sum(pack.tokens for pack in packs)
    assert most is None or tokens / (8192 * len(packs)) >= most
    assert over is None or len(packs) <= -(-tokens // 8192) + over
