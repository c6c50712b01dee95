"""A step whose loss or gradient is not finite is named by its conversations, and never saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import runs
import tiny
import torch
import transformers

from checkpoints import CheckpointStore
from sftstream.ledger.audit import audit
from sftstream.ledger.reader import Ledger

POISON = 37
"""Row of the conversation with a word that no other has."""


def poisoned(directory: Path, tokenizer: str, text: str, **run: Any) -> dict[str, Any]:
    """Return the config of adapters over a frozen model in which the last token of `text` has an
    infinite embedding: the loss of a pack with the token is not a number."""
    shape = runs.run_config(tokenizer)["model"]
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, tie_word_embeddings=False))
    token = tiny.fast_tokenizer().encode(text, add_special_tokens=False)[-1]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.inf
    model.save_pretrained(directory / "model")
    rows = tiny.rows(60)
    rows[POISON] = tiny.chat("37: what is a paragraph", "§ is")
    source = tiny.write_jsonl(directory / "rows.jsonl", rows)
    config = runs.run_config(tokenizer, source, run=run, checkpoint={"every": 1, "keep": 99})
    return config | {"model": {"init_from": str(directory / "model")}, "lora": {"rank": 2}}


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> tuple[Path, dict[str, Any]]:
    """An epoch that skips the update of the step with the poisoned conversation, on two ranks."""
    directory = tmp_path_factory.mktemp("skipping")
    config = poisoned(directory, tokenizer, "§", epochs=1, steps=99, on_nonfinite="skip")
    runs.run(directory, config, 2)
    return directory, config


def bad_step(directory: Path) -> int:
    (step,) = (line["step"] for line in runs.metrics(directory) if line.get("unapplied"))
    return int(step)


def store(directory: Path) -> CheckpointStore:
    return CheckpointStore(directory / "runs" / "run" / "checkpoints")


def tensors(directory: Path, step: int) -> dict[str, Any]:
    """Return the stored bytes of weights and optimizer after a step."""
    found = store(directory).manifest(step)
    assert found.tensors
    step_directory = directory / "runs" / "run" / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in step_directory.glob("tensors*")} | {
        path.name: path.read_bytes() for path in step_directory.glob("*.safetensors")
    }


def test_a_skip_leaves_weights_and_optimizer_to_the_bit_and_the_run_goes_on(
    skipping: tuple[Path, dict[str, Any]],
) -> None:
    directory, _ = skipping
    step = bad_step(directory)
    assert 1 < step < len(runs.metrics(directory))
    before, after, later = (tensors(directory, number) for number in (step - 1, step, step + 1))
    assert before
    assert after == before
    assert later != after
    line = runs.metrics(directory)[step - 1]
    assert (line["loss"], line["grad_norm"], "perplexity" in line) == (None, None, False)
    assert all(line["loss"] > 0 for line in runs.metrics(directory) if line["step"] != step)


def test_a_skip_is_on_record_with_its_conversations_and_audited(skipping: tuple[Path, dict[str, Any]]) -> None:
    directory, _ = skipping
    step = bad_step(directory)
    ledger = Ledger(directory / "runs" / "run")
    (record,) = ledger.unapplied
    assert (record.step, record.loss, record.grad_norm) == (step, "nan", "nan")
    (pack,) = record.packs
    segments = ledger.segments(step)
    listed = segments[segments["pack"] == pack]
    assert [ref.row for ref in record.conversations] == list(dict.fromkeys(listed["row"].tolist()))
    assert POISON in [ref.row for ref in record.conversations]
    assert len(listed) < len(segments)
    assert len(record.parameters) == 16
    events = (directory / "runs" / "run" / "events.jsonl").read_text().splitlines()
    (event,) = (event for event in map(json.loads, events) if event["event"] == "unapplied")
    assert event["step"] == step
    assert f"step {step}: the loss is nan and the gradient's norm nan; the norms of all 16 parameters" in event["cause"]
    assert f"no update: {event['cause']}" in (directory / "rank0.log").read_text()
    report = audit(ledger)
    assert report.differences == []
    (proved,) = (line for line in report.proved if "without an update" in line)
    assert proved.startswith(f"steps without an update, since loss or gradient was not finite: {step}; their ")


def test_an_audit_finds_a_skip_that_a_record_hides_or_that_names_other_conversations(
    skipping: tuple[Path, dict[str, Any]],
) -> None:
    directory, _ = skipping
    path = directory / "runs" / "run" / "ledger" / "unapplied.jsonl"
    whole = path.read_bytes()
    step = bad_step(directory)
    try:
        path.unlink()
        assert audit(Ledger(directory / "runs" / "run"), 1).differences == [
            f"step {step} is without an update in metrics.jsonl, but not in ledger"
        ]
        record = msgspec.json.decode(whole)
        record["conversations"] = record["conversations"][1:]
        path.write_bytes(msgspec.json.encode(record) + b"\n")
        assert audit(Ledger(directory / "runs" / "run"), 1).differences == [
            f"step {step}: the conversations named as the cause are not those of the packs named"
        ]
    finally:
        path.write_bytes(whole)


def test_a_run_killed_after_a_skip_goes_on_with_the_same_bits(
    skipping: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    directory, config = skipping
    step = bad_step(directory)
    job = runs.Job(tmp_path, config, 2)
    path = tmp_path / "runs" / "run" / "metrics.jsonl"
    runs.wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= step, job)
    job.kill()
    runs.run(tmp_path, config, 2)
    assert runs.metrics(tmp_path) == runs.metrics(directory)
    last = store(directory).steps()[-1]
    assert tensors(tmp_path, last) == tensors(directory, last)
    records = [(root / "runs" / "run" / "ledger" / "unapplied.jsonl").read_bytes() for root in (tmp_path, directory)]
    assert records[0] == records[1]


def test_a_stop_names_conversations_and_parameters_and_saves_nothing(
    skipping: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    directory, config = skipping
    step = bad_step(directory)
    stopping = {"run": config["run"] | {"on_nonfinite": "stop"}, "parallel": {"tp": 2}}
    job = runs.Job(tmp_path, config | stopping, 2)
    assert job.finish() == 1
    (line,) = (line for line in job.output().splitlines() if line.startswith("error: "))
    assert f"error: step {step}: the loss is nan and the gradient's norm nan; the norms of all 16 parameters" in line
    (record,) = Ledger(directory / "runs" / "run").unapplied
    first = record.conversations[0].row
    assert f"the conversations of pack {record.packs[0]}: row {first} of source 0 (" in line
    assert f"{directory}/rows.jsonl:{first + 1})" in line
    assert 'set run.on_nonfinite = "skip"' in line
    assert store(tmp_path).steps()[-1] == step - 1
    runs.run(tmp_path, config)  # the remedy
    assert bad_step(tmp_path) == step


def test_a_run_whose_every_step_is_broken_stops_after_ten_skips(tmp_path: Path, tokenizer: str) -> None:
    job = runs.Job(tmp_path, poisoned(tmp_path, tokenizer, "<|eot_id|>", steps=20, on_nonfinite="skip"))
    assert job.finish() == 1
    assert len(runs.metrics(tmp_path)) == 10
    assert "error: step 11: the loss is nan" in job.output()
    assert "the updates of the 10 steps before were skipped too; lower optimizer.learning_rate" in job.output()
    assert store(tmp_path).steps() == []


def test_weights_that_an_update_made_infinite_are_not_saved(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(
        tokenizer, runs.sources(tmp_path), optimizer={"learning_rate": 3e38}, checkpoint={"every": 1}
    )
    job = runs.Job(tmp_path, config)
    assert job.finish() == 1
    assert "error: step 1: after the update" in job.output()
    assert "hold numbers that are not finite, and nothing is saved; lower optimizer.learning_rate" in job.output()
    assert store(tmp_path).steps() == []
