"""Options change no bit of a run if they change memory or traffic only, and else rounding only."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
import transformers
from safetensors.torch import load, load_file
from tiny_llama import public_llama

from checkpoints import CheckpointStore


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and outcome of a run on two processes."""
    directory = tmp_path_factory.mktemp("plain")
    config = runs.run_config(tokenizer, runs.sources(directory), run={"steps": 4})
    runs.run(directory, config, processes=2)
    return config, runs.outcome(directory)


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: config.get(name, {}) | changes.get(name, {}) for name in config | changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"run": {"recompute": "selective"}},
        {"run": {"recompute": "full"}},
        {"parallel": {"reshard_after_forward": False}},
    ],
    ids=str,
)
def test_options_for_memory_and_traffic_change_no_bit(
    changes: dict[str, Any], plain: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    config, expected = plain
    runs.run(tmp_path, changed(config, changes), processes=2)
    assert runs.outcome(tmp_path) == expected


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"parallel": {"replicas": 2}}, 1e-5),
        ({"parallel": {"reduce_gradients": "pack"}}, 1e-5),
        ({"run": {"compile": True}}, 1e-5),
        ({"run": {"float8": True}}, 2e-2),
        ({"run": {"compute_dtype": "bfloat16"}}, 1e-2),
        ({"run": {"compute_dtype": "bfloat16", "weights_dtype": "bfloat16"}}, 1e-2),
    ],
    ids=str,
)
def test_options_that_change_rounding_train_alike_and_are_refused_on_a_resume(
    changes: dict[str, Any], tolerance: float, plain: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    config, expected = plain
    runs.run(tmp_path, changed(config, changes), processes=2)
    found = runs.metrics(tmp_path)
    assert [line["batch_digest"] for line in found] == [line["batch_digest"] for line in expected["metrics"]]
    for line, before in zip(found, expected["metrics"], strict=True):
        assert line["loss"] == pytest.approx(before["loss"], rel=tolerance)
    if "run" in changes:  # sums of two ranks can have equal bits in both orders
        assert runs.outcome(tmp_path)["weights"] != expected["weights"]
        plain_run = {"steps": 6, "compile": False, "float8": False, "weights_dtype": "float32"}
        job = runs.Job(tmp_path, changed(config, {"run": plain_run}), processes=2)
        assert job.finish() == 1
        for key, value in changes["run"].items():
            assert f"run.{key}: {value!r} -> {False if value is True else 'float32'!r}" in job.output()


def test_the_z_loss_is_trained_on_and_reported_apart_from_the_cross_entropy(
    plain: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    config, expected = plain
    given = changed(config, {"optimizer": {"z_loss": 1.0}, "parallel": {"tp": 2}})
    runs.run(tmp_path, given, processes=2)
    first, *later = runs.metrics(tmp_path)
    before = expected["metrics"]
    # Before the first update both runs have the same model, whose logits are near 0: the logarithm
    # of the sum is near that of the 512 ids.
    assert first["loss"] == pytest.approx(before[0]["loss"], rel=1e-6)
    assert first["z_loss"] == pytest.approx(math.log(512) ** 2, rel=0.01)
    assert first["grad_norm"] > 1.5 * before[0]["grad_norm"]
    assert later[-1]["z_loss"] < first["z_loss"]
    assert all("z_loss" not in line for line in before)
    job = runs.Job(tmp_path, changed(given, {"run": {"steps": 6}, "optimizer": {"z_loss": 0.0}}), processes=2)
    assert job.finish() == 1
    assert "optimizer.z_loss: 1.0 -> 0.0" in job.output()


def test_a_resume_without_settings_uses_the_choices_of_its_checkpoint(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(tokenizer, runs.sources(tmp_path), run={"steps": 2})
    chosen = {"compute_dtype": "bfloat16", "weights_dtype": "bfloat16"}
    output = runs.run(tmp_path, changed(config, {"run": chosen})).output()
    line = 'layers not compiled, attention "sdpa", bfloat16 weights, computation in bfloat16, recompute none, deterministic'
    assert line in output
    saved = CheckpointStore(tmp_path / "runs" / "run" / "checkpoints").values(2, "settings")["settings"]
    assert saved["attention"] == "sdpa"
    later = {"steps": 4, "compute_dtype": "bfloat16"}
    assert line in runs.run(tmp_path, changed(config, {"run": later})).output()
    job = runs.Job(tmp_path, changed(config, {"run": later | {"steps": 6, "attention": "torch"}}))
    assert job.finish() == 1
    assert job.output().splitlines()[-1] == (
        'error: attention "torch" has kernels for cuda, not for cpu: set run.attention = "auto"'
    )


def test_compiled_layers_resume_with_the_recomputation_of_the_checkpoint(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(tokenizer, runs.sources(tmp_path), run={"compile": True})
    starts: tuple[dict[str, Any], ...] = (
        {"steps": 1, "recompute": "full"},
        {"steps": 2},
        {"steps": 3, "recompute": "none"},
    )
    outputs = [runs.run(tmp_path, changed(config, {"run": run})).output().splitlines() for run in starts]
    first, resumed, changed_by_hand = (next(line for line in lines if "compute " in line) for lines in outputs)
    capacity = config["data"]["capacity"]
    for lines in outputs:
        assert f"compile  the layers, for packs of {capacity} tokens; later starts reuse the compiled code" in lines
    assert first == resumed
    assert "recompute full" in first
    assert (
        "recompute none, deterministic; before with recompute full, from which compiled layers differ"
        in changed_by_hand
    )


def test_a_trace_of_steps_is_written_and_named(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(tokenizer, runs.sources(tmp_path), run={"steps": 3, "profile": [2, 3]})
    output = runs.run(tmp_path, config).output()
    path = Path("runs") / "run" / "trace.json.gz"
    assert f"the profiler's trace is in {path}" in output
    names = {event.get("name") for event in json.loads(gzip.decompress((tmp_path / path).read_bytes()))["traceEvents"]}
    assert "aten::mm" in names


def test_the_export_has_the_requested_dtype(plain: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    config, expected = plain
    runs.run(tmp_path, changed(config, {"run": {"export_dtype": "bfloat16"}}), processes=2)
    stored = load_file(tmp_path / "runs" / "run" / "export" / "model.safetensors")
    for name, weight in load(expected["weights"]).items():
        assert torch.equal(stored[name], weight.bfloat16())


def test_a_public_model_trained_over_ranks_is_exported_as_one_model(tmp_path: Path, tokenizer: str) -> None:
    public = public_llama(model_type="qwen2", vocab_size=512)
    public.generation_config = transformers.GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[7])
    public.save_pretrained(tmp_path / "public")
    config = runs.run_config(tokenizer, runs.sources(tmp_path), run={"steps": 2}, parallel={"tp": 2})
    config["model"] = {"init_from": str(tmp_path / "public")}
    runs.run(tmp_path, config, processes=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "run" / "export")
    assert isinstance(model, transformers.Qwen2ForCausalLM)
    assert model.generation_config.temperature == 0.6
    assert 7 in model.generation_config.eos_token_id
    before, after = public.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    answer = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
    assert answer.shape[1] > 3


def test_a_model_trained_on_several_ranks_answers_the_questions(tmp_path: Path, tokenizer: str) -> None:
    questions = tiny.write_jsonl(tmp_path / "questions.jsonl", tiny.rows(3))
    config = runs.run_config(tokenizer, runs.sources(tmp_path), run={"steps": 1}, parallel={"tp": 2})
    config["evaluation"] = {"path": questions, "show": 1, "max_new_tokens": 2}
    output = runs.run(tmp_path, config, processes=2).output()
    answers = [json.loads(line) for line in (tmp_path / "runs/run/answers.jsonl").read_text().splitlines()]
    assert [answer["expected"] for answer in answers] == [
        row["messages"][-1]["content"] + "<|eot_id|>" for row in tiny.rows(3)
    ]
    assert all(answer["right"] == (answer["given"] == answer["expected"]) for answer in answers)
    assert output.count("  -> ") == 1
    assert answers[0]["given"] in output
    assert "of 3 held-out questions answered exactly" in output


def test_a_run_in_replicas_is_resumed_without_a_trace(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(tokenizer, runs.sources(tmp_path), parallel={"replicas": 2})
    for name, starts in (("whole", [6]), ("broken", [2, 6])):
        (tmp_path / name).mkdir()
        for steps in starts:
            runs.run(tmp_path / name, changed(config, {"run": {"steps": steps}}), processes=4)
    assert runs.outcome(tmp_path / "broken") == runs.outcome(tmp_path / "whole")
