"""Skipped rows and steps are in the ledger, and an audit accounts for each of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny
from commands import run

from sftstream import DataConfig, Segments, SkipConfig
from sftstream.cli.main import main
from sftstream.ledger.audit import audit
from sftstream.ledger.data_run import run_data
from sftstream.ledger.files import closed_files, write_closed
from sftstream.ledger.reader import Ledger
from sftstream.ledger.records import StepSegments
from sftstream.ledger.segments import SKIPPED, given, skipped

SKIP = SkipConfig(rows=((0, 7), (1, 3)), steps=((4, 5),))


@pytest.fixture(scope="module")
def data(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two epochs of 70 conversations in two sources, the long ones in several parts."""
    directory = tmp_path_factory.mktemp("data")
    paths = [tiny.write_jsonl(directory / f"{number}.jsonl", tiny.rows(35, number)) for number in range(2)]
    return tiny.data_config(tokenizer, *paths, capacity=96, overflow="split")


@pytest.fixture(scope="module")
def whole(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps, rewound to step 2 and finished with a skip, over three topologies."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    run_data(data, directory, 6, 2)
    shutil.copytree(directory, directory.with_name("before"))
    for step in (4, 6):
        (directory / "states" / f"step-{step:08d}.json").unlink()
    skipping = msgspec.structs.replace(data, skip=SKIP, accept_changed=("data.skip",))
    run_data(skipping, directory, 4, 2, shards=2)
    run_data(msgspec.structs.replace(skipping, accept_changed=()), directory, 10**6, 2, shards=3)
    return directory


@pytest.fixture
def done(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_with_a_skip_is_proved_and_its_sessions_tell_of_the_skip(done: Path) -> None:
    report = audit(Ledger(done))
    assert report.differences == []
    assert report.not_shown == []
    left_out = np.concatenate([skipped(segments) for _, segments in Ledger(done).steps])
    assert f"{len(left_out):,} conversations or parts are skipped, as the config asks, and no others" in report.proved
    assert left_out["part"].any(), "no part of a long conversation is skipped"
    lines = run(main, "audit", done).stdout.splitlines()
    assert lines[0].startswith("steps 1 to 2: dp 1, ")
    accepted = "; accepted so far: data.skip: None -> {'rows': ((0, 7), (1, 3)), 'steps': ((4, 5),)}"
    assert [line.partition(":")[0] for line in lines[1:3]] == ["steps 3 to 4", f"steps 5 to {len(Ledger(done).steps)}"]
    assert all(line.endswith(accepted) for line in lines[1:3])


def test_conversations_that_are_not_skipped_are_where_they_were(done: Path, whole: Path) -> None:
    before = {step: segments for step, segments in Ledger(whole.with_name("before")).steps}
    for step, segments in Ledger(done).steps[:6]:
        names = ["row", "source", "epoch", "part", "pack", "tokens"]
        listed, expected = (np.sort(array[names]) for array in (segments, before[step]))
        assert (listed == expected).all()
        if step in (4, 5):
            assert len(given(segments)) == 0
        elif step > 2:
            rows = set(zip(skipped(segments)["source"].tolist(), skipped(segments)["row"].tolist(), strict=True))
            assert rows <= {(0, 7), (1, 3)}


def test_find_and_trace_show_skipped_conversations_as_skipped(done: Path) -> None:
    uses = run(main, "find", done, "--source", 0, "--row", 7).stdout.splitlines()
    assert [line.rpartition(" ")[2] for line in uses] == ["skipped"] * len(uses)
    step, pack = uses[0].partition(":")[0].removeprefix("step ").split(", pack ")
    lines = run(main, "trace", done, "--step", step, "--pack", pack).stdout.splitlines()
    assert f"pack {pack}: row 7 of source 0 in epoch 0 was skipped" in lines
    shown = json.loads(run(main, "trace", done, "--step", step, "--pack", pack, "--json").stdout)
    assert shown["skipped"] == [f"pack {pack}: row 7 of source 0 in epoch 0 was skipped"]
    listed = json.loads(run(main, "find", done, "--source", 0, "--row", 7, "--json").stdout)["uses"]
    assert [use["skipped"] for use in listed] == [True] * len(uses)
    lines = run(main, "trace", done, "--step", 4).stdout.splitlines()
    assert len(lines) == len(skipped(Ledger(done).segments(4)))
    assert all(line.endswith(" was skipped") for line in lines)


def _change(directory: Path, change: Callable[[dict[int, Segments]], None]) -> None:
    steps = {step.step: step.segments.copy() for step in Ledger(directory).steps}
    change(steps)
    for file in closed_files(directory / "ledger"):
        file.path.unlink()
    write_closed(directory / "ledger", 1, [StepSegments(step, segments) for step, segments in steps.items()])


def _forget(steps: dict[int, Segments]) -> None:
    steps[4] = steps[4][1:]


def _forget_last_part(steps: dict[int, Segments]) -> None:
    last = int(steps[4]["part"].argmax())
    assert steps[4]["part"][last]
    steps[4] = np.delete(steps[4], last)


def _repeat(steps: dict[int, Segments]) -> None:
    steps[5] = np.insert(steps[5], 0, steps[5][0])


def _train(steps: dict[int, Segments]) -> None:
    steps[4]["trained_tokens"][0] = 0


def _skip_another(steps: dict[int, Segments]) -> None:
    steps[3]["trained_tokens"][np.flatnonzero(steps[3]["trained_tokens"] != SKIPPED)[0]] = SKIPPED


FAULTS = {
    "a skipped row is not listed": (
        _forget,
        r"was drawn, but is in no pack, and neither refused nor waiting|has \d parts, but \d",
    ),
    "the last part of a row is not listed": (
        _forget_last_part,
        r"has \d parts, but \d are trained, skipped or waiting",
    ),
    "a skipped row is listed twice": (_repeat, r"is trained twice in epoch \d: in step 5, pack 0 \(skipped\), and in "),
    "a row of a skipped step is trained": (
        _train,
        r"step 4, pack 0: row \d+ of source \d is trained, but skip names it",
    ),
    "another row is skipped": (
        _skip_another,
        r"step 3, pack 0: row \d+ of source \d is skipped, but skip does not name it",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_planted_among_skipped_rows_is_named(name: str, done: Path) -> None:
    fault, message = FAULTS[name]
    _change(done, fault)
    differences = audit(Ledger(done)).differences
    assert any(re.search(message, line) for line in differences), differences
