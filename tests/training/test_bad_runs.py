"""A user's mistake ends a run with one line (key, value, remedy) and exit code 1."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny

from checkpoints import CheckpointStore


def _fails(directory: Path, config: dict[str, Any], processes: int = 1) -> str:
    """Run to the end, expect exit code 1, and return the error line."""
    job = runs.Job(directory, config, processes)
    assert job.finish() == 1, job.output()
    lines = [line for line in job.output().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, job.output()
    assert "Traceback" not in job.output()
    return lines[0]


@pytest.fixture
def config(tmp_path: Path, tokenizer: str) -> dict[str, Any]:
    return runs.run_config(tokenizer, runs.sources(tmp_path), run={"steps": 2})


def test_a_missing_source_is_refused_by_name(tmp_path: Path, config: dict[str, Any]) -> None:
    config["data"]["sources"] = [{"path": "nowhere/*.jsonl"}]
    assert "source 'nowhere/*.jsonl' matches no file" in _fails(tmp_path, config)


def test_a_missing_tokenizer_is_refused_by_name(tmp_path: Path, config: dict[str, Any]) -> None:
    config["data"]["tokenizer"] = {"path": "nowhere"}
    assert "tokenizer 'nowhere' cannot be loaded" in _fails(tmp_path, config)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused_with_both_sizes(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    config["model"]["vocab_size"] = 256
    assert re.search(
        r"the tokenizer has (\d+) tokens, but model.vocab_size is 256; set model.vocab_size = \1 or more, or with ",
        _fails(tmp_path, config),
    )


def test_a_missing_model_directory_is_refused_by_name(tmp_path: Path, config: dict[str, Any]) -> None:
    config["model"] = {"init_from": "nowhere"}
    assert "nowhere" in _fails(tmp_path, config)


def test_fewer_streams_than_ranks_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    config["data"]["streams"] = 1
    assert "streams = 1 is too low for 2 shards, which need a stream each" in _fails(tmp_path, config, 2)


def test_a_tensor_parallel_size_that_does_not_divide_ranks_or_heads_is_refused(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    config["parallel"] = {"tp": 2}
    assert "tp = 2 does not divide the 1 processes" in _fails(tmp_path, config)
    config["model"]["num_key_value_heads"] = 1
    assert "num_key_value_heads" in _fails(tmp_path, config, 2)


def test_an_endless_run_without_a_trainable_row_stops_with_the_reasons(tmp_path: Path, config: dict[str, Any]) -> None:
    config["data"]["sources"] = [{"path": tiny.write_jsonl(tmp_path / "bad.jsonl", [{"text": "a"}, {"text": "b"}])}]
    line = _fails(tmp_path, config)
    assert "source 0 holds no conversation to train: each of its 2 rows is refused (unknown layout: 2" in line
    assert "columns ['text'] match none of" in line


def test_a_finite_run_that_refuses_every_row_ends_with_an_error(tmp_path: Path, config: dict[str, Any]) -> None:
    config["data"]["sources"] = [{"path": tiny.write_jsonl(tmp_path / "bad.jsonl", [{"text": "a"}, {"text": "b"}])}]
    config["run"] = {"name": "run", "epochs": 1, "device": "cpu"}
    assert "source 0 holds no conversation to train: each of its 2 rows is refused" in _fails(tmp_path, config)


def test_a_streamed_source_without_a_row_stops_a_run_before_the_first_step(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    (tmp_path / "empty.jsonl").touch()
    config["data"]["sources"] = [{"path": "empty.jsonl", "streaming": True}]
    config["data"]["shuffle"] = "shards"
    config["run"] = {"name": "run", "epochs": 1, "device": "cpu"}
    assert "source 'empty.jsonl' holds no row; remove the source or name a file" in _fails(tmp_path, config, 2)
    assert not (tmp_path / "runs/run/metrics.jsonl").exists()


def test_a_run_whose_sources_give_no_row_says_so(tmp_path: Path, config: dict[str, Any]) -> None:
    config["data"]["sources"][0]["repeat"] = 0.001
    config["run"] = {"name": "run", "epochs": 1, "device": "cpu"}
    assert "nothing was trained: the sources gave no row; raise the repeat of a source" in _fails(tmp_path, config)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ([], r"holds no row"),
        (["user"], r"questions.jsonl:1: no assistant message: its roles are \['user'\]"),
        (["oracle"], r"questions.jsonl:1: unknown role"),
    ],
)
def test_unusable_questions_stop_a_run_before_the_first_step(
    tmp_path: Path, config: dict[str, Any], roles: list[str], message: str
) -> None:
    rows = [{"messages": [{"role": role, "content": "?"}]} for role in roles]
    config["evaluation"] = {"path": tiny.write_jsonl(tmp_path / "questions.jsonl", rows)}
    assert re.search(message, _fails(tmp_path, config, 2))
    assert not (tmp_path / "runs/run/metrics.jsonl").exists()


def test_an_export_over_other_files_stops_a_run_before_the_first_step(tmp_path: Path, config: dict[str, Any]) -> None:
    mine = tmp_path / "runs/run/export/notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert "runs/run/export holds 'notes.txt', which an export would delete: move it to another directory" in _fails(
        tmp_path, config, 2
    )
    assert not (tmp_path / "runs/run/metrics.jsonl").exists()
    assert mine.read_text() == "mine"


def test_a_resume_on_changed_data_is_refused_with_the_changed_file(tmp_path: Path, config: dict[str, Any]) -> None:
    runs.run(tmp_path, config)
    config["run"]["steps"] = 4
    path = Path(config["data"]["sources"][0]["path"])
    path.write_text(path.read_text().replace("river", "stone", 1))
    line = _fails(tmp_path, config)
    assert "data.sources[0].files[0].sha256" in line
    assert "Restore them, or start a new run" in line


def test_a_resume_with_changed_settings_is_refused_with_old_and_new_value(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    runs.run(tmp_path, config)
    config["run"]["steps"] = 4
    for table, key, value, message in (
        ("data", "capacity", 512, "data.capacity: 256 -> 512"),
        ("run", "seed", 1, "run.seed: 0 -> 1"),
        ("optimizer", "learning_rate", 1e-3, "optimizer.learning_rate: 0.01 -> 0.001"),
        ("model", "num_hidden_layers", 3, "model.num_hidden_layers: 2 -> 3"),
    ):
        changed = config | {table: config[table] | {key: value}}
        assert message in _fails(tmp_path, changed)


def test_a_longer_run_is_refused_if_the_schedule_depends_on_the_length(tmp_path: Path, config: dict[str, Any]) -> None:
    config["schedule"] = {"kind": "linear"}
    runs.run(tmp_path, config)
    config["run"]["steps"] = 4
    line = _fails(tmp_path, config)
    assert "schedule.steps: 2 -> 4. Restore the settings, set schedule.steps = 2 to go on at the rate of" in line


def test_a_resume_is_refused_if_all_checkpoints_are_damaged(tmp_path: Path, config: dict[str, Any]) -> None:
    runs.run(tmp_path, config)
    (weights,) = (tmp_path / "runs/run/checkpoints").glob("*/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    config["run"]["steps"] = 4
    assert "every step in" in _fails(tmp_path, config)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_source_that_loses_many_rows_stops_the_run_with_an_example(
    tmp_path: Path, config: dict[str, Any], ranks: int
) -> None:
    rows = [
        row for number, good in enumerate(tiny.rows(100)) for row in ([good, {"text": "?"}] if number % 3 else [good])
    ]
    path = tiny.write_jsonl(tmp_path / "poor.jsonl", rows)
    config["data"]["sources"] = [{"path": path}]
    line = _fails(tmp_path, config, ranks)
    assert f"source 0 ({path}): " in line
    assert f"more than data.max_refused = 0.1 (one is {path}:" in line
    assert "data.max_too_long is the limit for lengths" in line


def test_a_source_that_loses_many_rows_is_said_once_with_its_first_refused_row(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    path = tiny.write_jsonl(tmp_path / "poor.jsonl", [{"text": "?"}, *tiny.rows(30), *[{"text": "?"}] * 9])
    config["data"] |= {"sources": [config["data"]["sources"][0], {"path": path}], "shuffle": False}
    config["run"] = {"epochs": 2, "device": "cpu", "name": "run"}
    output = runs.run(tmp_path, config).output()
    said = [line for line in output.splitlines() if line.startswith("source ")]
    assert len(said) == 1
    assert said[0].startswith(f"source 1 ({path}): ")
    assert f" rows are refused for other reasons than their length, the first at {path}:1: unknown layout: " in said[0]


def test_refused_rows_are_counted_and_listed_with_their_location(tmp_path: Path, config: dict[str, Any]) -> None:
    config["run"] = {"epochs": 1, "device": "cpu", "name": "run"}
    job = runs.run(tmp_path, config)
    assert "refused 2 of 62 rows so far (longer than capacity: 1, unknown role: 1); see refused.jsonl" in job.output()
    refused = [json.loads(line) for line in (tmp_path / "runs/run/refused.jsonl").read_text().splitlines()]
    path = config["data"]["sources"][0]["path"]
    assert {(line["place"], line["reason"]) for line in refused} == {
        (f"{path}:61", "longer than capacity"),
        (f"{path}:62", "unknown role"),
    }
    assert sum(line["refused"] for line in runs.metrics(tmp_path)) == 2


def test_an_accepted_change_stays_on_record_in_later_checkpoints(tmp_path: Path, config: dict[str, Any]) -> None:
    assert runs.Job(tmp_path, config).finish() == 0
    config["data"] |= {"capacity": config["data"]["capacity"] * 2, "accept_changed": ["data.capacity"]}
    for steps in (4, 6):  # the second of these resumes a checkpoint that was made after the change
        config["run"]["steps"] = steps
        job = runs.Job(tmp_path, config)
        assert job.finish() == 0, job.output()
    store = CheckpointStore(next(tmp_path.rglob("checkpoints")))
    (change,) = store.values(6)["data/run"]["history"]
    capacity = config["data"]["capacity"]
    assert list(change["differences"]) == [f"data.capacity: {capacity // 2} -> {capacity}"]
    assert change["packs"] == 2 * config["data"]["global_batch"]
