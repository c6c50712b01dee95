"""The report of real runs: kept up to date, exact after a kill, and harmless if it cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import runs
import tiny
from run_files import end, launch, step, write

from sftstream.pages import text
from trainer.report.page import page
from trainer.report.read import RunReader
from trainer.report.records import Summary
from trainer.report.writer import ReportWriter


def read(directory: Path) -> Summary:
    return RunReader(directory / "runs" / "run").summary()


def test_a_killed_and_resumed_run_shows_both_launches_and_each_step_once(tmp_path: Path, tokenizer: str) -> None:
    other = tiny.write_jsonl(tmp_path / "other.jsonl", tiny.rows(20, seed=5))
    held_out = tiny.write_jsonl(tmp_path / "held_out.jsonl", tiny.rows(3, seed=6))
    config = runs.run_config(
        tokenizer, runs.sources(tmp_path), other, validation={"sources": [{"path": held_out}], "every": 5}
    )
    directory = tmp_path / "runs" / "run"
    metrics = directory / "metrics.jsonl"
    job = runs.Job(tmp_path, config)
    runs.wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 5, job)
    job.kill()
    reached = metrics.read_bytes().count(b"\n")
    assert "<title>run: under way after step " in (directory / "report.html").read_text()
    config["data"]["workers"] = 1
    runs.run(tmp_path, config)

    found = read(tmp_path)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert found.curves["loss"].steps == tuple(range(1, 11))
    assert found.curves["loss"].mean == tuple(line["loss"] for line in lines)
    assert (found.tokens, found.rows) == (sum(line["tokens"] for line in lines), lines[-1]["rows"])
    assert found.validation_loss == lines[-1]["validation_loss"]
    assert [s.tokens for s in found.mixture] == [sum(line["tokens_by_source"][n] for line in lines) for n in (0, 1)]
    assert sum(s.tokens for s in found.mixture) == found.tokens
    assert sum(r.rows for r in found.refusals) == len((directory / "refused.jsonl").read_text().splitlines())

    first, second = found.launches
    assert (first.after, first.reached, first.end) == (0, reached, "killed")
    assert (second.after, second.reached, second.end) == (reached - first.lost, 10, "complete")
    assert second.changed == ("loader workers: 0 -> 1",)
    assert None not in (first.began, first.ended, second.began, second.ended)
    times = [first.began, first.ended, second.began, second.ended]
    assert times == sorted(times, key=lambda time: time or 0.0)
    assert [c.step for c in found.checkpoints] == [2, 4, 6, 8, 10]
    assert [c.kept for c in found.checkpoints] == [False, False, True, True, True]
    assert (found.status, found.share) == ("complete after step 10", 1.0)
    assert found.config["optimizer.learning_rate"] == "0.01"
    assert found.config["data.streams"] == "8"
    assert found.environment["topology"] == "dp 1, tp 1, replicas 1"
    assert found.damage == ()
    written = (directory / "report.html").read_text()
    at = found.read_at
    assert "<title>run: complete after step 10</title>" in written
    sections = [text.split("<main>")[1] for text in (written, page(msgspec.structs.replace(found, read_at=at)))]
    assert sections[0] == sections[1]


def test_a_run_ended_by_an_error_tells_the_error(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(tokenizer, runs.sources(tmp_path), optimizer={"learning_rate": 1e30, "clip": 1e30})
    assert runs.Job(tmp_path, config).finish() == 1
    found = read(tmp_path)
    assert found.launches[0].end.startswith("error: step ")
    assert found.status.startswith(f"ended after step {found.step} by an error: step {found.step + 1}: the loss is ")
    assert text(found.status) in (tmp_path / "runs" / "run" / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_one_warning_and_the_run_goes_on(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(tokenizer, runs.sources(tmp_path), run={"steps": 4})
    (tmp_path / "runs" / "run" / "report.html").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "events.jsonl").mkdir()
    job = runs.run(tmp_path, config)
    assert len(runs.metrics(tmp_path)) == 4
    assert job.output().count("the run goes on without an up-to-date report") == 1
    assert job.output().count("events.jsonl ends here") == 1


def test_no_page_is_written_if_the_config_says_so(tmp_path: Path, tokenizer: str) -> None:
    runs.run(tmp_path, runs.run_config(tokenizer, runs.sources(tmp_path), run={"steps": 2, "report_seconds": 0}))
    assert not (tmp_path / "runs" / "run" / "report.html").exists()
    assert len(read(tmp_path).launches) == 1


def test_an_update_comes_after_its_pause_and_never_takes_more_than_its_share(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    path = tmp_path / "report.html"
    writer = ReportWriter(tmp_path, 10**6)
    writer.update()
    path.unlink()
    writer.after_step()
    assert not path.exists()
    writer.after_checkpoint()
    assert path.exists()
    path.unlink()
    writer.after_checkpoint()  # the update before has just taken its share of the time
    assert not path.exists()
    with writer:
        pass
    assert path.exists()


def test_after_a_failed_update_the_page_is_made_of_all_lines_again(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(tmp_path, [step(1), step(2)])
    with ReportWriter(tmp_path, 10**6) as writer:
        assert writer.update()
        path.unlink()
        path.mkdir()
        assert not writer.update()
        path.rmdir()
        write(tmp_path, [step(1), step(2)], [launch(0, 1000.0), end(2, 1004.0, "complete")])
    assert "complete after step 2" in path.read_text()
