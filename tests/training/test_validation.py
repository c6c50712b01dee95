"""The validation loss is right, equal on any topology and after any kill, and changes no
training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
import transformers

from checkpoints import CheckpointStore
from sftstream import ChatEncoder

HELD_OUT = tiny.rows(20, seed=9)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> dict[str, Any]:
    """Six steps, with validation after every second step on 20 conversations and a too long one."""
    directory = tmp_path_factory.mktemp("data")
    too_long = tiny.chat("a question", " ".join(tiny.WORDS * 8))
    held_out = tiny.write_jsonl(directory / "held_out.jsonl", [*HELD_OUT, too_long])
    return runs.run_config(
        tokenizer,
        runs.sources(directory),
        run={"steps": 6},
        # A low rate: at 1e-2, AdamW turns rounding errors of tiny gradients into a loss change of 5e-6.
        optimizer={"learning_rate": 1e-3},
        validation={"sources": [{"path": held_out}], "every": 2},
    )


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> Path:
    """The directory of a run of `config` on two data-parallel ranks."""
    return runs.run(tmp_path_factory.mktemp("validated"), config, 2).directory


def losses(directory: Path) -> dict[int, float]:
    """Return the validation losses by step."""
    return {line["step"]: line["validation_loss"] for line in runs.metrics(directory) if "validation_loss" in line}


def store(directory: Path) -> CheckpointStore:
    return CheckpointStore(directory / "runs" / "run" / "checkpoints")


def packs_digest(directory: Path) -> str:
    """Return the digest of the held-out packs in the last manifest."""
    return store(directory).manifest(store(directory).steps()[-1]).about.digests["held-out data"]


def test_the_loss_equals_transformers_on_each_conversation_alone(validated: Path, tokenizer: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(validated / "runs" / "run" / "export")
    encoder, total, count = ChatEncoder(tokenizer), 0.0, 0
    for row in HELD_OUT:
        (example,) = encoder.encode(row["messages"])
        tokens, trained = torch.from_numpy(example.tokens.copy()), torch.from_numpy(example.loss_mask.copy())
        logits = model(tokens.long()[None]).logits[0, :-1].double()
        targets = tokens[1:][trained[1:]].long()
        total += torch.nn.functional.cross_entropy(logits[trained[1:]], targets, reduction="sum").item()
        count += len(targets)
    assert losses(validated).keys() == {2, 4, 6}
    assert losses(validated)[6] == pytest.approx(total / count, rel=1e-6)
    output = (validated / "rank0.log").read_text()
    assert f"held out 20 conversations, {count} trained tokens; refused 1 (longer than capacity: 1)" in output
    assert f"step 6 | validation loss {total / count:.4f}" in output


def test_validation_changes_no_bit_of_the_training(validated: Path, config: dict[str, Any], tmp_path: Path) -> None:
    runs.run(tmp_path, {name: table for name, table in config.items() if name != "validation"}, 2)
    plain, found = runs.outcome(tmp_path), runs.outcome(validated)
    for line in found["metrics"]:
        line.pop("validation_loss", None)
    assert found == plain


def test_a_killed_and_resumed_run_validates_with_the_same_bits(
    validated: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    job = runs.Job(tmp_path, config, 2)
    lines = tmp_path / "runs" / "run" / "metrics.jsonl"
    runs.wait_for(lambda: lines.exists() and lines.read_bytes().count(b"\n") >= 3, job)
    job.kill()
    runs.run(tmp_path, config, 2)
    assert runs.outcome(tmp_path) == runs.outcome(validated)


@pytest.mark.parametrize(("processes", "tp"), [(1, 1), (2, 2)])
def test_the_loss_on_another_topology_differs_by_rounding_only(
    validated: Path, config: dict[str, Any], tmp_path: Path, processes: int, tp: int
) -> None:
    runs.run(tmp_path, config | {"parallel": {"tp": tp}}, processes)
    assert losses(tmp_path) == pytest.approx(losses(validated), rel=1e-6)
    assert packs_digest(tmp_path) == packs_digest(validated)


def test_global_batches_limits_validation_to_the_first_packs(
    validated: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    config = config | {"validation": config["validation"] | {"global_batches": 1}, "run": config["run"] | {"steps": 2}}
    output = runs.run(tmp_path, config).output()
    (count,) = (int(line.split()[2]) for line in output.splitlines() if line.startswith("held out "))
    assert 0 < count < 20
    assert packs_digest(tmp_path) != packs_digest(validated)
    assert losses(tmp_path)[2] != pytest.approx(losses(validated)[2], rel=1e-3)


def test_checkpoints_of_the_lowest_loss_stay_across_restarts(config: dict[str, Any], tmp_path: Path) -> None:
    """Train at a learning rate so high that the loss rises."""
    config = config | {
        "optimizer": {"learning_rate": 3.0},
        "validation": config["validation"] | {"every": 1},
        "checkpoint": {"every": 1, "keep": 1, "keep_best": 2},
    }
    for steps in (3, 6):
        runs.run(tmp_path, config | {"run": config["run"] | {"steps": steps}})
    found = losses(tmp_path)
    best = sorted(sorted(found, key=lambda step: found[step])[:2])
    assert best[0] <= 3, "a checkpoint of the first start is among the best"
    assert store(tmp_path).steps() == sorted({*best, 6})
    changed = config["validation"] | {"sources": config["data"]["sources"]}
    job = runs.Job(tmp_path, config | {"run": config["run"] | {"steps": 7}, "validation": changed})
    assert job.finish() == 1
    assert "the checkpoint's losses come from other held-out conversations; restore validation.sources" in job.output()
    assert [store(tmp_path).manifest(step).about.validation_loss for step in best] == [found[step] for step in best]


def test_held_out_conversations_print_the_date_of_the_runs_start(config: dict[str, Any], tmp_path: Path) -> None:
    dated = tiny.save_tokenizer(tmp_path / "dated", tiny.DATED_TEMPLATE)
    digests = []
    for steps, tokenizer in ((2, {"path": dated, "date": "2020-02-02"}), (4, {"path": dated})):
        data = config["data"] | {"tokenizer": tokenizer}
        runs.run(tmp_path, config | {"data": data, "run": config["run"] | {"steps": steps}})
        digests.append(packs_digest(tmp_path))
    assert digests[0] == digests[1]


def test_held_out_sources_without_a_trainable_token_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    source = tiny.write_jsonl(tmp_path / "bad.jsonl", [{"text": "a"}])
    job = runs.Job(tmp_path, config | {"validation": {"sources": [{"path": source}]}})
    assert job.finish() == 1
    assert (
        "error: source 0 holds no conversation to train: each of its 1 rows is refused (unknown layout: 1"
        in job.output()
    )
    assert "unknown layout: 1" in job.output()
