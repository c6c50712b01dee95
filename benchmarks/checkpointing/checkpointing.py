"""Measure the cost of safety: save and load against plain safetensors with fsync, and the wait for
a background save.

    python benchmarks/checkpointing/checkpointing.py [--gib 2] [--rounds 5] [--ranks 1 2]
        [--device cpu] [--directory DIRECTORY]

Both sides write and read equal tensors, a fixed number of bytes per rank, with fsync; ours also
hashes every byte, commits, and verifies before loading. Sides take turns; prints medians and minima
of seconds and the ratios of both. Files are read twice: with an empty page cache ("cold"), as after
a restart on another machine, and with everything cached ("warm").
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from checkpoints import CheckpointStore, Retention

ROW = 4096
"""Rows and columns of a tensor, like a matrix of a small language model."""


class Rank:
    """One process, its share of the tensors, and both ways to save and load."""

    def __init__(self, directory: Path, gib: float, device: str) -> None:
        self.directory = directory
        self.index = dist.get_rank()
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        count = max(1, round(gib * 2**30 / (4 * ROW * ROW)))
        self.state: dict[str, Any] = {
            f"layer{n}": distribute_tensor(torch.randn(ROW, ROW, device=device), mesh, [Shard(0)]) for n in range(count)
        }
        self.local = {name: tensor.to_local() for name, tensor in self.state.items()}
        self.store = CheckpointStore(directory / "ours", Retention(keep=1))
        self.step = 0

    def save(self) -> None:
        """Save by `CheckpointStore`: hashed, fsynced, committed on all ranks."""
        self.step += 1
        self.store.save(self.step, self.state)

    def plain_save(self) -> None:
        """Save equal bytes by safetensors, a file per rank under a new name, with fsync; delete
        older files."""
        self.step += 1
        path = self.directory / f"plain-{self.step}-{self.index}"
        save_file({name: tensor.cpu() for name, tensor in self.local.items()}, path)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        dist.barrier()
        for old in self.directory.glob(f"plain-*-{self.index}"):
            if old != path:
                old.unlink()

    def forget(self) -> None:
        """Drop the files from the page cache."""
        for path in self.directory.glob("**/*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

    def load(self) -> None:
        """Load by `CheckpointStore`: verify, then read into the existing tensors."""
        step = self.store.latest()
        assert step is not None
        self.store.load(step, self.state)

    def plain_load(self) -> None:
        """Load by safetensors into the existing tensors."""
        (path,) = self.directory.glob(f"plain-*-{self.index}")
        for name, tensor in load_file(path).items():
            self.local[name].copy_(tensor)

    def copy(self) -> None:
        """Copy from the device to existing host memory, pinned for a GPU."""
        for name, tensor in self.local.items():
            self.buffers[name].copy_(tensor, non_blocking=True)
        self._wait()

    def stall(self) -> None:
        """Start a background save after the previous one is done; a step waits for this call."""
        self.step += 1
        self.store.save_later(self.step, self.state)

    def prepare_copies(self) -> None:
        """Run both sides once, to allocate the host memory kept between saves."""
        pin = next(iter(self.local.values())).is_cuda
        self.buffers = {name: torch.empty_like(t, device="cpu", pin_memory=pin) for name, t in self.local.items()}
        self.copy()
        self.stall()
        self.store.wait()

    def _wait(self) -> None:
        if next(iter(self.local.values())).is_cuda:
            torch.cuda.synchronize()


def seconds(work: Callable[[], None]) -> float:
    """Return the seconds until the last rank is done."""
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


def measure(index: int, ranks: int, meeting: str, options: argparse.Namespace, results: Any) -> None:
    """Measure on one rank; rank 0 puts medians and minima into `results`."""
    torch.set_num_threads(1)
    if options.device == "cuda":
        torch.cuda.set_device(index)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo",
        init_method=f"file://{meeting}/store",
        rank=index,
        world_size=ranks,
    )
    rank = Rank(Path(meeting), options.gib, options.device)
    taken: dict[str, list[float]] = {}

    def turns(*works: Callable[[], None], kind: str = "", before: Callable[[], None] = lambda: None) -> None:
        for _ in range(options.rounds):
            for work in works:
                before()
                taken.setdefault(work.__name__ + kind, []).append(seconds(work))

    turns(rank.save, rank.plain_save)
    turns(rank.load, rank.plain_load, kind=" cold", before=rank.forget)
    turns(rank.load, rank.plain_load, kind=" warm")
    rank.prepare_copies()
    turns(rank.copy, rank.stall, before=rank.store.wait)
    if index == 0:
        results.put({name: (statistics.median(values), min(values)) for name, values in taken.items()})
    rank.store.close()
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=2.0, help="of all ranks together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--directory", default=None, help="on the disk to be measured")
    options = parser.parse_args()
    rows = []
    for ranks in options.ranks:
        meeting = tempfile.mkdtemp(dir=options.directory)
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(measure, (ranks, meeting, options, results), ranks)
        rows.append((ranks, results.get()))
        shutil.rmtree(meeting)
    print(f"{options.gib} GiB, {options.device}, torch {torch.__version__}\n")
    for title, ours, theirs in (
        ("save", "save", "plain_save"),
        ("load, cold", "load cold", "plain_load cold"),
        ("load, warm", "load warm", "plain_load warm"),
        ("stall of a save in the background, against the copy", "stall", "copy"),
    ):
        for ranks, taken in rows:
            (a, fastest), (b, their_fastest) = taken[ours], taken[theirs]
            print(
                f"| {title} | {ranks} | {a:.2f} s | {b:.2f} s | {a / b:.2f} "
                f"| {fastest:.2f} s | {their_fastest:.2f} s | {fastest / their_fastest:.2f} |"
            )


if __name__ == "__main__":
    main()
