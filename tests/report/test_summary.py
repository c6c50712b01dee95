"""The summary of a run, from files written by hand: whole, partial, damaged, of earlier versions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest
from run_files import OLD, end, launch, saved, step, write

from trainer.report.page import page
from trainer.report.read import RunReader
from trainer.report.records import Best, Refusals, RefusedRow, Summary


def read(directory: Path) -> Summary:
    return RunReader(directory).summary()


def test_the_figures_are_those_of_the_lines(tmp_path: Path) -> None:
    lines = [
        step(1, refused=2, refused_by_reason={"too long": 2}, fill=0.5, seconds=2.0, validation_loss=3.0),
        step(2, tokens=300, seconds=4.0, data_wait=1.0, fill=1.0, mfu=0.5, peak_memory=10.0, validation_loss=2.5),
        step(3, refused=1, refused_by_reason={"no role": 1}, seconds=4.0, mfu=0.25, peak_memory=11.0),
        step(4, validation_loss=2.75),
    ]
    found = read(write(tmp_path / "run", lines))
    assert (found.name, found.step, found.rows, found.tokens, found.trained_tokens) == ("run", 4, 40, 600, 160)
    assert (found.loss, found.validation_loss, found.best) == (0.0, 2.75, Best(2, 2.5))
    assert (found.seconds, found.tokens_per_second, found.refused) == (12.0, 50.0, 3)
    assert (found.mfu, found.peak_memory, found.fill) == (0.375, 11.0, 0.625)
    assert (found.trained_share, found.data_wait) == (160 / 600, 2.5 / 12)
    assert [(r.reason, r.rows) for r in found.refusals] == [("too long", 2), ("no role", 1)]
    assert found.curves["loss"].steps == (1, 2, 3, 4)
    assert found.curves["loss"].mean == found.curves["loss"].low == found.curves["loss"].high == (3.0, 2.0, 1.0, 0.0)
    assert found.curves["validation_loss"].mean == (3.0, 2.5, None, 2.75)
    assert found.curves["data_wait"].mean == (0.25, 0.25, 0.125, 0.25)
    assert found.curves["trained_tokens"].mean == (40, 80, 120, 160)
    assert found.damage == ()


def test_held_out_sources_have_a_curve_each(tmp_path: Path) -> None:
    lines = [step(1), step(2, validation_loss_by_source=[2.5, None, 4.0]), step(3, validation_loss_by_source=[2.25])]
    found = read(write(tmp_path / "several", lines))
    assert [curve.mean for curve in found.held_out] == [(None, 2.5, 2.25), (None, None, None), (None, 4.0, None)]
    assert "Validation loss of each source" in page(found)
    alone = read(write(tmp_path / "one", [step(1, validation_loss=2.0)]))
    assert alone.held_out == ()
    assert "Validation loss of each source" not in page(alone)


def test_held_out_sources_keep_their_curves_over_later_lines_without_a_validation(tmp_path: Path) -> None:
    lines = [step(1, validation_loss_by_source=[2.5, 4.0])]
    reader = RunReader(write(tmp_path, lines))
    reader.summary()
    write(tmp_path, [*lines, step(2)])
    assert [curve.mean for curve in reader.summary().held_out] == [(2.5, None), (4.0, None)]


def test_a_run_on_a_cpu_has_no_mfu_and_no_curve_of_it(tmp_path: Path) -> None:
    found = read(write(tmp_path, [step(1)]))
    assert (found.mfu, found.peak_memory) == (None, None)
    assert not {"mfu", "peak_memory", "validation_loss"} & found.curves.keys()
    assert "MFU" not in page(found)


def test_a_further_summary_reads_further_lines_only_and_equals_a_fresh_one(tmp_path: Path) -> None:
    write(tmp_path, [step(1), step(2), '{"step":3,"lo'], [launch(0, 1000.0)])
    reader = RunReader(tmp_path)
    assert reader.summary().step == 2
    write(tmp_path, [step(1), step(2), step(3), step(4)], [launch(0, 1000.0), saved(4, 1009.0)])
    grown, fresh = reader.summary(is_alive=True), RunReader(tmp_path).summary(is_alive=True)
    assert msgspec.structs.replace(grown, read_at=0.0) == msgspec.structs.replace(fresh, read_at=0.0)
    assert grown.step == 4
    assert grown.damage == ()


def test_lines_of_version_0_1_0_are_read(tmp_path: Path) -> None:
    lines = [{name: value for name, value in step(n).items() if name not in OLD} for n in (1, 2)]
    found = read(write(tmp_path, lines))
    assert (found.step, found.tokens_per_second, found.gpu_tokens_per_second) == (2, 50.0, None)
    assert found.launches == ()
    assert found.status == "after step 2; the trainer of this run recorded no launches and ends"
    assert "Launches" not in page(found)


def test_a_run_whose_ledger_alone_knows_its_launches_lists_them_without_times(tmp_path: Path) -> None:
    sessions = [
        {"after": 0, "mesh": {"dp": 2}, "workers": 1, "version": "0.2.0", "directory": "/", "data": {}, "identity": {}},
        {"after": 2, "mesh": {"dp": 1}, "workers": 1, "version": "0.2.0", "identity": {"capacity": 8, "seed": None}},
    ]
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "sessions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sessions))
    found = read(write(tmp_path, [step(1), step(2), step(3)]))
    assert [(one.after, one.reached, one.began, one.changed) for one in found.launches] == [
        (0, 2, None, ()),
        (2, 3, None, ("dp: 2 -> 1",)),
    ]
    assert found.identity == {"capacity": "8"}
    assert "recorded no times" in page(found)


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    found = RunReader(write(tmp_path, [], [launch(0, 1000.0)])).summary(is_alive=True)
    assert (found.status, found.is_under_way, found.step) == ("started, no step finished yet", True, 0)
    assert "No step is finished yet." in page(found)


def test_losses_that_are_no_numbers_are_gaps_and_counted(tmp_path: Path) -> None:
    lines = [step(1), step(2, loss=math.nan), step(3, loss=None, grad_norm=math.inf), step(4, loss=1e300)]
    found = read(write(tmp_path, lines))
    assert found.curves["loss"].mean == (3.0, None, None, None)
    assert (found.steps_without_loss, found.step, found.damage) == (2, 4, ())
    assert "2 steps have no finite loss" in page(found)
    nothing = read(write(tmp_path / "nothing", [step(1, loss=math.nan)]))
    assert nothing.loss is None
    assert "1 steps have no finite loss" in page(nothing)


def test_damaged_lines_are_left_out_and_named(tmp_path: Path) -> None:
    bad = ["mine\n", "[]\n", '{"step": 0}\n', '{"step": "2"}\n', "\x00\n", '{"loss": 1.0}\n', "[" * 5000 + "\n"]
    found = read(write(tmp_path, [step(1), *bad, step(2), step(1), step(2), step(3)]))
    assert (found.step, found.tokens) == (3, 300)
    assert found.damage[0].startswith(f"{tmp_path}/metrics.jsonl:2 was left out: ")
    assert found.damage[-1] == f"{tmp_path}/metrics.jsonl: 4 further lines were left out"
    twice = read(write(tmp_path / "twice", [step(1), step(2), step(2)]))
    assert twice.damage == (f"{tmp_path}/twice/metrics.jsonl:3 was left out: step 2 comes after step 2",)
    assert "was left out" in page(twice)


@pytest.mark.parametrize(
    "line",
    [
        step(10**30),
        step(2, tokens=10**30),
        step(2, time=1e300),
        step(2, tokens_by_source=[10**30]),
        step(2, refused_by_reason={"a": -1}),
    ],
    ids=str,
)
def test_a_number_out_of_range_damages_its_line_alone(tmp_path: Path, line: dict[str, object]) -> None:
    found = read(write(tmp_path, [step(1), line, step(3)], [launch(0, 1e300), launch(0, 1000.0)]))
    assert (found.step, found.tokens, len(found.launches)) == (3, 200, 1)
    assert len(found.damage) == 2
    assert page(found)


def test_numbers_of_any_size_are_drawn(tmp_path: Path) -> None:
    sizes = [-1e99, 1e99, 1e-300, 0.0, -0.0, 5e-324, 1e18, 1e99]
    lines = [step(n, loss=size, learning_rate=size, grad_norm=abs(size), fill=size) for n, size in enumerate(sizes, 1)]
    assert page(read(write(tmp_path, lines))).count("<figure") >= 7


def test_a_directory_without_a_file_of_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"' holds no file of a run; name the directory of a run, such as runs/first"):
        RunReader(tmp_path)
    with pytest.raises(ValueError, match=r"' does not exist; name the directory of a run, such as runs/first"):
        RunReader(tmp_path / "nothing")


def test_every_interruption_is_a_launch_with_its_end_and_its_repeated_steps(tmp_path: Path) -> None:
    host = {"host": "a"}
    events = [
        launch(0, 1000.0, environment=host),
        saved(2, 1004.0),
        saved(3, 1006.5),
        launch(2, 1100.0, reached=4, last_sign=1008.0, environment={"host": "b"}, mesh={"dp": 2, "tp": 1}),
        saved(4, 1104.5),
        end(5, 1107.0, "stopped on request"),
        launch(5, 1200.0, reached=5, last_sign=1106.0, environment={"host": "b"}, mesh={"dp": 2, "tp": 1}),
        end(5, 1201.0, "error: the loss is nan"),
        launch(5, 1300.0, reached=5, last_sign=1106.0, environment={"host": "b"}, mesh={"dp": 2, "tp": 1}),
    ]
    times = {1: 1002.0, 2: 1004.0, 3: 1102.0, 4: 1104.0, 5: 1106.0, 6: 1302.0}
    directory = write(tmp_path, [step(n, time=time) for n, time in times.items()], events)
    found = RunReader(directory).summary(is_alive=True)
    assert [(one.after, one.reached, one.lost, one.end) for one in found.launches] == [
        (0, 4, 2, "killed"),
        (2, 5, 0, "stopped on request"),
        (5, 5, 0, "error: the loss is nan"),
        (5, 6, 0, "under way"),
    ]
    assert [(one.began, one.kept, one.ended) for one in found.launches] == [
        (1000.0, 1004.0, 1008.0),
        (1100.0, None, 1107.0),
        (1200.0, None, 1201.0),
        (1300.0, None, 1302.0),
    ]
    assert [one.changed for one in found.launches] == [(), ("dp: 1 -> 2", "host: a -> b"), (), ()]
    assert [(c.step, c.time, c.seconds) for c in found.checkpoints] == [(2, 1004.0, 0.25), (4, 1104.5, 0.25)]
    drawn = page(found)
    assert drawn.count('class="work"') == 4
    assert drawn.count('class="lost"') == 1


def test_a_launch_without_a_sign_for_long_was_killed(tmp_path: Path) -> None:
    found = read(write(tmp_path, [step(1)], [launch(0, 1000.0)]))
    assert (found.status, found.is_under_way) == ("killed after step 1", False)


def test_checkpoints_on_disk_are_told_apart_from_deleted_ones(tmp_path: Path) -> None:
    write(tmp_path, [step(1), step(2)], [launch(0, 1000.0), saved(1, 1002.0), saved(2, 1004.0)])
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert [(c.step, c.kept) for c in read(tmp_path).checkpoints] == [(1, False), (2, False)]
    (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").write_text("{}")
    assert [(c.step, c.kept) for c in read(tmp_path).checkpoints] == [(1, False), (2, True)]
    (tmp_path / "run.json").write_text('{"token": "a", "checkpoints": "s3://bucket/run"}')
    assert [(c.step, c.kept) for c in read(tmp_path).checkpoints] == [(1, None), (2, None)]
    (tmp_path / "run.json").write_text("[")
    assert [(c.step, c.kept) for c in read(tmp_path).checkpoints] == [(1, None), (2, None)]


def test_three_refused_rows_of_each_reason_are_shown(tmp_path: Path) -> None:
    refused = [{"step": 1, "place": f"a:{n}", "reason": "r", "detail": "d", "row": n} for n in range(5)]
    refused.append({"step": 1, "place": "b:1", "reason": "other", "detail": "d"})
    counts = {"r": 5, "other": 1}
    found = read(write(tmp_path, [step(1, refused=6, refused_by_reason=counts)], refused=refused))
    assert found.refusals == (
        Refusals(reason="r", rows=5, examples=tuple(RefusedRow(f"a:{n}", "r", "d") for n in range(3))),
        Refusals(reason="other", rows=1, examples=(RefusedRow("b:1", "other", "d"),)),
    )


def test_the_mixture_is_the_share_of_each_source_step_by_step(tmp_path: Path) -> None:
    config = {"data": {"sources": [{"path": "a.jsonl", "weight": 2}, {"path": "b.jsonl"}]}}
    lines = [step(1, tokens_by_source=[60, 40]), step(2, tokens_by_source=[0, 100]), step(3, tokens_by_source=[0, 0])]
    lines.append(step(4, tokens_by_source=[30, 30, 40]))
    found = read(write(tmp_path, lines, [launch(0, 1000.0, config=config)]))
    assert [(s.path, s.weight, s.tokens, s.share, s.curve) for s in found.mixture] == [
        ("a.jsonl", 2.0, 90, 0.3, (0.6, 0.0, None, 0.3)),
        ("b.jsonl", None, 170, 170 / 300, (0.4, 1.0, None, 0.3)),
        ("source 2", None, 40, 40 / 300, (0.0, 0.0, None, 0.4)),
    ]


def test_the_finished_part_is_the_larger_of_steps_and_rows(tmp_path: Path) -> None:
    events = [launch(0, 1000.0, config={"run": {"steps": 10}}, total_rows=100)]
    assert read(write(tmp_path, [step(1, rows=20)], events)).share == 0.2
    assert read(write(tmp_path, [step(1, rows=2)], events)).share == 0.1
