"""Tensor and data parallelism over NCCL. Skipped without enough GPUs."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
import torch.distributed as dist
from _pytest.mark import ParameterSet
from gloo_ranks import processes as server
from gloo_ranks import run_ranks
from replica_sums import DTYPES, assert_exact, summed
from runs import run_config
from test_kill import compare
from test_lost_ranks import error_line
from tiny_llama import public_llama

from checkpoints import CheckpointStore
from trainer.distributed.mesh import ParallelConfig, distributed
from trainer.distributed.watch import Watch

GPUS = torch.cuda.device_count()
TOPOLOGIES = ((2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (8, 1), (4, 2), (2, 4))
"""Data-parallel and tensor-parallel sizes."""
HOPS = ((8, 1), (2, 2), (2, 1), (1, 1), (2, 4), (4, 1), (1, 2), (1, 4))
"""Topologies of one run, in turn."""
NUMBERS = [2**power for power in range(10, 28, 3)]
"""Elements per rank, 4 KB to 128 MB in float32, since NCCL picks its algorithm by size."""
WEIGHTS = {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
ROUNDING = 0.002
"""Relative tolerance of bfloat16 losses after sums in another order."""
ABORTED = re.compile("Traceback|terminate called|Watchdog caught|core dumped")
"""Words of an end that is not the run's own."""

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="torch sees no two GPUs here")]


def on_enough_gpus(dp: int, tp: int, *more: int) -> ParameterSet:
    enough = pytest.mark.skipif(dp * tp > GPUS, reason=f"torch sees no {dp * tp} GPUs here")
    return pytest.param(dp, tp, *more, marks=enough)


@pytest.mark.parametrize(
    ("dp", "tp", "replicas"),
    [on_enough_gpus(dp, tp, replicas) for dp, tp in TOPOLOGIES for replicas in sorted({1, dp})],
)
def test_kills_leave_no_trace_on_several_gpus(dp: int, tp: int, replicas: int, tmp_path: Path, tokenizer: str) -> None:
    config = run_config(
        tokenizer,
        runs.sources(tmp_path),
        run={"device": "cuda", "steps": 16},
        data={"workers": 1},
        parallel={"tp": tp, "replicas": replicas},
        model=_model(),
    )
    compare(tmp_path, config, processes=dp * tp, draw=random.Random(dp), kills=2)


def test_other_numbers_of_gpus_take_the_same_global_batches(tmp_path: Path, tokenizer: str) -> None:
    hops = [(dp, tp) for dp, tp in HOPS if dp * tp <= GPUS]
    run = {"device": "cuda", "steps": 2 * len(hops)}
    # A low rate, since rounding errors grow from step to step at a high rate.
    config = run_config(tokenizer, runs.sources(tmp_path), run=run, model=_model(), optimizer={"learning_rate": 1e-3})
    straight, hopping = tmp_path / "straight", tmp_path / "hopping"
    straight.mkdir()
    hopping.mkdir()
    runs.run(straight, config)
    for number, (dp, tp) in enumerate(hops, 1):
        parallel = {"tp": tp, "replicas": 1 if number % 2 else dp}  # sharded and not, in turn
        tables = config | {"run": config["run"] | {"steps": 2 * number}, "parallel": parallel}
        runs.run(hopping, tables, processes=dp * tp)
    assert runs.digests(hopping) == runs.digests(straight)
    losses = [[line["loss"] for line in runs.metrics(directory)] for directory in (hopping, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=ROUNDING)


def test_sums_over_gpus_have_the_same_bits_each_time() -> None:
    first, again = (run_ranks(GPUS, _sums) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_sums_over_replicas_on_gpus_are_float32_sums_rounded_once(given: torch.dtype, wanted: torch.dtype) -> None:
    assert_exact(run_ranks(GPUS, _summed, given, wanted), given, wanted)


@pytest.mark.parametrize(("dp", "tp"), [on_enough_gpus(*topology) for topology in TOPOLOGIES])
def test_a_model_on_several_gpus_equals_transformers(dp: int, tp: int, tmp_path: Path) -> None:
    public_llama(**WEIGHTS).save_pretrained(tmp_path)
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(dp * tp)]
    command = [sys.executable, *ranks, "-m", "trainer.parity", str(tmp_path), "--device=cuda", f"--tp={tp}"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "torch.bfloat16" in result.stdout


@pytest.mark.parametrize("stopped", [0, 1])
def test_nccl_without_an_answer_is_one_line_with_rank_step_and_work(stopped: int, tmp_path: Path) -> None:
    port = runs.free_port()
    ranks = [server.Process(target=_one_stops, args=(tmp_path, rank, stopped, port)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    waiting = ranks[1 - stopped]
    waiting.join(120)
    code = waiting.exitcode
    for rank in ranks:
        rank.kill()
    printed = (tmp_path / f"rank{1 - stopped}.log").read_text()
    # NCCL may print a warning, since the store of a stopped rank 0 does not answer.
    assert [line for line in printed.splitlines() if line.startswith("error: ")] == [
        f"error: rank {1 - stopped}, step 7: the sum of all ranks did not arrive within 20 s; a rank is stopped or hangs: "
        "look at ranks that print no such line, or raise parallel.timeout for slower work"
    ], printed
    assert not ABORTED.search(printed), printed
    assert code == 1


@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_stopped_rank_ends_a_run_on_gpus_with_rank_step_and_work(
    stopped: int, tp: int, tmp_path: Path, tokenizer: str
) -> None:
    config = run_config(
        tokenizer,
        runs.sources(tmp_path),
        # No compiler may take longer than the limit within a step.
        run={"device": "cuda", "steps": 100_000, "compile": False, "attention": "sdpa"},
        parallel={"tp": tp, "timeout": "20s"},
        model=_model(),
    )
    job = runs.Job(tmp_path, config, 2)
    store = CheckpointStore(tmp_path / "runs/run/checkpoints")
    runs.wait_for(lambda: store.steps() != [], job)
    assert store.steps(), [job.output(rank) for rank in range(2)]
    job.signal(signal.SIGSTOP, stopped)
    line = error_line(job, 1 - stopped)
    job.kill()
    words = rf"error: (rank {1 - stopped}, step \d+: the [a-z ]+ did not arrive|saving step \d+: a rank has ended)"
    assert re.match(words, line), line
    assert not ABORTED.search(job.output(1 - stopped))


def _one_stops(directory: Path, rank: int, stopped: int, port: int) -> None:
    """Add up ones over two ranks. Rank `stopped` stops before the second sum."""
    log = os.open(directory / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update(address | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    with distributed("cuda", ParallelConfig(timeout="20s")) as topology, Watch(20) as watch:
        ones = torch.ones(1, device=topology.device)
        dist.all_reduce(ones, group=topology.mesh["dp"].get_group())
        assert ones.item() == 2
        if rank == stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        with watch.waiting_for(7, "the sum of all ranks"):
            dist.all_reduce(ones, group=topology.mesh["dp"].get_group())
            ones.item()


def _summed(rank: int, given: torch.dtype, wanted: torch.dtype) -> list[torch.Tensor]:
    torch.cuda.set_device(rank)
    return summed(dist.new_group(backend="nccl"), given, wanted, device="cuda")


def _model() -> dict[str, int]:
    """Return a shape that is large enough for GPU attention and for four ranks."""
    return {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }


def _sums(rank: int) -> list[str]:
    """Return hashes of the ranks' summed random numbers, by reduce-scatter and by all-reduce."""
    torch.cuda.set_device(rank)
    group, draw = dist.new_group(backend="nccl"), torch.Generator("cuda").manual_seed(rank)
    found = []
    for numbers in NUMBERS:
        for dtype in (torch.float32, torch.bfloat16):
            mine = torch.randn(numbers * GPUS, device="cuda", generator=draw).to(dtype)
            share = mine.new_empty(numbers)
            dist.reduce_scatter_tensor(share, mine, group=group)
            dist.all_reduce(mine, group=group)
            found += [hashlib.sha256(total.cpu().view(torch.uint8).numpy()).hexdigest() for total in (share, mine)]
    return found
