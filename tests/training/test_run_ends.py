"""A run ends, goes on and exports as its user expects."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
import transformers
from tiny_llama import public_llama

from checkpoints import CheckpointStore
from trainer.config import TrainConfig
from trainer.config_file import parse_config
from trainer.main import main
from trainer.run import run

MARKED = tiny.TEMPLATE.replace("{{- bos_token }}", "{{- bos_token }}{#- the template of the run #}")


@pytest.fixture
def config(tmp_path: Path, tokenizer: str) -> dict[str, Any]:
    return runs.run_config(tokenizer, runs.sources(tmp_path), run={"steps": 2})


def fails(directory: Path, config: dict[str, Any], processes: int = 1) -> str:
    """Run to the end, expect exit code 1, and return the error line."""
    job = runs.Job(directory, config, processes)
    assert job.finish() == 1, job.output()
    (line,) = (line for line in job.output().splitlines() if line.startswith("error: "))
    assert "Traceback" not in job.output()
    return line


@pytest.mark.parametrize("start", [run, lambda _: main(["nowhere.toml"])])
def test_garbage_is_collected_from_the_first_step_on(
    start: Callable[[TrainConfig], Any], tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then, imports and compilers make lasting objects only."""
    monkeypatch.chdir(tmp_path)
    gc.disable()
    start(parse_config(config))
    assert gc.isenabled()


def store(directory: Path) -> CheckpointStore:
    return CheckpointStore(directory / "runs/run/checkpoints")


def of_epochs(config: dict[str, Any], epochs: int, **changes: Any) -> dict[str, Any]:
    data = config["data"] | {"accept_changed": ["data.epochs"]}
    return config | {"run": {"name": "run", "device": "cpu", "epochs": epochs} | changes, "data": data}


@pytest.mark.parametrize("own", [tiny.TEMPLATE, {"default": tiny.TEMPLATE, "tool_use": "{{ tools }}"}, None])
@pytest.mark.parametrize("inline", [True, False])
def test_an_export_carries_the_template_that_was_trained_with(
    tmp_path: Path, config: dict[str, Any], own: Any, inline: bool
) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(MARKED)
    directory = tiny.save_tokenizer(tmp_path / "words", template=own)
    config["data"]["tokenizer"] = {"path": directory, "template": MARKED if inline else str(path)}
    runs.run(tmp_path, config)
    store(tmp_path).export(2, tmp_path / "again")
    for export in (tmp_path / "runs/run/export", tmp_path / "again"):
        assert transformers.AutoTokenizer.from_pretrained(export).chat_template == MARKED
        assert not list(export.glob("additional_chat_templates/*"))


def test_changed_first_weights_are_refused_on_a_resume_and_moved_ones_are_not(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    public = public_llama(vocab_size=512)
    public.save_pretrained(tmp_path / "public")
    config["model"] = {"init_from": str(tmp_path / "public")}
    runs.run(tmp_path, config)
    shutil.copytree(tmp_path / "public", tmp_path / "moved")
    config["run"]["steps"] = 4
    config["model"] = {"init_from": str(tmp_path / "moved")}
    runs.run(tmp_path, config)
    public.model.norm.weight.data[0] += 1
    public.save_pretrained(tmp_path / "other")
    config["run"]["steps"] = 6
    config["model"] = {"init_from": str(tmp_path / "other")}
    assert "model.init_from: " in fails(tmp_path, config)
    (tmp_path / "moved" / "model.safetensors").unlink()
    config["model"] = {"init_from": str(tmp_path / "moved")}
    assert "model.safetensors cannot be read: No such file or directory; restore model.init_from" in fails(
        tmp_path, config, 2
    )


def test_a_run_of_refused_rows_leaves_no_checkpoint_and_gives_its_reason_at_every_start(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    path = tiny.write_jsonl(tmp_path / "bad.jsonl", [{"text": "a"}, {"text": "b"}])
    config["data"]["sources"] = [{"path": path}]
    config["run"] = {"name": "run", "epochs": 1, "device": "cpu"}
    config["checkpoint"] = {"every": 1}
    for _ in range(2):
        assert "source 0 holds no conversation to train: each of its 2 rows is refused" in fails(tmp_path, config)
        assert store(tmp_path).steps() == []
    tiny.write_jsonl(Path(path), tiny.rows(9))
    runs.run(tmp_path, config)  # the corrected file needs no other name


def test_steps_before_the_first_trained_token_are_not_saved(tmp_path: Path, config: dict[str, Any]) -> None:
    rows = [{"text": "?"}] * 200 + tiny.rows(9)
    config["data"] |= {"sources": [{"path": tiny.write_jsonl(tmp_path / "late.jsonl", rows)}], "shuffle": False}
    config["data"] |= {"window": 1, "streams": 1, "global_batch": 1, "max_refused": 1.0}
    config["run"] = {"name": "run", "epochs": 1, "device": "cpu"}
    config["checkpoint"] = {"every": 1, "keep": 99}
    runs.run(tmp_path, config)
    trained = [line["step"] for line in runs.metrics(tmp_path) if line["trained_tokens"]]
    assert store(tmp_path).steps()[0] == trained[0]


def test_a_finished_run_of_more_epochs_trains_on_with_each_row_once_an_epoch(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    config["checkpoint"] = {"every": 100}
    first = runs.run(tmp_path, of_epochs(config, 1), 2).directory
    ended = runs.metrics(first)
    weights = (tmp_path / "runs/run/export/model.safetensors").read_bytes()
    longer = of_epochs(config, 2)
    output = runs.run(tmp_path, longer, 2).output()
    assert f"the data goes on after its end at step {len(ended)}" in output
    assert "the learning rate goes on at 0.01" in output
    lines = runs.metrics(tmp_path)
    assert lines[: len(ended)] == ended
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["rows"] == 2 * ended[-1]["rows"] == 2 * 62
    assert (tmp_path / "runs/run/export/model.safetensors").read_bytes() != weights
    refused = [json.loads(line) for line in (tmp_path / "runs/run/refused.jsonl").read_text().splitlines()]
    assert Counter((line["row"], line["epoch"]) for line in refused) == {
        (row, epoch): 1 for row in (60, 61) for epoch in (0, 1)
    }
    output = runs.run(tmp_path, longer, 2).output()
    assert (
        f'finished after step {len(lines)}; raise run.epochs with data.accept_changed = ["data.epochs"] to train on'
        in output
    )


def test_a_decay_over_the_data_is_not_stretched_in_silence(tmp_path: Path, config: dict[str, Any]) -> None:
    config["schedule"] = {"kind": "cosine", "over": "data"}
    runs.run(tmp_path, of_epochs(config, 1))
    line = fails(tmp_path, of_epochs(config, 2))
    assert "schedule.rows: 62 -> 124" in line
    assert 'run.accept_changed = ["schedule"]' in line
    output = runs.run(tmp_path, of_epochs(config, 2, accept_changed=["schedule"])).output()
    assert "accepted: schedule.rows: 62 -> 124; the learning rate of step " in output
    # The record is part of the run: the next resume needs no permission.
    runs.run(tmp_path, of_epochs(config, 2))


def test_a_run_of_steps_and_epochs_ends_at_the_earlier_end(tmp_path: Path, config: dict[str, Any]) -> None:
    runs.run(tmp_path, of_epochs(config, 1, steps=3))
    assert len(runs.metrics(tmp_path)) == 3
    runs.run(tmp_path, of_epochs(config, 1, steps=1000))
    assert runs.metrics(tmp_path)[-1]["rows"] == 62


def test_a_decay_to_the_last_step_goes_on_as_its_error_advises(tmp_path: Path, config: dict[str, Any]) -> None:
    config["schedule"] = {"kind": "cosine", "minimum": 0.1}
    runs.run(tmp_path, config)
    config["run"]["steps"] = 4
    line = fails(tmp_path, config)
    assert "schedule.steps: 2 -> 4" in line
    assert "set schedule.steps = 2 to go on at the rate of the decay's end" in line
    config["schedule"]["steps"] = 2
    runs.run(tmp_path, config)
    assert [line["learning_rate"] for line in runs.metrics(tmp_path)] == pytest.approx([0.01, 0.0055, 0.001, 0.001])


def test_a_schedule_with_equal_rates_so_far_is_no_change(tmp_path: Path, config: dict[str, Any]) -> None:
    config["schedule"] = {"kind": "linear", "warmup": 5, "steps": 10}
    runs.run(tmp_path, config)
    config["run"]["steps"] = 4
    config["schedule"] = {"kind": "cosine", "warmup": 5, "steps": 12, "minimum": 0.5}
    runs.run(tmp_path, config)
    config["run"]["steps"] = 6
    config["schedule"]["warmup"] = 4
    assert "schedule.warmup: 5 -> 4" in fails(tmp_path, config)


def test_a_decay_starts_from_any_checkpoint_of_the_stable_phase_without_a_trace(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    decaying = {"kind": "wsd", "warmup": 1, "decay": 2, "decay_form": "1-sqrt"}
    for name in ("whole", "constant", "far end"):
        (tmp_path / name).mkdir()
    config["run"]["steps"] = 4
    runs.run(tmp_path / "whole", config | {"schedule": decaying})
    whole = runs.outcome(tmp_path / "whole")
    assert [line["learning_rate"] for line in whole["metrics"]] == pytest.approx(
        [0.005, 0.01, 0.01, 0.01 * (1 - 0.5**0.5)]
    )
    for name, stable in (("constant", {"warmup": 1}), ("far end", decaying | {"steps": 100})):
        config["run"]["steps"] = 2
        runs.run(tmp_path / name, config | {"schedule": stable})
        config["run"]["steps"] = 4
        runs.run(tmp_path / name, config | {"schedule": decaying})
        assert runs.outcome(tmp_path / name) == whole
    config["run"]["steps"] = 6
    assert "schedule.steps: 4 -> 6" in fails(tmp_path / "whole", config | {"schedule": decaying})

    copy = tmp_path / "whole/runs/copy"
    shutil.copytree(tmp_path / "whole/runs/run", copy)
    shutil.move(copy / "checkpoints/step-00000004", tmp_path)
    config["run"] |= {"name": "copy", "steps": 5}
    runs.run(tmp_path / "whole", config | {"schedule": decaying})
    rates = [line["learning_rate"] for line in runs.metrics(tmp_path / "whole", "copy")]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.01 * (1 - 0.5**0.5)])


def test_the_kind_of_the_optimizer_stays_even_if_changes_of_the_optimizer_are_accepted(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    runs.run(tmp_path, config)
    config["optimizer"]["kind"] = "muon"
    config["run"] |= {"steps": 4, "accept_changed": ["optimizer"]}
    line = fails(tmp_path, config)
    assert "optimizer.kind: 'adamw' -> 'muon'. Restore the settings, or give the run another name" in line
    config["run"]["name"] = "other"
    runs.run(tmp_path, config)


def test_accepted_settings_are_used_and_stay_on_record(tmp_path: Path, config: dict[str, Any]) -> None:
    runs.run(tmp_path, config)
    optimizer = {"learning_rate": 1e-3, "clip": 0.5, "weight_decay": 0.25, "betas": [0.8, 0.9]}
    config |= {"optimizer": optimizer, "schedule": {"kind": "linear", "steps": 40}}
    config["run"] |= {"steps": 4, "accept_changed": ["optimizer.learning_rate"]}
    line = fails(tmp_path, config)
    assert 'run.accept_changed = ["optimizer.learning_rate", "optimizer", "schedule"]' in line
    config["run"]["accept_changed"] = ["optimizer.learning_rate", "optimizer", "schedule"]
    output = runs.run(tmp_path, config).output()
    assert "accepted: optimizer.learning_rate: 0.01 -> 0.001" in output
    config["run"] |= {"steps": 6, "accept_changed": []}
    runs.run(tmp_path, config)
    (change,) = store(tmp_path).values(6)["settings"]["accepted"]
    assert change["step"] == 2
    assert "optimizer.clip: 1.0 -> 0.5" in change["differences"]
    assert runs.metrics(tmp_path)[2]["learning_rate"] == pytest.approx(1e-3 * 38 / 40)
    decays = _plain_values(tmp_path, 6, "weight_decay")
    assert set(decays) == {0.25, 0.0}
    assert set(map(tuple, _plain_values(tmp_path, 6, "betas"))) == {(0.8, 0.9)}


def _plain_values(directory: Path, step: int, name: str) -> list[Any]:
    """Return the plain values of a step whose keys end with `name`."""
    checkpoints = store(directory)
    manifest = checkpoints.manifest(step)
    spans = {key: span for key, span in manifest.plain.items() if key.endswith(f".{name}")}
    return list(checkpoints._read(step, manifest, spans).values())


def test_a_run_without_a_finite_loss_goes_on_as_its_error_advises(tmp_path: Path, config: dict[str, Any]) -> None:
    runs.run(tmp_path, config)
    config["run"] |= {"steps": 8, "accept_changed": ["optimizer"]}
    config["optimizer"] = {"learning_rate": 1e37, "clip": None}
    config["optimizer"].pop("clip")
    line = fails(tmp_path, config)
    assert (
        'lower optimizer.learning_rate, and once there is a checkpoint, set run.accept_changed = ["optimizer"]' in line
    )
    config["optimizer"] = {"learning_rate": 1e-3}
    runs.run(tmp_path, config)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, "1s"])
def test_a_run_that_was_asked_to_stop_exits_with_75_and_goes_on(
    tmp_path: Path, config: dict[str, Any], stop: signal.Signals | str
) -> None:
    config["run"]["steps"] = 100_000
    config["run"] |= {"stop_after": stop} if isinstance(stop, str) else {}
    job = runs.Job(tmp_path, config, 2)
    if not isinstance(stop, str):
        runs.wait_for(lambda: store(tmp_path).steps() != [], job)
        job.signal(stop, rank=1)
    assert job.finish() == 75, job.output()
    assert "and saved its checkpoint; go on with: python -m trainer.main " in job.output()
    done = len(runs.metrics(tmp_path))
    config["run"] = {"name": "run", "device": "cpu", "steps": done + 1}
    assert f"resuming after step {done}" in runs.run(tmp_path, config, 2).output()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run_stops_it_as_one_to_a_rank_does(
    tmp_path: Path, config: dict[str, Any], stop: signal.Signals
) -> None:
    config["run"]["steps"] = 100_000
    config["data"]["workers"] = 1
    job = runs.Job(tmp_path, config)
    runs.wait_for(lambda: store(tmp_path).steps() != [], job)
    # As `timeout`, a terminal and schedulers do.
    assert subprocess.run(["pkill", f"-{stop.name}", "-P", str(job.pids[0])], check=False).returncode == 0
    job.signal(stop)
    assert job.finish() == 75, job.output()
    assert "and saved its checkpoint; go on with: python -m trainer.main " in job.output()


def test_workers_that_torchrun_starts_again_after_a_stop_end_at_once(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config["run"] |= {"steps": 100_000, "stop_after": "1s"}
    job = runs.Job(tmp_path, config)
    assert job.finish() == 75
    steps = len(runs.metrics(tmp_path))
    environment = {"TORCHELASTIC_RESTART_COUNT": "1"}
    again = runs.Job(tmp_path, config, environment=environment)
    assert again.finish() == 75
    assert again.output() == ""
    assert len(runs.metrics(tmp_path)) == steps
    config["run"] = {"name": "run", "device": "cpu", "steps": steps + 1}
    runs.run(tmp_path, config)
    config["run"]["steps"] += 1
    # A crash after a new start is no stop: torchrun's next workers go on.
    assert runs.Job(tmp_path, config, environment=environment).finish() == 0
    assert len(runs.metrics(tmp_path)) == steps + 2


@pytest.mark.parametrize("text", ["", "0s", "3", "h", "3h50", "50m3h", "-3h", "1.5h", "99999999999999999999s"])
def test_a_time_of_another_form_is_refused(tmp_path: Path, config: dict[str, Any], text: str) -> None:
    config["run"]["stop_after"] = text
    from trainer.config_file import parse_config

    with pytest.raises(ValueError, match="is no time above 0; write days, hours"):
        parse_config(config)


def test_two_runs_of_one_name_with_different_roots_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    config["run"]["steps"] = 100_000
    first = runs.Job(tmp_path, config)
    runs.wait_for(lambda: (tmp_path / "runs/run/metrics.jsonl").exists(), first)
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "runs").symlink_to(tmp_path / "runs")
    config["checkpoint"]["root"] = str(tmp_path / "elsewhere")
    assert "runs/run is in use by process" in fails(tmp_path / "second", config, 2)
    first.signal(signal.SIGTERM)
    assert first.finish() == 75
    line = fails(tmp_path, config, 2)
    assert "runs/run holds metrics.jsonl or an export of a run that does not continue from these checkpoints" in line


def test_a_finished_run_is_not_replaced_once_its_checkpoints_are_gone(tmp_path: Path, config: dict[str, Any]) -> None:
    runs.run(tmp_path, config)
    before = runs.outcome(tmp_path)
    shutil.rmtree(tmp_path / "runs/run/checkpoints")
    assert "give this run another run.name, or move the directory away" in fails(tmp_path, config)
    assert runs.outcome(tmp_path) == before
    runs.run(tmp_path, config | {"run": config["run"] | {"name": "other"}})
    (tmp_path / "runs/run").rename(tmp_path / "away")
    runs.run(tmp_path, config)
    assert runs.outcome(tmp_path) == before


def test_the_checkpoints_of_another_run_do_not_take_a_directory_over(tmp_path: Path, config: dict[str, Any]) -> None:
    runs.run(tmp_path, config)
    other = config | {"run": config["run"] | {"name": "other"}}
    runs.run(tmp_path, other)
    shutil.rmtree(tmp_path / "runs/run/checkpoints")
    shutil.copytree(tmp_path / "runs/other/checkpoints", tmp_path / "runs/run/checkpoints")
    config["run"]["steps"] = 4
    assert "that does not continue from these checkpoints" in fails(tmp_path, config)


def test_moved_checkpoints_and_another_root_of_runs_go_on(tmp_path: Path, config: dict[str, Any]) -> None:
    config["run"] |= {"root": "elsewhere/all"}
    runs.run(tmp_path, config)
    assert (tmp_path / "elsewhere/all/run/export/config.json").exists()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "elsewhere/all/run/checkpoints").rename(tmp_path / "moved")
    config["checkpoint"]["root"] = str(tmp_path / "moved")
    config["run"] |= {"steps": 4}
    assert "resuming after step 2" in runs.run(tmp_path, config).output()
    (tmp_path / "elsewhere").rename(tmp_path / "runs")
    config["run"] |= {"steps": 6, "root": str(tmp_path / "runs" / "all")}
    assert "resuming after step 4" in runs.run(tmp_path, config).output()


def test_a_tied_head_is_saved_once(tmp_path: Path, config: dict[str, Any]) -> None:
    config["model"] = dict(config["model"], tie_word_embeddings=True)
    runs.run(tmp_path, config, 2)
    assert not [key for key in store(tmp_path).manifest(2).tensors if "head.weight" in key]
    config["run"]["steps"] = 4
    runs.run(tmp_path, config)
    store(tmp_path).export(4, tmp_path / "again")
    weights = (tmp_path / "runs/run/export/model.safetensors").read_bytes()
    assert (tmp_path / "again/model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_the_export_of_a_checkpoint_has_the_dtype_of_the_runs_export(
    tmp_path: Path, config: dict[str, Any], dtypes: tuple[str, str]
) -> None:
    config["run"] |= dict(zip(("weights_dtype", "export_dtype"), dtypes, strict=True))
    runs.run(tmp_path, config)
    store(tmp_path).export(2, tmp_path / "again")
    files = {path.name: path.read_bytes() for path in (tmp_path / "runs/run/export").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files
    assert transformers.AutoConfig.from_pretrained(tmp_path / "again").dtype == getattr(torch, dtypes[1])
