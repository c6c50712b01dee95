"""torchtitan gets the packs of the run from a data loader, and resumes exactly after a kill."""

from __future__ import annotations

import importlib.util
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
from hosts import digest, write_data_table
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from sftstream import DataConfig, PackLoader

ROOT = Path(__file__).resolve().parents[2]
HOST = Path(__file__).with_name("titan_host.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed"),
]


@pytest.fixture(scope="module")
def data(tokenizer: str, corpus_path: str) -> DataConfig:
    return tiny.data_config(tokenizer, corpus_path, capacity=128, streams=4, global_batch=4, window=4, max_too_long=1.0)


@pytest.fixture(scope="module")
def order(data: DataConfig) -> list[str]:
    return [digest(pack.input_ids[None]) for pack in PackLoader(data)]


def host(data: DataConfig, directory: Path, steps: int, size: int = 1, killed: int = 0) -> str:
    """Train in `size` processes with a checkpoint after every two steps; return the error output."""
    directory.mkdir(exist_ok=True)
    for old in directory.glob("batches-*"):
        old.unlink()
    run = directory / "run.toml"
    write_data_table(data, run)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TITAN_RECORD": str(directory / "batches-"),
        "TITAN_KILL": str(killed),
    }
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), str(HOST)),
        *("--module", "titan_host", "--config", "chats", "--training.steps", str(steps), "--training.seq_len", "128"),
        *("--training.global_batch_size", "4", "--checkpoint.interval", "2", "--dump_folder", str(directory)),
        *("--dataloader.dataset", str(run)),
        # The default, spmd_types, needs fully_shard of torch 2.14 on several ranks.
        *("--parallelism.spmd_backend", "partial_dtensor"),
    ]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert (ended.returncode != 0) == bool(killed), ended.stderr[-3000:]
    return ended.stderr


def batches(directory: Path) -> list[dict[str, object]]:
    """The batches of all processes in the order of the run."""
    files = sorted(directory.glob("batches-*"))
    return list(chain(*zip(*([json.loads(line) for line in file.open()] for file in files), strict=True)))


def weights(directory: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint of torchtitan: weights and optimizer."""
    dcp_to_torch_save(directory / "checkpoint" / f"step-{step}", directory / "whole.pt")
    return dict(_tensors("", torch.load(directory / "whole.pt", weights_only=False)))


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from _tensors(f"{name}.{key}", inner)


def test_a_killed_run_resumes_with_the_same_bits(data: DataConfig, order: list[str], tmp_path: Path) -> None:
    host(data, tmp_path / "whole", 6)
    whole = batches(tmp_path / "whole")
    assert [batch["ids"] for batch in whole] == order[: 6 * 4]
    host(data, tmp_path / "killed", 6, 1, 2 * 4 + 3)  # inside the third step, after a checkpoint at the second
    host(data, tmp_path / "killed", 6)
    resumed = batches(tmp_path / "killed")
    assert [(b["ids"], b["loss"]) for b in resumed] == [(b["ids"], b["loss"]) for b in whole[-4 * 4 :]]
    expected, found = weights(tmp_path / "whole", 6), weights(tmp_path / "killed", 6)
    assert any("exp_avg" in name for name in expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_another_number_of_processes_gets_the_same_global_batches(
    data: DataConfig, order: list[str], tmp_path: Path
) -> None:
    for size, steps in ((2, 2), (1, 4), (2, 6)):
        host(data, tmp_path, steps, size)
        assert [batch["ids"] for batch in batches(tmp_path)] == order[(steps - 2) * 4 : steps * 4]


def test_all_processes_stop_at_the_end_of_the_data(tokenizer: str, tmp_path: Path) -> None:
    corpus = tiny.write_jsonl(tmp_path / "few.jsonl", tiny.rows(20))
    few = tiny.data_config(tokenizer, corpus, capacity=128, global_batch=4, window=2, epochs=1, max_too_long=1.0)
    host(few, tmp_path / "out", 100, 2)
    expected = [digest(pack.input_ids[None]) for pack in PackLoader(few)]
    assert [batch["ids"] for batch in batches(tmp_path / "out")] == expected


def test_another_length_is_refused_with_both_numbers(data: DataConfig, tmp_path: Path) -> None:
    from sftstream.integrations.titan_data import PackDataLoader

    (tmp_path / "run.toml").write_text(
        f'[data]\nsources = [{{ path = "a" }}]\ntokenizer = {{ path = "b" }}\ncapacity = {data.capacity}\n'
    )
    settings = PackDataLoader.Config(dataset=str(tmp_path / "run.toml"))
    with pytest.raises(ValueError, match=r"training.seq_len = 64, but data.capacity = 128"):
        PackDataLoader(settings, dp_world_size=1, dp_rank=0, seq_len=64, local_batch_size=1)
    with pytest.raises(ValueError, match=r"set training.global_batch_size=64"):
        PackDataLoader(settings, dp_world_size=3, dp_rank=0, seq_len=128, local_batch_size=1)
