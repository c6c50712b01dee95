"""Measure the speed of a training step over the GPUs of this machine, as rows of a Markdown table.

    python benchmarks/gpu/scaling.py [--gpus N] [--shapes 1b 8b] [--steps 12] [--accumulate 1]
        [--equal] [--peers hf-liger trl-liger]

For each shape: one GPU, data parallelism and tensor parallelism over 2, 4, ... GPUs, both together
over all, and sharded weights, LoRA and the peers of `train_step.py` with data parallelism over all.
The work of a rank is that of `train_step.py`. Measurements that need fewer GPUs run side by side on
different GPUs. "Of one GPU" is the speed of a GPU relative to the same system on one GPU, "planned"
the estimate of `--plan`.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from step_job import SIZES, Job, Result, sizes
from step_ours import trainer_config
from train_step import SYSTEMS, row, run, versions

from trainer.llama.config import LlamaConfig
from trainer.memory import memory

CAPACITY = {"1b": 16384, "8b": 8192, "70b": 8192, "tiny": 256}
RECOMPUTE = {"70b": "full"}
OURS, SHARDED, ADAPTERS = "ours-bf16", "ours-bf16-sharded", "ours-lora"
HEADER = (
    "| shape | system | ranks | attention | tokens/s a GPU | ms a step | MFU | peak GiB | of one GPU | planned GiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def divisions(gpus: int) -> list[tuple[int, int]]:
    """Return data-parallel and tensor-parallel sizes.

    Example: 4 GPUs give (1, 1), (2, 1), (4, 1), (1, 2), (1, 4) and (2, 2).
    """
    powers = [2**n for n in range(1, gpus.bit_length()) if 2**n <= gpus]
    found = [(1, 1), *((n, 1) for n in powers), *((1, n) for n in powers)]
    return [*found, (gpus // 2, 2)] if gpus >= 4 else found


def jobs(
    shape: str, gpus: int, steps: int, attention: str, peers: list[str], accumulate: int, equal: bool
) -> Iterator[Job]:
    """Yield the jobs of a shape, each system on one GPU first."""
    alone = shape != "70b"  # whose state fits no single GPU
    for system, spread in (
        (OURS, divisions(gpus)),
        (SHARDED, [(gpus, 1)]),
        (ADAPTERS, [(1, 1), (gpus, 1)]),
        *((peer, [(1, 1), (gpus, 1)]) for peer in peers),
    ):
        for dp, tp in dict.fromkeys(spread):
            if alone or dp * tp == gpus:
                way = RECOMPUTE.get(shape, "none")
                yield Job(system, shape, None, CAPACITY[shape], steps, attention, way, dp, tp, accumulate, equal)


class Gpus:
    """The GPUs of the machine, each used by one job at a time."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._changed = threading.Condition()

    def take(self, count: int) -> list[int]:
        """Return `count` GPUs once they are free."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) >= count)
            return [self._free.pop() for _ in range(count)]

    def give_back(self, taken: list[int]) -> None:
        """Free GPUs."""
        with self._changed:
            self._free.extend(taken)
            self._changed.notify_all()


def measure(work: list[Job], count: int) -> Iterator[tuple[Job, Result | str]]:
    """Run all jobs, side by side where GPUs are free; yield the results in order."""
    gpus = Gpus(count)

    def measured(job: Job) -> Result | str:
        taken = gpus.take(job.dp * job.tp)
        try:
            return run(job, taken)
        finally:
            gpus.give_back(taken)

    with ThreadPoolExecutor(len(work)) as pool:
        yield from zip(work, pool.map(measured, work), strict=True)


def planned(job: Job) -> float | None:
    """Return the estimate of `--plan` in GiB, None for a peer."""
    if not job.system.startswith("ours"):
        return None
    parts = memory(trainer_config(job), LlamaConfig(**sizes(job.shape)), job.dp * job.tp)
    return sum(parts.values()) / 2**30


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--shapes", nargs="+", choices=list(SIZES), default=["1b", "8b"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--attention", default="flash_attention_4", help="the peers' kernel")
    parser.add_argument("--accumulate", type=int, default=1, help="packs of a step on a rank; the peers take 1")
    parser.add_argument("--equal", action="store_true", help="all ranks train on the same packs")
    parser.add_argument("--peers", nargs="*", choices=list(SYSTEMS), default=["hf-liger", "trl-liger"])
    arguments = parser.parse_args()
    work = [
        job
        for shape in arguments.shapes
        for job in jobs(
            shape,
            arguments.gpus,
            arguments.steps,
            arguments.attention,
            arguments.peers,
            arguments.accumulate,
            arguments.equal,
        )
    ]
    print(f"{versions()}\n\n{HEADER}", flush=True)
    alone: dict[tuple[str, str], float] = {}
    for job, result in measure(work, arguments.gpus):
        share, plan = "", planned(job)
        if not isinstance(result, str):
            seconds = result.seconds * job.tp
            if job.dp * job.tp == 1:
                alone[job.shape, job.system] = seconds
            if first := alone.get((job.shape, OURS if job.system == SHARDED else job.system)):
                share = f"{first / seconds:.2f}"
        print(f"| {job.shape} {row(job, result)} {share} | {'' if plan is None else f'{plan:.1f}'} |", flush=True)


if __name__ == "__main__":
    main()
