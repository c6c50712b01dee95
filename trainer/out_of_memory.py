"""Say which settings to change after a GPU ran out of memory, with the memory that each saves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from trainer.config import TrainConfig
from trainer.llama.blocks import WAYS
from trainer.llama.config import LlamaConfig
from trainer.memory import memory

GIB = 2**30
LEAST_SAVING = 0.03
"""Share of the plan's memory that a change must save to be named."""
FRAGMENTED = 0.1
"""Share of a GPU's memory, reserved by torch without use, from which on it is named as a cause."""


@contextmanager
def explained(config: TrainConfig, shape: LlamaConfig, device: torch.device) -> Iterator[None]:
    """Turn an error of a GPU without memory in the `with` block into a ValueError with remedies.

    The choices of `config` are made, but for the attention kernel.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(out_of_memory(config, shape, dist.get_world_size(), _use(device))) from error


def out_of_memory(config: TrainConfig, shape: LlamaConfig, gpus: int, use: tuple[int, int, int] | None = None) -> str:
    """Return a line with the plan's memory of each part, and changes with the plan's total of each.

    `use` has the bytes of the GPU, of torch's tensors, and of torch's reserved memory; None without
    a GPU.
    """
    parts = memory(config, shape, gpus)
    total = sum(parts.values())
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    facts = f"a GPU ran out of memory: the plan of the run is {total / GIB:.1f} GiB on each GPU ({listed})"
    remedies = [
        f"{text} ({needed / GIB:.1f} GiB)"
        for text, needed in _totals(config, shape, gpus)
        if needed <= (1 - LEAST_SAVING) * total
    ]
    if use is not None:
        size, allocated, reserved = use
        facts += f"; the GPU has {size / GIB:.1f} GiB, {allocated / GIB:.1f} GiB of them in tensors of this process"
        if reserved - allocated >= FRAGMENTED * size:
            remedies.append(
                "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment, since "
                f"{(reserved - allocated) / GIB:.1f} GiB are reserved in pieces"
            )
        if size - reserved > total / 2:
            remedies.append("a GPU that no other process uses")
    return f"{facts}; use {', or '.join(remedies or ['a smaller model'])}"


def _totals(config: TrainConfig, shape: LlamaConfig, gpus: int) -> Iterator[tuple[str, int]]:
    """Yield each change that saves memory, the cheapest first, with the plan's bytes under it."""
    run, parallel = config.run, config.parallel
    assert run.recompute != "auto"
    if parallel.groups > 1:
        yield from _total("parallel.replicas = 1", config, shape, gpus, parallel={"replicas": 1})
    for way in WAYS[WAYS.index(run.recompute) + 1 :]:
        yield from _total(f'run.recompute = "{way}"', config, shape, gpus, run={"recompute": way})
    if not parallel.reshard_after_forward:
        changes = {"reshard_after_forward": True}
        yield from _total("parallel.reshard_after_forward = true", config, shape, gpus, parallel=changes)
    if parallel.reduce_gradients == "step":
        changes_of_sums = {"reduce_gradients": "pack"}
        yield from _total('parallel.reduce_gradients = "pack"', config, shape, gpus, parallel=changes_of_sums)
    if parallel.groups == 1:  # more GPUs save memory by sharding only
        yield from _total(f"{2 * gpus} GPUs", config, shape, 2 * gpus)
    if run.weights_dtype == "float32" and config.lora is None:
        text = 'run.weights_dtype = "bfloat16" in a new run'
        yield from _total(text, config, shape, gpus, run={"weights_dtype": "bfloat16"})
    capacity = config.data.capacity // 2
    text = f"data.capacity = {capacity} in a new run, which refuses longer conversations"
    yield from _total(text, config, shape, gpus, data={"capacity": capacity})


def _total(
    text: str, config: TrainConfig, shape: LlamaConfig, gpus: int, **tables: dict[str, Any]
) -> Iterator[tuple[str, int]]:
    """Yield `text` with the plan's bytes under changed `tables`; nothing for an impossible plan."""
    try:
        changed = {name: msgspec.structs.replace(getattr(config, name), **table) for name, table in tables.items()}
        yield text, sum(memory(msgspec.structs.replace(config, **changed), shape, gpus).values())
    except ValueError:
        return  # sizes that do not divide the model or the GPUs


def _use(device: torch.device) -> tuple[int, int, int] | None:
    if device.type != "cuda":
        return None
    size = torch.cuda.get_device_properties(device).total_memory
    return size, torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
