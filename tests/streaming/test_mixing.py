"""Sources are mixed by counters: exact shares, passes and stages, whatever the topology, and no state but the counters."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny

from sftstream import DataConfig, DataState, PackLoader, describe, merge
from sftstream.streaming.sampler import IndexedCursor, RowSampler


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three sources: 40 short, 30 middling and 20 long conversations."""
    directory = tmp_path_factory.mktemp("sources")
    result = []
    for name, count, words in (("short", 40, 2), ("middling", 30, 10), ("long", 20, 30)):
        rows = [tiny.chat(f"{i} river", " ".join(["copper"] * words)) for i in range(count)]
        result.append(tiny.write_jsonl(directory / f"{name}.jsonl", rows))
    return result


def _config(tokenizer: str, files: list[str], sources: list[dict[str, Any]], **changes: Any) -> DataConfig:
    tables = [{"path": path} | more for path, more in zip(files, sources, strict=True)]
    return tiny.data_config(tokenizer, sources=tables, **changes)


def _drawn(config: DataConfig, draws: int) -> list[Counter[int]]:
    """What all streams together draw from each source in `draws` rows: shares alone, no conversation is read."""
    result = []
    for stream in range(config.stream_count):
        rows = RowSampler(config, [IndexedCursor((size,), config, i, stream) for i, size in enumerate((40, 30, 20))])
        rows.reset()
        counts: Counter[int] = Counter()
        for _ in range(draws // config.stream_count):
            counts[next(rows).refs[0].source] += 1
        result.append(counts)
    return result


def test_weights_are_kept_to_a_hundredth_after_ten_thousand_conversations(tokenizer: str, files: list[str]) -> None:
    config = _config(tokenizer, files, [{"weight": 5}, {"weight": 3.5}, {"weight": 1.5}], epochs=None)
    counts = sum(_drawn(config, 10_000), Counter())
    for source, share in enumerate((0.5, 0.35, 0.15)):
        assert counts[source] / 10_000 == pytest.approx(share, abs=0.001)


@pytest.mark.parametrize("mix_by", ["tokens", "trained_tokens"])
def test_weights_can_be_shares_of_tokens(tokenizer: str, files: list[str], mix_by: str) -> None:
    config = _config(tokenizer, files, [{"weight": 2}, {"weight": 1}, {"weight": 1}], epochs=None, mix_by=mix_by)
    loader = PackLoader(config)
    tiny.take(loader, 400)
    accepted = [stream.accepted for stream in loader.state.streams.values()]
    amounts = [sum(getattr(stream[source], mix_by) for stream in accepted) for source in range(3)]
    for source, share in enumerate((0.5, 0.25, 0.25)):
        assert amounts[source] / sum(amounts) == pytest.approx(share, abs=0.01)
    report = describe(loader.state_dict())
    shares = [f"{amount / sum(amounts):.1%} of {mix_by.replace('_', ' ')}" for amount in amounts]
    assert all(share in report for share in shares)


def test_stages_change_the_weights_where_they_say(tokenizer: str, files: list[str]) -> None:
    stages = [{"after": 400, "weights": [0, 1, 1]}, {"after": 800, "weights": [1, 0, 3]}]
    config = _config(tokenizer, files, [{"weight": 1}, {"weight": 1}, {"weight": 2}], epochs=None, stages=stages)
    for until, shares in ((400, (100, 100, 200)), (800, (100, 300, 400)), (1200, (200, 300, 700))):
        counts = sum(_drawn(config, until), Counter())
        assert tuple(counts[source] for source in range(3)) == shares


def test_repeat_is_passes_in_an_epoch_and_may_be_a_fraction(tokenizer: str, files: list[str]) -> None:
    config = _config(tokenizer, files, [{"repeat": 2}, {"repeat": 0.5}, {}], epochs=2, shuffle=False)
    seen = Counter((s.source, s.row) for pack in PackLoader(config) for s in pack.segments)
    assert [{seen[0, row] for row in range(40)}, {seen[2, row] for row in range(20)}] == [{4}, {2}]
    assert [seen[1, row] for row in range(30)] == [1] * 30  # the first half in one epoch, the other in the next


def test_a_finite_mixture_ends_with_the_last_source_or_with_the_first(tokenizer: str, files: list[str]) -> None:
    sources = [{"weight": 1}, {"weight": 1}, {"weight": 1}]
    counts = {}
    for ends_with in ("all", "first"):
        config = _config(tokenizer, files, sources, epochs=1, ends_with=ends_with)
        counts[ends_with] = Counter(s.source for pack in PackLoader(config) for s in pack.segments)
    assert counts["all"] == {0: 40, 1: 30, 2: 20}
    assert counts["first"][2] == 20
    assert counts["first"][0] in range(18, 25)
    assert counts["first"][1] in range(18, 25)


@pytest.mark.parametrize("mix_by", ["conversations", "tokens", "trained_tokens"])
def test_a_mixture_goes_on_exactly_from_every_state(tokenizer: str, files: list[str], mix_by: str) -> None:
    stages = [{"after": 60, "weights": [3, 1, 0]}, {"after": 140, "weights": [1, 1, 1]}]
    sources = [{"weight": 1}, {"weight": 2}, {"weight": 1}]
    config = _config(tokenizer, files, sources, epochs=4, mix_by=mix_by, stages=stages)
    whole = tiny.digests(PackLoader(config))
    loader = PackLoader(config)
    for taken in range(1, len(whole)):
        next(loader)
        if taken % 3 == 0:
            loader = PackLoader(config, state=merge([loader.state_dict()]))
        assert DataState.parse(loader.state_dict()).packs == taken
    assert tiny.digests([next(loader)]) == whole[-1:]


def test_a_source_of_which_everything_is_refused_does_not_hang_a_mixture_by_tokens(
    tokenizer: str, files: list[str], tmp_path: Path
) -> None:
    bad = tiny.write_jsonl(tmp_path / "bad.jsonl", [{"text": "?"}] * 5)
    config = _config(tokenizer, [files[0], bad], [{"weight": 1}, {"weight": 1}], epochs=None, mix_by="tokens")
    with pytest.raises(ValueError, match=r"source 1 holds no conversation to train: each of its 5 rows is refused"):
        tiny.take(PackLoader(config), 50)
