"""Processes, devices and who is who among them."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Never

import msgspec
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sftstream import Shard

logger = logging.getLogger(__name__)


class ParallelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[parallel]` table: how ranks share the work. Data parallelism is what tensor parallelism leaves."""

    tp: int = 1
    """Ranks that share each layer."""
    replicas: int = 1
    """Groups of ranks that each hold a whole model between them, one or more nodes each: weights are gathered inside a
    group, and only gradients cross the network between groups."""
    reshard_after_forward: bool = True
    """Let go of a layer's gathered weights after its forward pass, and gather them again for the backward pass. False
    keeps them gathered until the step's last backward pass: more memory, less traffic."""
    reduce_gradients: Literal["step", "pack"] = "step"
    """When ranks add up their gradients: once a step, for which each holds all gradients of its share of the layers, or
    after each pack, for which it holds its shard of them."""

    def __post_init__(self) -> None:
        for name in ("tp", "replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Topology:
    """This rank's place: data-parallel coordinate `dp`, and `tp` within the ranks that share its layers."""

    mesh: DeviceMesh
    device: torch.device
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def dp(self) -> int:
        """Data-parallel coordinates."""
        return self.mesh["dp"].size()

    @property
    def tp(self) -> int:
        """Ranks of one data-parallel coordinate."""
        return self.mesh["tp"].size()

    @property
    def sizes(self) -> dict[str, int]:
        """What tells this topology from another."""
        return {"dp": self.dp, "tp": self.tp, "replicas": self.parallel.replicas}

    @property
    def shard(self) -> Shard:
        """What this rank's data-parallel coordinate reads."""
        return Shard(self.mesh["dp"].get_local_rank(), self.dp)

    @property
    def leads(self) -> bool:
        """This rank reads for the others of its coordinate."""
        return self.mesh.get_local_rank("tp") == 0

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        """The ranks that get the same packs, of which one reads; None where each reads its own."""
        return self.mesh["tp"].get_group() if self.tp > 1 else None

    @property
    def first(self) -> bool:
        """This rank writes the run's files and talks to people."""
        return dist.get_rank() == 0

    def describe(self) -> str:
        """The topology in words."""
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        replicas = f"{self.parallel.replicas} replicas, " if self.parallel.replicas > 1 else ""
        return f"{dist.get_world_size()} x {kind} ({replicas}dp {self.dp} x tp {self.tp})"


@contextmanager
def distributed(device: str, parallel: ParallelConfig) -> Iterator[Topology]:
    """Join the process group that torchrun announced, or be a group of one; leave it at the end.

    `device` is "cpu", "cuda" or "auto": a GPU where there is one.
    """
    torch_device = _device(device)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}.items():
        os.environ.setdefault(name, value)
    alone = "MASTER_PORT" not in os.environ
    # gloo beside NCCL: counts and packs of a step are agreed on between CPUs, without waiting for the device.
    backend = "cpu:gloo,cuda:nccl" if torch_device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1) if alone else dist.init_process_group(
        backend
    )
    try:
        yield Topology(data_and_tensor_mesh(torch_device.type, parallel), torch_device, parallel)
    finally:
        dist.destroy_process_group()


def _device(kind: str) -> torch.device:
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError('device = "cuda", but torch sees no GPU here; use "cpu" or "auto"')
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def data_and_tensor_mesh(device: str, parallel: ParallelConfig) -> DeviceMesh:
    """All ranks as "dp" x "tp"; with replicas, "dp" is "replicate" x "shard"."""
    world, tp, replicas = dist.get_world_size(), parallel.tp, parallel.replicas
    if world % (tp * replicas):
        what = f"tp = {tp}" if replicas == 1 else f"tp = {tp} x replicas = {replicas}"
        raise ValueError(
            f"{what} does not divide the {world} processes of this run; start a multiple of {tp * replicas}"
        )
    if replicas == 1:
        return init_device_mesh(device, (world // tp, tp), mesh_dim_names=("dp", "tp"))
    mesh = init_device_mesh(
        device, (replicas, world // tp // replicas, tp), mesh_dim_names=("replicate", "shard", "tp")
    )
    mesh["replicate", "shard"]._flatten("dp")
    return mesh


def named_dtype(name: str, device: torch.device) -> torch.dtype:
    """What layers compute in; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return named.get(name, torch.bfloat16 if device.type == "cuda" else torch.float32)


def print_error(error: Exception) -> int:
    """One line, once: what all ranks run into, the first tells, and torchrun then ends the others. Returns the exit code."""
    if int(os.environ.get("RANK", "0")):
        time.sleep(3)
    print(f"error: {error}", file=sys.stderr)  # noqa: T201
    logger.debug("where it was raised", exc_info=error)  # LOGLEVEL=DEBUG shows it
    return 1


def exit_process(code: int) -> Never:
    """End the process.

    gloo's threads outlive their group, and one that lets go of a Python object while the interpreter shuts down aborts the
    process: about one finished run in fifteen would be reported as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
