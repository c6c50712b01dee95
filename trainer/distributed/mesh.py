"""Start and leave the process group, and arrange its ranks in a mesh.

Example: 8 ranks with tp = 2 form 4 data-parallel coordinates (dp) of 2 ranks each. Ranks 0 and 1
are coordinate 0: they hold halves of each layer and train on the same packs; rank 0 reads the packs
for both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Literal

import msgspec
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from checkpoints import CheckpointError, LostRank
from sftstream import Shard, one_line
from trainer.duration import parse_duration


class ParallelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[parallel]` table: the division of model and data over ranks.

    The number of ranks divided by `tp` is the data-parallel size.
    """

    tp: int = 1
    """Tensor-parallel size: ranks that hold parts of each layer and train on the same packs.
    Divides the number of ranks, `num_attention_heads` and `num_key_value_heads`; at most the GPUs
    of a node for speed."""
    replicas: int | Literal["auto"] = "auto"
    """Groups of ranks that each hold a complete model, sharded within the group. Weights are
    gathered within a group; only gradients are exchanged between groups. 1 shards one model over
    all ranks; the data-parallel size shards nothing, and needs the most memory. With several nodes
    and a slow network, use one group per node, or per few nodes. `tp` x `replicas` divides the
    number of ranks. "auto" is the data-parallel size on GPUs with room for it, if `tp` is 1, under
    `[lora]` and for two ranks of bfloat16 weights, and 1 elsewhere; a resume on as many ranks keeps
    the number of its checkpoint."""
    reshard_after_forward: bool | Literal["auto"] = "auto"
    """Free each layer's gathered weights after its forward pass, and gather them again for the
    backward pass. False keeps the gathered weights until the step's last backward pass: more
    memory, less traffic. "auto" is false on GPUs whose memory this fits, before any activation is
    recomputed, and true elsewhere. Changes no bit of the result; without effect if nothing is
    sharded."""
    reduce_gradients: Literal["step", "pack"] = "step"
    """Time of the gradients' reduction over ranks: once per "step" (each rank keeps unsharded
    float32 gradients until then), or after each "pack" (each rank keeps its shard only: less
    memory, more traffic). Without effect if nothing is sharded."""

    timeout: str = "30m"
    """Longest wait for other ranks, such as "30m" or "90s"; then the run ends with a line that
    names rank, step and the work waited for. Give more than the longest validation pass, checkpoint
    or compilation takes."""

    @property
    def groups(self) -> int:
        """`replicas`, with "auto" as 1."""
        return 1 if self.replicas == "auto" else self.replicas

    @property
    def reshards(self) -> bool:
        """`reshard_after_forward`, with "auto" as true."""
        return self.reshard_after_forward is not False

    @property
    def timeout_seconds(self) -> float:
        """Seconds of `timeout`. Raises ValueError for a text of another form."""
        return parse_duration("timeout", self.timeout)

    def __post_init__(self) -> None:
        _ = self.timeout_seconds
        for name, size in (("tp", self.tp), ("replicas", self.groups)):
            if size < 1:
                raise ValueError(f"{name} = {size} must be at least 1")
            if size > 10**6:
                raise ValueError(f"{name} = {size} must be at most {10**6}")


@dataclass(frozen=True)
class Topology:
    """The mesh of all ranks, and the position of this rank in the mesh."""

    mesh: DeviceMesh
    device: torch.device
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @cached_property
    def dp(self) -> int:
        """Number of data-parallel coordinates."""
        return self.mesh["dp"].size()

    @cached_property
    def tp(self) -> int:
        """Number of ranks in a data-parallel coordinate."""
        return self.mesh["tp"].size()

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by name; two topologies are equal if their sizes are."""
        return {"dp": self.dp, "tp": self.tp, "replicas": self.parallel.groups}

    @cached_property  # a look into the mesh takes a millisecond
    def shard(self) -> Shard:
        """Shard of the data for this rank's data-parallel coordinate."""
        return Shard(self.mesh["dp"].get_local_rank(), self.dp)

    @property
    def leads(self) -> bool:
        """True if this rank reads the packs of its data-parallel coordinate."""
        return self.mesh.get_local_rank("tp") == 0

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        """Process group of this rank's data-parallel coordinate; None if tp is 1."""
        return self.mesh["tp"].get_group() if self.tp > 1 else None

    @property
    def first(self) -> bool:
        """True on rank 0, which writes the run's files and prints."""
        return dist.get_rank() == 0

    def describe(self) -> str:
        """Return the topology in words, for example "8 x NVIDIA H100 (dp 4 x tp 2)"."""
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        replicas = f"{self.parallel.groups} replicas, " if self.parallel.groups > 1 else ""
        return f"{dist.get_world_size()} x {kind} ({replicas}dp {self.dp} x tp {self.tp})"


@contextmanager
def distributed(device: str, parallel: ParallelConfig) -> Iterator[Topology]:
    """Join torchrun's process group, or make a group of one; leave the group at the end.

    `device` is "cpu", "cuda" or "auto" (a GPU if torch sees one). Raises ValueError if there is no
    GPU for "cuda", or if `parallel` does not divide the ranks.
    """
    torch_device = device_of(device)
    with _environment_of_one():
        alone = "MASTER_PORT" not in os.environ
        # gloo beside NCCL: counts and packs of a step go between CPUs, without a wait for the GPU.
        backend = "cpu:gloo,cuda:nccl" if torch_device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=parallel.timeout_seconds)
        if alone:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        else:
            store, rank, size = _meeting(timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        complete = True
        try:
            mesh = data_and_tensor_mesh(torch_device.type, parallel)
            wait_longer(mesh, timeout)
            yield Topology(mesh, torch_device, parallel)
        except LostRank:
            complete = False  # to leave a group, NCCL may wait for the lost rank for ever
            raise
        finally:
            if complete:
                dist.destroy_process_group()


@contextmanager
def _environment_of_one() -> Iterator[None]:
    """Set the variables of torchrun that are missing, in the `with` block, to those of one rank."""
    of_one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    missing = of_one.keys() - os.environ.keys()
    os.environ.update({name: of_one[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def wait_longer(mesh: DeviceMesh, timeout: timedelta) -> None:
    """Let the operations of all groups of `mesh` fail a minute after `timeout`.

    By default a group of the mesh waits ten minutes or more, and NCCL then aborts with pages of C++
    output. The watch of the run (`watch.py`) ends it before, at `timeout`, with one line.
    """
    groups = [dist.group.WORLD, mesh["dp"].get_group(), *mesh.get_all_groups()]
    for group in groups:
        _set_pg_timeout(timeout + timedelta(minutes=1), group)


def _meeting(timeout: timedelta) -> tuple[Store, int, int]:
    """Return the store in which the ranks meet, this process's rank, and the number of ranks.

    With a fixed `--master-addr`, the store of torchrun outlives workers that are started again:
    under the names of the first start they would find, and wait for, the addresses of dead workers.
    Every start of a rank therefore has names of its own.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return PrefixStore(f"start {store.add(f'starts of rank {rank}', 1)}", store), rank, size


def device_of(kind: str) -> torch.device:
    """Return the device of this rank for a `run.device`, and make a GPU the current device.

    Raises ValueError for "cuda" without a GPU.
    """
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError('device = "cuda", but torch sees no GPU; use "cpu" or "auto"')
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def data_and_tensor_mesh(device: str, parallel: ParallelConfig) -> DeviceMesh:
    """Arrange all ranks as a mesh "dp" x "tp".

    With several replicas that are sharded, "dp" is "replicate" x "shard".

    Raises ValueError if tp x replicas does not divide the number of ranks.
    """
    world, tp, replicas = dist.get_world_size(), parallel.tp, parallel.groups
    check_ranks(world, parallel)
    if replicas in (1, world // tp):
        return init_device_mesh(device, (world // tp, tp), mesh_dim_names=("dp", "tp"))
    mesh = init_device_mesh(
        device, (replicas, world // tp // replicas, tp), mesh_dim_names=("replicate", "shard", "tp")
    )
    mesh["replicate", "shard"]._flatten("dp")
    return mesh


def check_ranks(world: int, parallel: ParallelConfig) -> None:
    """Raise ValueError if tp x replicas does not divide `world`, the number of ranks."""
    tp, replicas = parallel.tp, parallel.groups
    if world % (tp * replicas):
        sizes = f"tp = {tp}" if replicas == 1 else f"tp = {tp} x replicas = {replicas}"
        raise ValueError(
            f"{sizes} does not divide the {world} processes of this run; start a multiple of {tp * replicas}"
        )


def named_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name`; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return named.get(name, torch.bfloat16 if device.type == "cuda" else torch.float32)


def on_first_rank(work: Callable[[], None]) -> None:
    """Call `work` on rank 0. Collective.

    Raises CheckpointError on all ranks if `work` raises CheckpointError or OSError.
    """
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except (CheckpointError, OSError) as error:
            failure = [one_line(error)]
    dist.broadcast_object_list(failure)
    if failure[0]:
        raise CheckpointError(failure[0])
