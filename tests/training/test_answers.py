"""The model under training answers held-out questions as transformers does, on any topology, and
without an effect on the training."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny

from checkpoints import CheckpointStore
from trainer.config_file import parse_config
from trainer.training.scorer import load_scorer

PAIRS = {
    "which river ?": "the green river",
    "which stone ?": "seven small copper lantern",
    "and ?": "north",
    "or ?": "green",
    "what ?": "a river",
}
"""Two of their questions fit a pack: a rank of two has two packs, the other a pack and an empty one."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> dict[str, Any]:
    """20 steps on five questions, with evaluation after every fifth."""
    directory = tmp_path_factory.mktemp("data")
    rows = [tiny.chat(question, answer) for question, answer in PAIRS.items()]
    config = runs.run_config(
        tokenizer,
        tiny.write_jsonl(directory / "rows.jsonl", rows * 20),
        run={"steps": 20},
        checkpoint={"every": 10},
        evaluation={
            "path": tiny.write_jsonl(directory / "held_out.jsonl", rows),
            "every": 5,
            "max_new_tokens": 12,
            "show": 0,
        },
    )
    config["data"]["capacity"] = 80
    return config


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> Path:
    """The directory of a run of `config` on two data-parallel ranks."""
    return runs.run(tmp_path_factory.mktemp("answered"), config, 2).directory


def answers(path: Path) -> list[tuple[str, str]]:
    return [(line["expected"], line["given"]) for line in map(json.loads, path.read_text().splitlines())]


def exact(directory: Path) -> dict[int, float]:
    return {line["step"]: line["exact_match"] for line in runs.metrics(directory) if "exact_match" in line}


def test_the_answers_are_those_of_the_exported_model_in_transformers(answered: Path) -> None:
    run = answered / "runs" / "run"
    found = answers(run / "answers" / "00000020.jsonl")
    assert found == answers(run / "answers.jsonl")
    right = sum(expected == given for expected, given in found) / 5
    assert right > 0
    assert list(exact(answered)) == [5, 10, 15, 20]
    assert exact(answered)[20] == right
    assert answers(run / "answers" / "00000005.jsonl") != found
    assert f"step 20 | {right:.1%} of the questions answered exactly" in (answered / "rank0.log").read_text()


@pytest.mark.parametrize(("processes", "tp"), [(1, 1), (2, 2)])
def test_the_answers_are_the_same_on_any_topology(
    answered: Path, config: dict[str, Any], tmp_path: Path, processes: int, tp: int
) -> None:
    runs.run(tmp_path, config | {"parallel": {"tp": tp}}, processes)
    assert exact(tmp_path) == exact(answered)
    last = Path("runs") / "run" / "answers" / "00000020.jsonl"
    assert answers(tmp_path / last) == answers(answered / last)


def test_evaluation_changes_no_bit_of_the_training(answered: Path, config: dict[str, Any], tmp_path: Path) -> None:
    runs.run(tmp_path, config | {"evaluation": config["evaluation"] | {"every": 1000}}, 2)
    plain, found = runs.outcome(tmp_path), runs.outcome(answered)
    for line in found["metrics"]:
        line.pop("exact_match", None)
    assert found == plain


SCORER = """
def length(prompt, expected, given):
    assert "<|start_header_id|>user" in prompt
    return len(given) / 100

wrong = 3

def endless(prompt, expected, given):
    return float("inf")

def worded(prompt, expected, given):
    return "good"

def broken(prompt, expected, given):
    return {}["z"]

def wanting(given):
    return 1
"""


@pytest.fixture
def scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Write a module of scorers; return its name."""
    (tmp_path / "my_scores.py").write_text(SCORER)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_scores"
    sys.modules.pop("my_scores", None)


def test_a_scorer_is_called_with_texts_and_only_if_code_is_allowed(
    config: dict[str, Any], tmp_path: Path, scorer: str
) -> None:
    table = {"every": 2, "scorer": "my_scores:length"}
    config = config | {"run": config["run"] | {"steps": 2}, "evaluation": config["evaluation"] | table}
    job = runs.Job(tmp_path, config)
    assert job.finish() == 1
    assert "add --allow-code to the command line if you trust it" in job.output()
    assert not (tmp_path / "runs").exists()
    job = runs.Job(tmp_path, config, environment={"PYTHONPATH": str(tmp_path)}, options=["--allow-code"])
    assert job.finish() == 0, job.output()
    given = [json.loads(line) for line in (tmp_path / "runs/run/answers/00000002.jsonl").read_text().splitlines()]
    lengths = [len(answer["given"]) / 100 for answer in given]
    assert [answer["score"] for answer in given] == lengths
    assert runs.metrics(tmp_path)[-1]["score"] == sum(lengths) / 5
    assert f"mean score {sum(lengths) / 5:.4f}" in job.output()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_scores:missing", "'my_scores:missing' is not found: module 'my_scores' has no attribute 'missing'"),
        ("no_such_module:f", "is not found: No module named 'no_such_module'"),
        ("my_scores:wrong", "'my_scores:wrong' is no function; name a function as module:function"),
    ],
)
def test_a_scorer_that_cannot_be_loaded_is_refused(scorer: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_scorer(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("endless", "returned inf for the answer 'a'; correct the function"),
        ("worded", "fails for the answer 'a'; correct the function: could not convert string to float: 'good'"),
        ("broken", "fails for the answer 'a'; correct the function: KeyError: 'z'"),
        (
            "wanting",
            r"fails for the answer 'a'; correct the function: wanting\(\) takes 1 positional argument but 3 were",
        ),
    ],
)
def test_a_scorer_without_a_score_is_named(scorer: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^evaluation.scorer = 'my_scores:{name}' {message}"):
        load_scorer(f"my_scores:{name}")("<|start_header_id|>user", "a", "a")


def test_patience_and_the_best_checkpoint_may_follow_the_answers(config: dict[str, Any], tmp_path: Path) -> None:
    """The share of right answers stays at its first value, since the rate is 0."""
    sources = config["data"]["sources"]
    config = config | {
        "optimizer": {"learning_rate": 0.0},
        "evaluation": config["evaluation"] | {"every": 2, "max_new_tokens": 2},
        "validation": {"sources": sources, "every": 3, "best_by": "answers", "patience": 2},
        "checkpoint": {"every": 2, "keep": 1, "keep_best": 1},
    }
    output = runs.run(tmp_path, config).output()
    assert list(exact(tmp_path).values()) == [0.0, 0.0, 0.0]
    assert "ends early after step 6: the last 2 evaluations had no score above 0.0000" in output
    store = CheckpointStore(tmp_path / "runs" / "run" / "checkpoints")
    assert store.manifest(store.steps()[-1]).about.validation_loss == 1.0
    changed = config | {"validation": config["validation"] | {"patience": 4}}
    changed["evaluation"] = config["evaluation"] | {"max_new_tokens": 3}
    job = runs.Job(tmp_path, changed)
    assert job.finish() == 1
    assert "validation.global_batches, validation.best_by and [evaluation], or leave out keep_best" in job.output()


def test_a_question_without_room_for_its_answer_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    job = runs.Job(tmp_path, config | {"evaluation": config["evaluation"] | {"max_new_tokens": 60}})
    assert job.finish() == 1
    assert (
        "evaluation.path, conversation 1: the question has 24 tokens, and with an answer of evaluation.max_new_tokens = 60 "
        "exceeds data.capacity = 80; lower max_new_tokens, or remove the row"
    ) in job.output()


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"evaluation": {"every": 0}}, "every = 0 must be at least 1"),
        ({"evaluation": {"scorer": "score"}}, "scorer = 'score' names no function; write it as module:function"),
        ({"evaluation": {"every": None}}, 'best_by = "answers" compares the scores of answers during the training'),
        ({"checkpoint": {"every": 7, "keep_best": 1}}, "checkpoint.every = 7 and evaluation.every = 5 first meet at"),
    ],
)
def test_wrong_settings_of_the_evaluation_are_refused(
    config: dict[str, Any], tables: dict[str, Any], message: str
) -> None:
    judged = config | {"validation": {"sources": config["data"]["sources"], "best_by": "answers"}}
    with pytest.raises(ValueError, match=message):
        parse_config({name: table | tables.get(name, {}) for name, table in judged.items()})
