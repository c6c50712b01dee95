"""A loss spike is traced to its conversations; a rewound run may skip their steps or rows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import runs
import tiny
from commands import run as command

from checkpoints.cli.main import main as checkpoints_main
from sftstream.cli.main import main
from sftstream.ledger.audit import audit
from sftstream.ledger.reader import Ledger
from sftstream.ledger.segments import given, skipped


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> tuple[Path, dict[str, Any]]:
    """A run of 8 steps, with a checkpoint after every second step, and its config."""
    directory = tmp_path_factory.mktemp("before")
    config = runs.run_config(tokenizer, runs.sources(directory), run={"steps": 8}, checkpoint={"every": 2, "keep": 9})
    runs.run(directory, config)
    return directory, config


class Shown(NamedTuple):
    """A line of `sftstream trace --model`."""

    pack: int
    trained: int
    loss: float | None


def _traced(directory: Path, step: int, model: Path, *options: object) -> list[Shown]:
    result = command(main, "trace", directory / "runs" / "run", "--step", step, "--model", model, *options)
    assert result.exit_code == 0, result.stderr
    found = re.findall(
        r"^pack (\d+), .*; (\d+) of \d+ tokens trained(?:; loss ([\d.]+))?$", result.stdout, re.MULTILINE
    )
    return [Shown(int(pack), int(trained), float(loss) if loss else None) for pack, trained, loss in found]


def test_the_losses_of_a_traced_step_add_up_to_its_loss_in_the_metrics(
    before: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    directory, _ = before
    checkpoint = directory / "runs" / "run" / "checkpoints" / "step-00000004"
    shown = _traced(directory, 5, checkpoint)
    metrics = runs.metrics(directory)[4]
    assert len(shown) == len(Ledger(directory / "runs" / "run").segments(5))
    losses = [-1.0 if line.loss is None else line.loss for line in shown]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]
    assert sum(line.trained for line in shown) == metrics["trained_tokens"]
    total = sum(line.trained * (line.loss or 0.0) for line in shown)
    # The trace prints four decimals of each loss, computed by transformers instead of the trainer.
    assert total / metrics["trained_tokens"] == pytest.approx(metrics["loss"], abs=2e-4)
    assert command(checkpoints_main, "export", checkpoint, tmp_path / "model").exit_code == 0
    for pack in range(4):
        assert _traced(directory, 5, tmp_path / "model", "--pack", pack) == [
            line for line in shown if line.pack == pack
        ]


def _rewound(before: Path, directory: Path, step: int) -> Path:
    """Copy a run and remove its checkpoints after `step`, as docs/operations.md says."""
    shutil.copytree(before, directory, dirs_exist_ok=True)
    for path in (directory / "runs" / "run" / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(directory / "runs" / "run" / "export")
    return directory


def test_skipped_steps_change_no_weight_and_later_steps_have_their_packs(
    before: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    source, config = before
    whole = runs.digests(source)
    directory = _rewound(source, tmp_path / "skipping", 4)
    config = config | {"run": config["run"] | {"skip": {"steps": [[5, 6]]}}}
    refused = runs.Job(directory, config)
    assert refused.finish() == 1
    assert "data.accept_changed = ['data.skip'] accepts the change" in refused.output()
    accepted = config | {"data": config["data"] | {"accept_changed": ["data.skip"]}}
    # Two processes, killed in the skipped steps, then one process again.
    job = runs.Job(directory, accepted, 2)
    runs.wait_for(lambda: len(runs.digests(directory)) >= 5, job)
    job.kill()
    finished = runs.run(directory, accepted)
    assert "packs are empty" not in finished.output()
    lines = runs.metrics(directory)
    assert [line["batch_digest"] for line in lines[:4] + lines[6:]] == whole[:4] + whole[6:]
    assert [(line["tokens"], line["trained_tokens"], line["loss"], line["grad_norm"]) for line in lines[4:6]] == [
        (0, 0, 0.0, 0.0)
    ] * 2
    assert [line["rows"] for line in lines] == [line["rows"] for line in runs.metrics(source)]
    ledger = Ledger(directory / "runs" / "run")
    assert [len(given(ledger.segments(step))) for step in (5, 6)] == [0, 0]
    assert all(len(skipped(ledger.segments(step))) for step in (5, 6))
    report = audit(ledger)
    assert (report.differences, report.not_shown) == ([], [])
    assert "accepted so far: data.skip: None -> " in command(main, "audit", directory / "runs" / "run").stdout


def test_a_skipped_row_is_not_trained_and_validation_keeps_it(
    before: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    source, config = before
    step, segments = Ledger(source / "runs" / "run").steps[4]
    row = int(segments["row"][0])
    directory = _rewound(source, tmp_path / "skipping", 4)
    held_out = {"sources": [{"path": tiny.write_jsonl(tmp_path / "held.jsonl", tiny.rows(4))}], "every": 4}
    config = config | {
        "run": config["run"] | {"skip": {"rows": [[0, row]]}},
        "data": config["data"] | {"accept_changed": ["data.skip"]},
        "validation": held_out,
    }
    runs.run(directory, config)
    ledger = Ledger(directory / "runs" / "run")
    (left_out,) = skipped(ledger.segments(step))
    assert (left_out["row"], left_out["pack"]) == (row, segments["pack"][0])
    assert audit(ledger).differences == []
    assert runs.metrics(directory)[4]["trained_tokens"] == int(
        segments["trained_tokens"].sum() - segments["trained_tokens"][0]
    )
