"""The verification kills real processes, says yes to exact resumes, and no to others."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import runs
import tiny
from commands import run

from sftstream.cli.main import main
from sftstream.ledger.data_run import run_data
from sftstream.ledger.verify import _judge


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
    verdict = _judge(tmp_path / "whole", tmp_path / "broken", 1, None, [])
    assert verdict.differences[0].startswith("A is the run without a kill, B the killed run: step 1, pack 0: row ")


def test_a_run_that_cannot_start_is_an_error_with_its_message(tokenizer: str, tmp_path: Path) -> None:
    config = _toml(tmp_path / "run.toml", runs.run_config(tokenizer, str(tmp_path / "nowhere.jsonl")))
    result = run(main, "verify-resume", config, "--data-only")
    assert result.exit_code == 1
    assert "nowhere.jsonl' matches no file" in result.stderr


@pytest.mark.slow
def test_a_killed_training_run_is_shown_to_resume_exactly(tokenizer: str, tmp_path: Path) -> None:
    config = _toml(tmp_path / "run.toml", runs.run_config(tokenizer, runs.sources(tmp_path)))
    result = run(main, "verify-resume", config, "--steps", 8, "--kills", 2, "--seed", 3)
    assert result.exit_code == 0, result
    lines = result.stdout.splitlines()
    assert "shown: the losses have equal bits" in lines
    assert "shown: the weights have equal bits" in lines
