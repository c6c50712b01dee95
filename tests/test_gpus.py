"""What several GPUs decide: tensor and data parallelism over NCCL. Skipped where there are not so many."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
from runs import run_config
from test_kill import compare
from tiny_llama import public_llama

GPUS = torch.cuda.device_count()
TOPOLOGIES = [(dp, tp) for dp, tp in ((2, 1), (1, 2), (2, 2), (4, 1), (1, 4)) if dp * tp <= GPUS]
"""Those for which there are GPUs."""
WEIGHTS = {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
ROUNDING = 0.01
"""Relative, of losses computed in bfloat16 whose sums are made in another order."""

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="torch sees no two GPUs here")]
each_topology = pytest.mark.parametrize(("dp", "tp"), TOPOLOGIES)


@each_topology
def test_kills_leave_no_trace_on_several_gpus(dp: int, tp: int, tmp_path: Path, tokenizer: str) -> None:
    config = run_config(
        tokenizer,
        runs.sources(tmp_path),
        run={"device": "cuda", "steps": 16},
        data={"workers": 1},
        parallel={"tp": tp},
        model=_model(),
    )
    compare(tmp_path, config, processes=dp * tp, draw=random.Random(dp), kills=2)


def test_a_run_goes_on_with_the_same_global_batches_on_other_numbers_of_gpus(tmp_path: Path, tokenizer: str) -> None:
    config = run_config(tokenizer, runs.sources(tmp_path), run={"device": "cuda", "steps": 12}, model=_model())
    straight, hopping = tmp_path / "straight", tmp_path / "hopping"
    straight.mkdir()
    hopping.mkdir()
    runs.run(straight, config)
    for part, (dp, tp) in enumerate([(1, 1), *TOPOLOGIES], 1):
        steps = 12 * part // (len(TOPOLOGIES) + 1)
        tables = config | {"run": config["run"] | {"steps": steps}, "parallel": {"tp": tp}}
        runs.run(hopping, tables, processes=dp * tp)
    assert runs.digests(hopping) == runs.digests(straight)
    losses = [[line["loss"] for line in runs.metrics(directory)] for directory in (hopping, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=ROUNDING)


@each_topology
def test_a_model_on_several_gpus_is_that_of_transformers(dp: int, tp: int, tmp_path: Path) -> None:
    public_llama(**WEIGHTS).save_pretrained(tmp_path)
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", str(dp * tp)]
    command = [sys.executable, *ranks, "-m", "trainer.parity", str(tmp_path), "--device=cuda", f"--tp={tp}"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "torch.bfloat16" in result.stdout


def _model() -> dict[str, int]:
    """Large enough for attention on a GPU, and for four ranks."""
    return {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
