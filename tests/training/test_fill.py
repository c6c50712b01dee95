"""The first lines of a run say what to expect, and a low fill is said with cause and remedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import runs
import tiny

from sftstream import NO_SEGMENTS, Pack
from trainer.reporting.fill import STEPS, FillWatch
from trainer.training.step import heaviest_first
from trainer.training.step_reader import StepTotals

DATA = tiny.data_config("", "rows.jsonl", capacity=1000)
"""Four packs of 1,000 tokens in a step."""


def totals(tokens: int, packs: int = 4, rows: int = 40, refused: int = 0, skipped_tokens: int = 0) -> StepTotals:
    return StepTotals(
        trained_tokens=tokens,
        tokens=tokens,
        squares=0,
        rows=rows,
        refused=refused,
        filled_packs=packs,
        skipped_tokens=skipped_tokens,
        unexhausted_shards=1,
        stop=0,
        digest="",
        row_counts=(),
        segments=NO_SEGMENTS,
    )


def said(watch: FillWatch, *steps: StepTotals) -> list[str]:
    return [line for step in steps if (line := watch.after(step, last=False))]


def test_slots_of_skipped_conversations_are_not_said_to_be_empty() -> None:
    watch = FillWatch(DATA, 8)
    assert said(watch, *[totals(3000, skipped_tokens=900)] * 30, *[totals(0, skipped_tokens=4000)] * 30) == []
    assert said(watch, *[totals(3000, skipped_tokens=500)] * 30) != []


def test_a_low_fill_is_said_once_until_it_recovers() -> None:
    watch = FillWatch(DATA, 8)
    low, full = totals(3599), totals(3600)
    assert said(watch, *[low] * (STEPS - 1)) == []
    (line,) = said(watch, *[low] * 30)
    assert line == (
        "the last 20 steps are 90.0% full: each of 8 streams ends with a partly filled pack; a new run with fewer "
        'data.streams, or with data.streams = "auto", has fewer'
    )
    assert said(watch, *[full] * 19) == []
    assert said(watch, *[full] * 20) == []
    assert len(said(watch, *[low] * 20)) == 1


@pytest.mark.parametrize(
    ("step", "streams", "cause"),
    [
        (
            totals(1000, packs=1),
            1,
            "25.0% full: 3 of 4 packs are empty, since streams have reached the end of the data; "
            "a smaller data.global_batch leaves fewer in the next run",
        ),
        (
            totals(1900, packs=2),
            64,
            "47.5% full: 2 of 4 packs are empty, since streams have reached the end of the data; "
            "fewer data.streams (now 64) or a smaller data.global_batch leaves fewer in the next run",
        ),
        (
            totals(2400, rows=5, refused=1),
            1,
            "60.0% full: a pack holds 1.0 conversations of 600 tokens, and no further one fits; raise "
            'data.capacity = 1000, in a run under way with data.accept_changed = ["data.capacity"]',
        ),
        (
            totals(0, packs=0, rows=2, refused=2),
            1,
            "0.0% full: 4 of 4 packs are empty, since streams have reached the end of the data; "
            "a smaller data.global_batch leaves fewer in the next run",
        ),
    ],
)
def test_each_cause_has_a_remedy(step: StepTotals, streams: int, cause: str) -> None:
    assert FillWatch(DATA, streams).after(step, last=True) == f"the last step is {cause}"


def test_a_short_run_is_judged_at_its_end() -> None:
    watch = FillWatch(DATA, 1)
    assert watch.after(totals(4000), last=False) is None
    line = watch.after(totals(1000, packs=1), last=True)
    assert line is not None
    assert line.startswith("the last 2 steps are 62.5% full: 3 of 8 packs are empty")


def test_a_run_says_what_to_expect_and_keeps_its_streams_on_other_ranks(tmp_path: Path, tokenizer: str) -> None:
    """Also on ranks without a loader, and for held-out packs, which must be equal on every topology."""
    source = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(1500))
    held_out = tiny.write_jsonl(tmp_path / "held_out.jsonl", tiny.rows(9, seed=5))
    changes = {
        "data": {"streams": "auto"},
        "run": {"steps": 3},
        "validation": {"sources": [{"path": held_out}], "every": 2},
        "checkpoint": {"every": 1, "keep_best": 1},
    }
    config = runs.run_config(tokenizer, source, **changes)
    straight = tmp_path / "straight"
    straight.mkdir()
    output = runs.run(straight, config | {"run": config["run"] | {"steps": 6}}).output()
    assert "24 packs of 256 tokens in 6 steps, about " in output
    assert "; 8 logical streams" in output
    runs.run(tmp_path, config)
    wider = {**config, "run": config["run"] | {"steps": 6}, "parallel": {"tp": 2}}
    assert "; 8 logical streams" in runs.run(tmp_path, wider, processes=4).output()
    digests = [[line["batch_digest"] for line in runs.metrics(directory)] for directory in (tmp_path, straight)]
    assert digests[0] == digests[1]


def test_a_run_with_too_many_streams_says_why_its_packs_are_empty(tmp_path: Path, tokenizer: str) -> None:
    source = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(40))
    config = runs.run_config(tokenizer, source, run={"epochs": 1}, data={"streams": 32, "capacity": 1024})
    del config["run"]["steps"]
    output = runs.run(tmp_path, config).output()
    assert "about 32 packs of 1,024 tokens in 8 steps, about " in output
    assert "% full: each of 32 streams ends with a partly filled pack; a new run with fewer data.streams" in output


def test_a_rank_runs_its_heaviest_pack_first() -> None:
    """Attention costs the square of each segment, of padding as well; the order of equal packs stays."""
    packs = [
        Pack(np.zeros(10, np.int32), np.zeros(10, bool), np.array(borders, np.int32))
        for borders in ([0, 5, 10], [0, 9, 10], [0, 1, 6, 10], [0, 10], [0, 5, 10])
    ]
    assert heaviest_first(packs) == [3, 1, 0, 4, 2]
