"""The files of a run hold each step once, after any kill."""

from __future__ import annotations

import json
import math
import resource
import threading
from pathlib import Path

import msgspec
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sftstream import Refusal
from trainer.reporting.metrics import Curves, RunLog, StepMetrics, perplexity
from trainer.training.step_reader import LocatedRefusal

STEP = StepMetrics(
    step=1,
    loss=2.5,
    grad_norm=1.0,
    learning_rate=1e-3,
    tokens=100,
    trained_tokens=40,
    rows=7,
    refused=1,
    refused_by_reason={"reason": 1},
    fill=0.9,
    tokens_per_second=1000.0,
    gpu_tokens_per_second=500.0,
    time=1.7e9,
    data_wait=0.01,
    seconds=0.1,
    batch_digest="ab",
)


def _write(directory: Path, after: int, steps: list[int]) -> None:
    with RunLog(directory, after) as log:
        for step in steps:
            log.step(msgspec.structs.replace(STEP, step=step, loss=step + after / 100))
            log.refused(step, [LocatedRefusal(Refusal(0, step, 0, "reason", "detail"), f"rows.jsonl:{step}")])


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_run_writes_no_step_twice(tmp_path: Path) -> None:
    _write(tmp_path, 0, [1, 2, 3, 4, 5])
    _write(tmp_path, 3, [4, 5, 6])
    assert [(line["step"], line["loss"]) for line in _lines(tmp_path / "metrics.jsonl")] == [
        *((step, float(step)) for step in (1, 2, 3)),
        *((step, step + 0.03) for step in (4, 5, 6)),
    ]
    assert [line["step"] for line in _lines(tmp_path / "refused.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_line_torn_by_a_kill_is_written_again(tmp_path: Path) -> None:
    _write(tmp_path, 0, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step":3,"lo')
    _write(tmp_path, 2, [3])
    assert [line["step"] for line in _lines(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["mine", "[]", '{"loss": 1.0}'])
def test_a_foreign_line_is_refused_by_its_number_and_stays(line: str, tmp_path: Path) -> None:
    _write(tmp_path, 0, [1])
    path = tmp_path / "metrics.jsonl"
    path.write_text(before := path.read_text() + line + "\n")
    with pytest.raises(
        ValueError, match=r"metrics.jsonl:2 was not written by a run: .*; remove the line, or move the file away"
    ):
        RunLog(tmp_path, 1)
    assert path.read_text() == before


def test_a_new_run_in_an_old_directory_starts_from_nothing(tmp_path: Path) -> None:
    _write(tmp_path, 0, [1, 2])
    _write(tmp_path, 0, [1])
    assert [line["step"] for line in _lines(tmp_path / "metrics.jsonl")] == [1]


def test_a_refused_row_is_listed_with_its_location(tmp_path: Path) -> None:
    _write(tmp_path, 0, [1])
    assert _lines(tmp_path / "refused.jsonl") == [
        {"step": 1, "place": "rows.jsonl:1", "source": 0, "row": 1, "epoch": 0, "reason": "reason", "detail": "detail"}
    ]


def test_tensorboard_shows_the_curve_of_the_resumed_run(tmp_path: Path) -> None:
    _write(tmp_path, 0, [1, 2, 3])
    _write(tmp_path, 2, [3, 4])
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4]


def test_a_validation_loss_is_written_for_validated_steps_only(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0) as log:
        log.step(STEP)
        log.step(msgspec.structs.replace(STEP, step=2, validation_loss=1.25))
    assert [line.get("validation_loss", "none") for line in _lines(tmp_path / "metrics.jsonl")] == ["none", 1.25]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("validation_loss")] == [(2, 1.25)]


def test_each_source_has_a_curve_of_its_own(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0) as log:
        log.step(msgspec.structs.replace(STEP, validation_loss_by_source=(1.25, None), share_by_source=(0.25, 0.75)))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    tags = [tag for tag in board.Tags()["scalars"] if "by_source" in tag]
    assert sorted(tags) == ["share_by_source/0", "share_by_source/1", "validation_loss_by_source/0"]
    assert [(event.step, event.value) for event in board.Scalars("share_by_source/1")] == [(1, 0.75)]


@pytest.mark.parametrize("length", [10, 100_000])
def test_the_last_line_of_any_length_is_found(length: int, tmp_path: Path) -> None:
    with RunLog(tmp_path, 0) as log:
        assert log.last_step() == {}
        for step in (1, 2):
            log.step(msgspec.structs.replace(STEP, step=step, batch_digest="x" * length))
            assert (log.last_step()["step"], len(log.last_step()["batch_digest"])) == (step, length)


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (2.0, math.exp(2)), (710.0, None), (math.nan, None)])
def test_a_perplexity_that_no_float_holds_is_left_out(loss: float, expected: float | None) -> None:
    assert perplexity(loss) == expected


def test_the_curves_end_at_a_full_disk_with_one_warning_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    threads = threading.active_count()
    curves = Curves(tmp_path, 0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        for step in range(1, 30):
            curves.add(msgspec.structs.replace(STEP, step=step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    curves.add(msgspec.structs.replace(STEP, step=30))
    curves.close()
    assert caplog.messages == ["the curves in tensorboard/ end here: [Errno 27] File too large"]
    assert threading.active_count() == threads  # a writer's thread would end with a traceback
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_lines_refused_by_a_full_disk_are_written_whole_once_there_is_room(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunLog(tmp_path, 0) as log:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            for step in range(1, 8):
                log.step(msgspec.structs.replace(STEP, step=step))
            assert (tmp_path / "metrics.jsonl").stat().st_size == 1000
            with pytest.raises(OSError, match="File too large"):
                log.sync()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        log.sync()
        assert [line["step"] for line in _lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
