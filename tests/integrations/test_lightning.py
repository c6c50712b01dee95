"""Lightning gets the packs of the run from a data module, and resumes exactly after a kill."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import msgspec
import pytest
import tiny
import torch
from hosts import digest

from sftstream import DataConfig, PackLoader

ROOT = Path(__file__).resolve().parents[2]
HOST = Path(__file__).with_name("lightning_host.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed"),
]


@pytest.fixture(scope="module")
def data(tokenizer: str, corpus_path: str) -> DataConfig:
    return tiny.data_config(tokenizer, corpus_path, capacity=128, streams=4, global_batch=4, window=4, max_too_long=1.0)


@pytest.fixture(scope="module")
def order(data: DataConfig) -> list[str]:
    return [digest(pack.input_ids[None]) for pack in PackLoader(data)]


def host(data: DataConfig, directory: Path, steps: int, size: int = 1, killed: int = 0) -> str:
    """Train in `size` processes; return the error output."""
    directory.mkdir(exist_ok=True)
    for old in directory.glob("batches-*"):
        old.unlink()
    config = directory / "config.json"
    config.write_bytes(msgspec.json.encode(data))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    words = [str(HOST), str(config), str(directory), str(steps), *([str(killed)] if killed else [])]
    command = [sys.executable, *torchrun, *words]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=600
    )
    expected = 0 if not killed else -signal.SIGKILL if size == 1 else 1
    assert ended.returncode == expected, ended.stderr[-3000:]
    return ended.stderr


def batches(directory: Path) -> list[dict[str, object]]:
    """The batches of all processes in the order of the run."""
    files = sorted(directory.glob("batches-*.jsonl"))
    return list(chain(*zip(*([json.loads(line) for line in file.open()] for file in files), strict=True)))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(directory / "weights.pt", weights_only=True)
    return found


def test_a_killed_run_resumes_with_the_same_bits(data: DataConfig, order: list[str], tmp_path: Path) -> None:
    host(data, tmp_path / "whole", 6)
    whole = batches(tmp_path / "whole")
    assert [batch["ids"] for batch in whole] == order[: 6 * 4]
    host(data, tmp_path / "killed", 6, killed=2 * 4 + 3)  # inside the third step, after a checkpoint at the second
    host(data, tmp_path / "killed", 6, killed=2 * 4)  # at the end of the fourth step, before its checkpoint
    host(data, tmp_path / "killed", 6)
    resumed = batches(tmp_path / "killed")
    assert [(b["ids"], b["loss"]) for b in resumed] == [(b["ids"], b["loss"]) for b in whole[-len(resumed) :]]
    assert len(resumed) == 4 * 4
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(tmp_path / "killed").items())


def test_another_number_of_processes_gets_the_same_global_batches(
    data: DataConfig, order: list[str], tmp_path: Path
) -> None:
    host(data, tmp_path / "whole", 8)
    for size, steps in ((2, 2), (1, 4), (4, 6), (2, 8)):
        host(data, tmp_path / "moved", steps, size)
        ids = [batch["ids"] for batch in batches(tmp_path / "moved")]
        assert ids == order[(steps - 2) * 4 : steps * 4]
    expected = weights(tmp_path / "whole")  # sums over processes are rounded in another order
    for name, weight in weights(tmp_path / "moved").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)


def test_all_processes_stop_at_the_end_of_the_data(tokenizer: str, tmp_path: Path) -> None:
    corpus = tiny.write_jsonl(tmp_path / "few.jsonl", tiny.rows(10))
    few = tiny.data_config(tokenizer, corpus, capacity=128, global_batch=2, window=2, epochs=1, max_too_long=1.0)
    host(few, tmp_path / "out", 100, 2)
    assert [batch["ids"] for batch in batches(tmp_path / "out")] == [digest(p.input_ids[None]) for p in PackLoader(few)]


def test_another_global_batch_is_refused_with_the_remedy(data: DataConfig) -> None:
    from lightning.pytorch import Trainer

    from sftstream.integrations.lightning_data import PackDataModule

    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    for settings, remedy in (
        ({"accumulate_grad_batches": 3, "max_epochs": 1}, "set accumulate_grad_batches=4"),
        ({"accumulate_grad_batches": 4, "max_epochs": 2}, "set max_epochs=1"),
    ):
        module = PackDataModule(data)
        module.trainer = Trainer(**settings, **quiet)
        with pytest.raises(ValueError, match=remedy):
            module.setup("fit")
