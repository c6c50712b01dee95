"""NeMo Automodel gets the packs of the run in its own recipe, and resumes exactly after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from hosts import digest, write_data_table
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from sftstream import DataConfig, PackLoader

ROOT = Path(__file__).resolve().parents[2]
HOST = Path(__file__).with_name("automodel_host.py")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def automodel() -> None:
    """Skip these tests if the recipe cannot be imported, in a further process: it patches torch."""
    command = [sys.executable, "-c", "import nemo_automodel.recipes.llm.train_ft"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if tried.returncode:
        pytest.skip(f"NeMo Automodel cannot be imported: {tried.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def data(tokenizer: str, corpus_path: str) -> DataConfig:
    return tiny.data_config(tokenizer, corpus_path, capacity=128, streams=4, global_batch=4, window=4, max_too_long=1.0)


@pytest.fixture(scope="module")
def order(data: DataConfig) -> list[str]:
    return [digest(pack.input_ids[None]) for pack in PackLoader(data)]


def host(
    data: DataConfig,
    directory: Path,
    steps: int,
    size: int = 1,
    *,
    killed: int = 0,
    failed: bool = False,
    **changes: Any,
) -> str:
    """Train in `size` processes with a checkpoint after every two steps; return the error output.

    `changes` replace keys of the example's YAML file, with a double underscore for a dot.
    """
    directory.mkdir(exist_ok=True)
    for old in directory.glob("batches-*"):
        old.unlink()
    write_data_table(data, directory / "run.toml")
    config = yaml.safe_load((ROOT / "examples" / "automodel_sft.yaml").read_text())
    defaults = {
        "dist_env__backend": "gloo",
        "model__config__attention_dropout": 0.1,
        "dataset__config": str(directory / "run.toml"),
        "step_scheduler__global_batch_size": 4,
        "step_scheduler__max_steps": steps,
        "step_scheduler__ckpt_every_steps": 2,
        "checkpoint__checkpoint_dir": str(directory / "checkpoints"),
    }
    for name, value in (defaults | changes).items():
        *parents, key = name.split("__")
        section = config
        for parent in parents:
            section = section[parent]
        section[key] = value
    (directory / "run.yaml").write_text(yaml.safe_dump(config))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]),
        "AUTOMODEL_RECORD": str(directory / "batches-"),
        "AUTOMODEL_KILL": str(killed),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [*launch, str(HOST), str(directory / "run.yaml")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert (ended.returncode != 0) == bool(killed or failed), ended.stderr[-3000:]
    return ended.stderr


def batches(directory: Path) -> list[dict[str, Any]]:
    """The batches of all processes in the order of the run."""
    files = sorted(directory.glob("batches-*"))
    return list(chain(*zip(*([json.loads(line) for line in file.open()] for file in files), strict=True)))


def losses(directory: Path) -> list[float]:
    """The loss of each step of the last start, over all processes."""
    sums: dict[int, float] = {}
    for batch in batches(directory):
        sums[batch["step"]] = sums.get(batch["step"], 0.0) + batch["loss"]
    return list(sums.values())


def weights(directory: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of optimizer and model in a checkpoint; Automodel counts steps from 0."""
    from safetensors.torch import load_file

    checkpoint = directory / "checkpoints" / f"epoch_0_step_{step - 1}"
    dcp_to_torch_save(checkpoint / "optim", directory / "optim.pt")
    tensors = dict(_tensors("optim", torch.load(directory / "optim.pt", weights_only=False)))
    for file in (checkpoint / "model").glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from _tensors(f"{name}.{key}", inner)


def test_a_killed_run_resumes_with_the_same_bits(data: DataConfig, order: list[str], tmp_path: Path) -> None:
    host(data, tmp_path / "whole", 6)
    whole = batches(tmp_path / "whole")
    assert [batch["ids"] for batch in whole] == order[: 6 * 4]
    host(data, tmp_path / "killed", 6, killed=2 * 4 + 3)  # inside the third step, after a checkpoint at the second
    host(data, tmp_path / "killed", 6)
    resumed = batches(tmp_path / "killed")
    assert [(b["step"], b["ids"], b["loss"]) for b in resumed] == [(b["step"], b["ids"], b["loss"]) for b in whole[8:]]
    expected, found = weights(tmp_path / "whole", 6), weights(tmp_path / "killed", 6)
    assert any("exp_avg" in name for name in expected)
    assert any("q_proj" in name and not name.startswith("optim") for name in expected)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_another_number_of_processes_gets_the_same_global_batches_and_losses(
    data: DataConfig, order: list[str], tmp_path: Path
) -> None:
    float32 = {name: "torch.float32" for name in ("param_dtype", "reduce_dtype", "output_dtype")}
    policy = {"_target_": "torch.distributed.fsdp.MixedPrecisionPolicy", **float32}  # default: bfloat16 if sharded
    exact = {"model__config__attention_dropout": 0.0, "distributed__mp_policy": policy}
    host(data, tmp_path / "whole", 6, **exact)
    expected = losses(tmp_path / "whole")
    for size, steps in ((1, 2), (2, 4), (1, 6)):  # Automodel draws initial weights by rank
        host(data, tmp_path / "moved", steps, size, **exact)
        assert [batch["ids"] for batch in batches(tmp_path / "moved")] == order[(steps - 2) * 4 : steps * 4]
        # Sums are computed in another order.
        assert losses(tmp_path / "moved") == pytest.approx(expected[steps - 2 : steps], rel=1e-5)


def test_all_processes_save_and_stop_at_the_end_of_the_data(tokenizer: str, tmp_path: Path) -> None:
    corpus = tiny.write_jsonl(tmp_path / "few.jsonl", tiny.rows(20))
    few = tiny.data_config(tokenizer, corpus, capacity=128, global_batch=4, window=2, epochs=1, max_too_long=1.0)
    host(few, tmp_path / "out", 100, 2, step_scheduler__ckpt_every_steps=50)
    expected = [digest(pack.input_ids[None]) for pack in PackLoader(few)]
    assert [batch["ids"] for batch in batches(tmp_path / "out")] == expected
    saved = [path.name for path in (tmp_path / "out" / "checkpoints").glob("epoch_*")]
    assert saved == [f"epoch_0_step_{len(expected) // 4 - 1}"]
    host(few, tmp_path / "out", 100, 2, step_scheduler__ckpt_every_steps=50)
    assert not list((tmp_path / "out").glob("batches-*"))


def test_a_model_that_lets_conversations_see_each_other_is_refused(data: DataConfig, tmp_path: Path) -> None:
    error = host(data, tmp_path / "out", 2, failed=True, model__config__use_cache=True)
    assert "conversations of a pack see each other in LlamaForCausalLM" in error
    assert "set use_cache=False" in error
    assert not list((tmp_path / "out").glob("batches-*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataloader__batch_size": 1}, "dataloader.batch_size = 1, but a pack is a whole batch; set it to null"),
        (
            {"step_scheduler__global_batch_size": 8},
            "a step would be 8 packs on each rank, but data.global_batch = 4 is 4; set step_scheduler.global_batch_size: 4",
        ),
        (
            {"recipe___target_": "nemo_automodel.recipes.llm.train_ft.TrainFinetuneRecipeForNextTokenPrediction"},
            "Packs needs its recipe, which saves the state of the data; set recipe._target_ to sftstream",
        ),
    ],
)
def test_settings_that_would_change_the_data_are_refused(
    data: DataConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in host(data, tmp_path / "out", 2, failed=True, **changes)
