"""The limits on refused rows hold for each source, over all shards, at the border of a step."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from sftstream import DataConfig, PackLoader, RowCounts, Shard, describe, merge, require_few_refused, sum_row_counts

LONG = tiny.chat("Hello?", "north " * 500)
BOTH_OFF = {"max_refused": 1.0, "max_too_long": 1.0}


def _bad(count: int) -> list[dict[str, Any]]:
    return [{"text": "?"} for _ in range(count)]


def _spread(good: list[Any], bad: list[Any]) -> list[Any]:
    """The bad rows evenly between the good rows."""
    ends = [len(good) * (i + 1) // len(bad) for i in range(len(bad))]
    return [row for i, row in enumerate(bad) for row in (*good[ends[i - 1] if i else 0 : ends[i]], row)]


def _steps_until_error(config: DataConfig, shards: int) -> tuple[int, str]:
    """The number of whole steps before an error, and the error, as a trainer of `shards` ranks finds them."""
    loaders = [PackLoader(config, shard=Shard(index, shards)) for index in range(shards)]
    for step in itertools.count():
        try:
            for loader in loaders:
                loader.next_step()
            counts = sum_row_counts(loader.row_counts for loader in loaders)
            require_few_refused(config, loaders[0].corpus.sizes, counts)
        except ValueError as error:
            return step, re.split(r" \(one is |; ", str(error))[0]
        if all(loader.exhausted for loader in loaders):
            return step + 1, ""
    raise AssertionError


@pytest.mark.parametrize(
    ("bad", "settings", "problem"),
    [
        (_bad(30), {}, " rows are refused for other reasons than their length, more than data.max_refused = 0.1"),
        (_bad(30), {"max_refused": 0.3}, ""),
        ([LONG] * 30, {}, ""),
        ([LONG] * 30, {"max_too_long": 0.05}, " rows are too long, more than data.max_too_long = 0.05"),
        ([LONG] * 60, {"max_refused": 0}, ""),
        ([LONG] * 200, {}, " rows are too long, more than data.max_too_long = 0.5"),
    ],
)
def test_every_topology_stops_at_the_same_step(
    tokenizer: str, tmp_path: Path, bad: list[Any], settings: dict[str, Any], problem: str
) -> None:
    sources = [
        {"path": tiny.write_jsonl(tmp_path / "good.jsonl", tiny.rows(60)), "weight": 1},
        {"path": tiny.write_jsonl(tmp_path / "poor.jsonl", _spread(tiny.rows(120, seed=1), bad)), "weight": 1},
    ]
    config = tiny.data_config(tokenizer, sources=sources, shuffle=False, **settings)
    step, error = _steps_until_error(config, 1)
    assert step > 1
    assert problem in error
    assert bool(problem) == error.startswith(f"source 1 ({tmp_path / 'poor.jsonl'}): ")
    for shards in (3, 4):
        assert _steps_until_error(config, shards) == (step, error)


def test_one_of_several_shards_does_not_judge_alone(tokenizer: str, tmp_path: Path) -> None:
    """A third of the rows of stream 0 is refused, a twelfth of all rows."""
    rows: list[Any] = tiny.rows(1200)
    for number in range(0, 1200, 12):
        rows[number] = {"text": "?"}
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    config = tiny.data_config(tokenizer, path, shuffle=False, epochs=1)
    loaders = [PackLoader(config, shard=Shard(index, 4)) for index in range(4)]
    assert [sum(len(pack.refused) for pack in loader) for loader in loaders] == [100, 0, 0, 0]
    assert loaders[0].row_counts == (RowCounts(200, 0, 100),)
    assert sum_row_counts(loader.row_counts for loader in loaders) == (RowCounts(1100, 0, 100),)
    assert sum(len(pack.refused) for pack in PackLoader(config)) == 100


def test_the_message_names_an_example_and_both_limits(tokenizer: str, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [*tiny.rows(90), *_bad(20)])
    with pytest.raises(ValueError, match=r"^source 0") as error:
        list(PackLoader(tiny.data_config(tokenizer, path, shuffle=False)))
    message = str(error.value)
    assert re.match(
        re.escape(f"source 0 ({path}): ")
        + r"1\d of 1\d\d rows, read in several passes over its 110, are refused for other reasons than their length, "
        + "more than "
        + re.escape(f"data.max_refused = 0.1 (one is {path}:")
        + r"(9[1-9]|1\d\d): "
        + re.escape("unknown layout: columns ['text'] match none of "),
        message,
    )
    assert message.endswith(
        "; correct the rows, or raise data.max_refused (data.max_too_long is the limit for lengths)"
    )
    path = tiny.write_jsonl(tmp_path / "long.jsonl", [*tiny.rows(40), *[LONG] * 80])
    with pytest.raises(ValueError, match=r"^source 0") as error:
        list(PackLoader(tiny.data_config(tokenizer, path, shuffle=False)))
    message = str(error.value)
    assert (
        f" rows, read in several passes over its 120, are too long, more than data.max_too_long = 0.5 (one is {path}:"
        in message
    )
    assert ": longer than capacity" in message
    assert message.endswith(
        "data.overflow, or raise data.max_too_long (data.max_refused is the limit for other reasons)"
    )


def test_fewer_than_a_hundred_rows_are_not_judged(tokenizer: str, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [*tiny.rows(40), *_bad(20)])
    assert sum(len(pack.refused) for pack in PackLoader(tiny.data_config(tokenizer, path, epochs=1))) == 20


def test_counts_survive_a_resume(tokenizer: str, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", _spread(tiny.rows(110), _bad(50)))
    free = tiny.data_config(tokenizer, path, shuffle=False, **BOTH_OFF)
    loader = PackLoader(free)
    while loader.row_counts[0].rows < 100:
        loader.next_step()
    limited = tiny.data_config(tokenizer, path, shuffle=False)
    resumed = PackLoader(limited, state=json.loads(json.dumps(loader.state_dict())))
    assert resumed.row_counts == loader.row_counts
    with pytest.raises(ValueError, match=r"more than data.max_refused"):
        resumed.next_step()
    halves = [PackLoader(free, shard=Shard(index, 2), state=loader.state_dict()) for index in range(2)]
    assert sum_row_counts(half.row_counts for half in halves) == loader.row_counts
    assert merge([half.state_dict() for half in halves]) == loader.state_dict()


@pytest.mark.parametrize("mix_by", ["conversations", "tokens", "trained_tokens"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_of_refused_rows_holds_up_no_other_source(
    tokenizer: str, tmp_path: Path, mix_by: str, streaming: bool
) -> None:
    poor = {"streaming": True, "shuffle": "shards"} if streaming else {}
    sources = [
        {"path": tiny.write_jsonl(tmp_path / "poor.jsonl", [*tiny.rows(2), *_bad(4000)]), "weight": 1, **poor},
        {"path": tiny.write_jsonl(tmp_path / "good.jsonl", tiny.rows(60)), "weight": 1},
    ]
    config = tiny.data_config(tokenizer, sources=sources, mix_by=mix_by, epochs=None, **BOTH_OFF)
    loader = PackLoader(config)
    for _ in range(8):
        packs = loader.next_step()
        assert all(pack.segments for pack in packs)
    for stream in loader.state.streams.values():
        poor_rows, good_rows = stream.drawn
        assert poor_rows <= 24 * good_rows


@pytest.mark.parametrize("mix_by", ["tokens", "trained_tokens"])
def test_refused_rows_hardly_move_the_mixture(tokenizer: str, tmp_path: Path, mix_by: str) -> None:
    """A tenth of one source is refused, and the mixture is less than 1 % away from the weights."""
    sources = [
        {"path": tiny.write_jsonl(tmp_path / "a.jsonl", _spread(tiny.rows(450), _bad(50))), "weight": 1},
        {"path": tiny.write_jsonl(tmp_path / "b.jsonl", tiny.rows(300, seed=1)), "weight": 1},
    ]
    loader = PackLoader(tiny.data_config(tokenizer, sources=sources, mix_by=mix_by, epochs=None, **BOTH_OFF))
    tiny.take(loader, 160)
    totals = [sum(getattr(s.accepted[source], mix_by) for s in loader.state.streams.values()) for source in (0, 1)]
    assert abs(totals[0] / sum(totals) - 0.5) < 0.01


def test_a_source_with_hardly_a_conversation_stops_an_endless_run_at_its_first_step(
    tokenizer: str, tmp_path: Path
) -> None:
    path = tiny.write_jsonl(tmp_path / "rare.jsonl", [*_bad(6000), *tiny.rows(3)])
    loader = PackLoader(tiny.data_config(tokenizer, path, epochs=None))
    with pytest.raises(ValueError, match=r": 4,\d\d\d of 4,\d\d\d rows are refused"):
        loader.next_step()
    assert loader.state.packs == 0


def test_rows_that_were_read_several_times_are_no_rows_of_the_file(tokenizer: str, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "half.jsonl", [*_bad(20), *tiny.rows(20)])
    loader = PackLoader(tiny.data_config(tokenizer, path, epochs=None))
    with pytest.raises(ValueError, match=r"\d+ of \d+ rows, read in several passes over its 40, are refused"):
        tiny.take(loader, 400)


def test_a_run_goes_on_exactly_over_empty_packs(tokenizer: str, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "rare.jsonl", [*_bad(6000), *tiny.rows(3)])
    config = tiny.data_config(tokenizer, path, epochs=2, streams=2, global_batch=2, **BOTH_OFF)
    whole = PackLoader(config)
    digests, states = [], [whole.state_dict()]
    for pack in whole:
        digests.append(pack.digest())
        states.append(whole.state_dict())
    assert sum(row.rows for row in whole.row_counts) == 2 * 6003
    assert "refused, unknown layout: 12,000" in describe(states[-1])
    for number in range(0, len(digests), 2):
        assert tiny.digests(PackLoader(config, state=states[number])) == digests[number:]


def test_a_search_for_a_conversation_ends_after_ten_thousand_rows(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for number in range(3):
        tiny.write_jsonl(tmp_path / "shards" / f"{number}.jsonl", _bad(6000))
    source = {"path": str(tmp_path / "shards")}
    for kind in ({}, {"streaming": True, "shuffle": "shards"}):
        with pytest.raises(
            ValueError,
            match=r"source 0 holds no conversation to train among 10,000 rows tried \(unknown layout: 10,000; the last",
        ):
            next(PackLoader(tiny.data_config(tokenizer, sources=[source | kind], epochs=None)))
        with pytest.raises(ValueError, match="each of its 18,000 rows is refused"):
            next(PackLoader(tiny.data_config(tokenizer, sources=[source | kind], epochs=None, **BOTH_OFF)))
