"""The validation losses are right, equal on any topology and after any kill, and change no
training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
import transformers

from checkpoints import About, CheckpointStore
from sftstream import ChatEncoder
from trainer.config_file import parse_config
from trainer.distributed.mesh import distributed
from trainer.training.validation import HELD_OUT as HELD_OUT_PACKS
from trainer.training.validation import Validation

HELD_OUT = tiny.rows(20, seed=9)
BY_SOURCE = (HELD_OUT[:13], HELD_OUT[13:])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> dict[str, Any]:
    """Six steps, with validation after every second step on two sources of 13 and 7 conversations
    and a too long one."""
    directory = tmp_path_factory.mktemp("data")
    too_long = tiny.chat("a question", " ".join(tiny.WORDS * 8))
    contents = (BY_SOURCE[0], [*BY_SOURCE[1], too_long])
    held_out = [tiny.write_jsonl(directory / f"held_out{n}.jsonl", rows) for n, rows in enumerate(contents)]
    return runs.run_config(
        tokenizer,
        runs.sources(directory),
        run={"steps": 6},
        # A low rate: at 1e-2, AdamW turns rounding errors of tiny gradients into a loss change of 5e-6.
        optimizer={"learning_rate": 1e-3},
        validation={"sources": [{"path": path} for path in held_out], "every": 2},
    )


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> Path:
    """The directory of a run of `config` on two data-parallel ranks."""
    return runs.run(tmp_path_factory.mktemp("validated"), config, 2).directory


def losses(directory: Path) -> dict[int, float]:
    """Return the validation losses by step."""
    return {line["step"]: line["validation_loss"] for line in runs.metrics(directory) if "validation_loss" in line}


def losses_of_sources(directory: Path) -> dict[int, list[float]]:
    """Return the validation losses of the sources by step."""
    key = "validation_loss_by_source"
    return {line["step"]: line[key] for line in runs.metrics(directory) if key in line}


def store(directory: Path) -> CheckpointStore:
    return CheckpointStore(directory / "runs" / "run" / "checkpoints")


def packs_digest(directory: Path) -> str:
    """Return the digest of the held-out packs in the last manifest."""
    return store(directory).manifest(store(directory).steps()[-1]).about.digests[HELD_OUT_PACKS]


def test_the_loss_equals_transformers_on_each_conversation_alone(validated: Path, tokenizer: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(validated / "runs" / "run" / "export")
    encoder = ChatEncoder(tokenizer)
    totals, counts = [0.0, 0.0], [0, 0]
    for source, rows in enumerate(BY_SOURCE):
        for row in rows:
            (example,) = encoder.encode(row["messages"])
            tokens, trained = torch.from_numpy(example.tokens.copy()), torch.from_numpy(example.loss_mask.copy())
            logits = model(tokens.long()[None]).logits[0, :-1].double()
            targets = tokens[1:][trained[1:]].long()
            totals[source] += torch.nn.functional.cross_entropy(logits[trained[1:]], targets, reduction="sum").item()
            counts[source] += len(targets)
    total, count = sum(totals), sum(counts)
    means = [totals[0] / counts[0], totals[1] / counts[1]]
    assert means[0] != pytest.approx(means[1], rel=1e-3)
    assert losses(validated).keys() == losses_of_sources(validated).keys() == {2, 4, 6}
    assert losses(validated)[6] == pytest.approx(total / count, rel=1e-6)
    assert losses_of_sources(validated)[6] == pytest.approx(means, rel=1e-6)
    last = runs.metrics(validated)[5]
    assert last["validation_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert last["validation_perplexity_by_source"] == pytest.approx([math.exp(mean) for mean in means], rel=1e-5)
    assert last["perplexity"] == math.exp(last["loss"])
    output = (validated / "rank0.log").read_text()
    assert f"held out 20 conversations, {count} trained tokens; refused 1 (longer than capacity: 1)" in output
    shown = f"source 0: {means[0]:.4f}, source 1: {means[1]:.4f}"
    assert f"step 6 | validation loss {total / count:.4f} ({shown})" in output


def test_validation_changes_no_bit_of_the_training(validated: Path, config: dict[str, Any], tmp_path: Path) -> None:
    runs.run(tmp_path, {name: table for name, table in config.items() if name != "validation"}, 2)
    plain, found = runs.outcome(tmp_path), runs.outcome(validated)
    for line in found["metrics"]:
        for key in [key for key in line if key.startswith("validation_")]:
            del line[key]
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
    for step, expected in losses_of_sources(validated).items():
        assert losses_of_sources(tmp_path)[step] == pytest.approx(expected, rel=1e-6)
    assert packs_digest(tmp_path) == packs_digest(validated)


def test_global_batches_limits_validation_to_the_first_packs(
    validated: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    config = config | {"validation": config["validation"] | {"global_batches": 1}, "run": config["run"] | {"steps": 2}}
    output = runs.run(tmp_path, config).output()
    (count,) = (int(line.split()[2]) for line in output.splitlines() if line.startswith("held out "))
    assert 0 < count < 20
    assert packs_digest(tmp_path) != packs_digest(validated)
    assert losses(tmp_path)[2] != pytest.approx(losses(validated)[2], rel=1e-4)


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
    for changes in ({"sources": config["data"]["sources"]}, {"best_by": 1}, {"global_batches": 1}):
        changed = config["validation"] | changes
        job = runs.Job(tmp_path, config | {"run": config["run"] | {"steps": 7}, "validation": changed})
        assert job.finish() == 1
        assert (
            "come from other held-out conversations or other tokens of them; restore validation.sources, "
            "validation.global_batches, validation.best_by and [evaluation], or leave out keep_best" in job.output()
        )
    assert [store(tmp_path).manifest(step).about.validation_loss for step in best] == [found[step] for step in best]


@pytest.fixture
def judged(config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The config of a run in `tmp_path` with a checkpoint of step 2, of the lowest validation loss."""
    judging = config | {"checkpoint": {"every": 2, "keep_best": 1}, "run": config["run"] | {"steps": 2}}
    runs.run(tmp_path, judging)
    return judging | {"run": config["run"] | {"steps": 4}}


def test_losses_in_other_packs_of_the_same_conversations_are_compared(judged: dict[str, Any], tmp_path: Path) -> None:
    changes = {"streams": 3, "capacity": 300, "global_batch": 3, "window": 4}
    data = judged["data"] | changes | {"accept_changed": [f"data.{name}" for name in changes]}
    reordered = judged["validation"] | {"sources": judged["validation"]["sources"][::-1]}
    before = packs_digest(tmp_path)
    runs.run(tmp_path, judged | {"data": data, "validation": reordered})
    assert list(losses(tmp_path)) == [2, 4]
    assert packs_digest(tmp_path) != before


def test_an_accepted_change_of_the_held_out_labels_is_named_and_goes_on_as_advised(
    judged: dict[str, Any], tmp_path: Path
) -> None:
    data = judged["data"] | {
        "train_on": ["assistant", "user"],
        "streams": 4,
        "accept_changed": ["data.train_on", "data.streams"],
    }
    job = runs.Job(tmp_path, judged | {"data": data})
    assert job.finish() == 1
    assert (
        "restore validation.sources, validation.global_batches, validation.best_by, [evaluation], "
        "data.train_on[1]: None -> 'user' and data.streams: 8 -> 4, or leave out keep_best" in job.output()
    )
    runs.run(tmp_path, judged | {"data": data, "checkpoint": {"every": 2}})
    assert list(losses(tmp_path)) == [2, 4]


def test_a_checkpoint_without_a_digest_of_the_judged_conversations_is_compared_by_its_packs(
    config: dict[str, Any], tokenizer: str
) -> None:
    parsed = parse_config(config)
    with distributed("cpu", parsed.parallel) as topology:
        encoder = ChatEncoder(tokenizer)
        validation, other = (Validation(parsed, topology, encoder, streams) for streams in (8, 3))
    earlier = About(digests={HELD_OUT_PACKS: validation.digests[HELD_OUT_PACKS]})
    validation.require_comparable(earlier, ())
    with pytest.raises(ValueError, match=r"restore validation\.sources, .* and data.streams: 8 -> 3, or leave out"):
        other.require_comparable(earlier, ["data.streams: 8 -> 3", "data.sources[1]: added"])


def test_checkpoints_of_the_lowest_loss_of_a_source_stay(config: dict[str, Any], tmp_path: Path) -> None:
    """One source repeats the training's conversations, the other has signs that no training row
    has: the loss of the second rises while the loss of all falls."""
    learned = tiny.rows(60)[:20]
    opposed = [tiny.chat("0: the", "§" * 60)]
    paths = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate((learned, opposed))]
    config = config | {
        "validation": {"sources": [{"path": path} for path in paths], "every": 1, "best_by": 1},
        "checkpoint": {"every": 1, "keep": 1, "keep_best": 1},
        "optimizer": {"learning_rate": 1e-2},
    }
    runs.run(tmp_path, config)
    found = losses_of_sources(tmp_path)
    best = min(found, key=lambda step: found[step][1])
    assert min(losses(tmp_path), key=losses(tmp_path).__getitem__) == 6 != best
    assert store(tmp_path).steps() == [best, 6]
    assert store(tmp_path).manifest(best).about.validation_loss == found[best][1]


@pytest.mark.parametrize("number", [-1, 2])
def test_a_source_to_judge_by_must_exist(config: dict[str, Any], number: int) -> None:
    tables = config | {"validation": config["validation"] | {"best_by": number}}
    with pytest.raises(ValueError, match=f'best_by = {number} must be "all" or the index of a held-out source'):
        parse_config(tables)


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


def test_a_run_ends_early_once_its_patience_is_used_up_and_goes_on_with_more(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """Train at a learning rate so high that the loss rises. Kill the run before its end."""
    config = config | {
        "run": config["run"] | {"steps": 30},
        "optimizer": {"learning_rate": 3.0},
        "checkpoint": {"every": 1, "keep": 1, "keep_best": 1},
    }
    patient = config | {"validation": config["validation"] | {"every": 1, "patience": 3}}
    job = runs.Job(tmp_path, patient)
    lines = tmp_path / "runs" / "run" / "metrics.jsonl"
    runs.wait_for(lambda: lines.exists() and lines.read_bytes().count(b"\n") >= 2, job)
    job.kill()
    output = runs.run(tmp_path, patient).output()
    found = losses(tmp_path)
    best = min(found, key=lambda step: found[step])
    last = first_end(list(found.values()), 3)
    assert 3 < last < 30
    assert list(found) == list(range(1, last + 1))
    lowest = min(list(found.values())[:last])
    assert f"ends early after step {last}: the last 3 validations had no loss below {lowest:.4f}" in output
    assert store(tmp_path).steps() == sorted({best, last})
    assert (tmp_path / "runs" / "run" / "export" / "model.safetensors").exists()
    again = runs.run(tmp_path, patient).output()
    assert f"finished after step {last}; raise validation.patience to train on, or give another run.name" in again
    assert len(losses(tmp_path)) == last, "a run that ended early takes no further step"
    runs.run(tmp_path, config | {"validation": config["validation"] | {"every": 1, "patience": 5}})
    assert len(losses(tmp_path)) == first_end(list(losses(tmp_path).values()), 5) > last


def first_end(losses: list[float], patience: int) -> int:
    """Return the number of losses up to the first `patience` in a row without a new lowest."""
    return next(
        end
        for end in range(patience + 1, len(losses) + 1)
        if min(losses[end - patience : end]) >= min(losses[: end - patience])
    )


def test_an_improvement_below_the_least_counts_as_none(config: dict[str, Any], tmp_path: Path) -> None:
    changes = {"every": 1, "patience": 1, "min_improvement": 5.0}
    runs.run(tmp_path, config | {"validation": config["validation"] | changes})
    found = losses(tmp_path)
    assert list(found) == [1, 2]
    assert found[2] < found[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patience": 0}, "patience = 0 must be at least 1"),
        ({"min_improvement": -0.5}, "min_improvement = -0.5 must be finite and not negative"),
    ],
)
def test_limits_of_the_early_end(config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(config | {"validation": config["validation"] | changes})
