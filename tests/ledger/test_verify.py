"""The verification kills real processes, says yes to exact resumes, and no to others."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import runs
import tiny
from commands import run

from sftstream.cli.main import main
from sftstream.ledger.data_run import run_data
from sftstream.ledger.verify import Attempt, Hop, _Verification


def _toml(path: Path, config: dict[str, dict[str, object]]) -> Path:
    path.write_text("".join(f"{name} = {runs.toml(table)}\n" for name, table in config.items()))
    return path


def test_a_killed_data_run_is_shown_to_resume_exactly(tokenizer: str, tmp_path: Path) -> None:
    config = _toml(tmp_path / "run.toml", runs.run_config(tokenizer, runs.sources(tmp_path)))
    result = run(main, "verify-resume", config, "--data-only", "--steps", 30, "--kills", 2, "--seed", 3)
    assert result.exit_code == 0, result
    lines = result.stdout.splitlines()
    assert lines[0] == "seed 3"
    assert sum(line.startswith("killed on ") for line in lines) >= 1, lines
    assert lines[-1] == "verdict: the resumes are exact"
    assert "not shown: losses and weights: data only" in lines


def test_runs_with_other_packs_get_the_verdict_no(tokenizer: str, tmp_path: Path) -> None:
    config = tiny.data_config(tokenizer, runs.sources(tmp_path))
    run_data(config, tmp_path / "whole", 4, 2)
    run_data(msgspec.structs.replace(config, seed=1), tmp_path / "broken", 4, 2)
    verification = _Verification(_nothing, tmp_path, random.Random(0), print)
    verification.judge(tmp_path / "broken", "", 1, "shards 1 x workers 0")
    assert (
        verification.verdict()
        .differences[0]
        .startswith("A is the run without a kill, B the killed run: step 1, pack 0: row ")
    )


def test_losses_on_another_number_of_shards_may_differ_by_rounding_alone(tmp_path: Path) -> None:
    verification = _Verification(_nothing, tmp_path, random.Random(0), print)
    verification.compare_losses([(2.0, 1.0), (1.0, 1.0)], [(2.0002, 1.1), (1.0, 1.0)])
    assert verification.shown == ["the losses on other numbers of shards differ by at most 0.0001 of their value"]
    for other in (1.02, float("nan")):
        verification.compare_losses([(1.0, 1.0)], [(other, 1.0)])
    verification.compare_losses([(None, None)], [(None, None)])  # skipped updates of both runs
    assert len(verification.differences) == 2
    verification.compare_losses([(None, None)], [(1.0, 1.0)])
    assert len(verification.differences) == 3
    assert verification.differences[0].endswith("differ by at most 0.02 of their value, more than rounding (0.01)")


def test_weights_with_another_bit_get_the_verdict_no(tmp_path: Path) -> None:
    verification = _Verification(_nothing, tmp_path, random.Random(0), print)
    verification.compare_bits("weights", "a", "a")
    verification.compare_bits("losses", [(1.0, 2.0)], [(1.0, 2.0000001)])
    verdict = verification.verdict()
    assert verdict.shown == ("the weights have equal bits",)
    assert verdict.differences == ("the losses of the killed run differ from those of the run without a kill",)


def _nothing(_: Path, hop: Hop) -> Attempt:
    raise AssertionError(f"no run is started, not even on {hop}")


def test_a_run_that_cannot_start_is_an_error_with_its_message(tokenizer: str, tmp_path: Path) -> None:
    config = _toml(tmp_path / "run.toml", runs.run_config(tokenizer, str(tmp_path / "nowhere.jsonl")))
    result = run(main, "verify-resume", config, "--data-only")
    assert result.exit_code == 1
    assert "nowhere.jsonl' matches no file" in result.stderr


def test_the_function_of_a_scorer_is_called_in_a_verification_that_allows_it(tokenizer: str, tmp_path: Path) -> None:
    rows = runs.sources(tmp_path)
    evaluation = {
        "path": tiny.write_jsonl(tmp_path / "asked.jsonl", tiny.rows(2)),
        "scorer": "nowhere_to_be_found:score",
    }
    config = _toml(tmp_path / "run.toml", runs.run_config(tokenizer, rows, evaluation=evaluation))
    refused = run(main, "verify-resume", config)
    assert refused.exit_code == 1
    assert "add --allow-code to the command line if you trust it" in refused.stderr
    allowed = run(main, "verify-resume", config, "--allow-code")
    assert "evaluation.scorer = 'nowhere_to_be_found:score' is not found" in allowed.stderr


@pytest.mark.slow
def test_a_killed_training_run_is_shown_to_resume_exactly(tokenizer: str, tmp_path: Path) -> None:
    config = _toml(tmp_path / "run.toml", runs.run_config(tokenizer, runs.sources(tmp_path)))
    result = run(main, "verify-resume", config, "--steps", 8, "--kills", 2, "--seed", 3)
    assert result.exit_code == 0, result
    lines = result.stdout.splitlines()
    assert "shown: the losses have equal bits" in lines
    assert "shown: the weights have equal bits" in lines
    assert any(line.startswith("on other shards: killed on shards 2 x workers 1 after step ") for line in lines), lines
    losses = next(line for line in lines if line.startswith("shown: the losses on other numbers of shards differ by "))
    assert not losses.endswith(" at most 0 of their value")  # else no step was kept from the two shards
    assert any(line.startswith("shown: on other shards: 8 steps have equal packs after 2 kills") for line in lines), (
        lines
    )
    assert lines[-1] == "verdict: the resumes are exact"
