"""What a run will take, found out without a GPU, a weight or a step: `python -m trainer.main run.toml --plan[=GPUS]`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import msgspec
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore

from sftstream import PackAssignment, PackLoader, Shard
from trainer.config import TrainConfig
from trainer.distributed.mesh import ParallelConfig, data_and_tensor_mesh, named_dtype
from trainer.llama.blocks import Recompute
from trainer.llama.model import Llama, LlamaConfig, local
from trainer.llama.parallel import parallelize
from trainer.training.model import find_source

GPU = torch.device("cuda")
PEAK_FLOPS = 989e12
"""An H100's or H200's dense bfloat16 peak (NVIDIA's data sheet)."""
UTILISATION = 0.45
"""The share of it that a run is taken to reach; this trainer's layers were seen at 0.5 to 0.6 on one GPU."""
SAMPLED_PACKS = 64


class Held(NamedTuple):
    """Elements of weights on one rank: in all blocks, and in what stands around them."""

    blocks: int
    ends: int

    @property
    def all(self) -> int:
        """Both."""
        return self.blocks + self.ends


class RunEstimate(NamedTuple):
    """`memory` is bytes by part on each GPU; `steps` is None where it cannot be known."""

    parameters: int
    gpus: int
    dp: int
    memory: dict[str, int]
    packs_per_rank: int
    tokens_per_step: int
    steps: int | None
    seconds_per_step: float


def estimate(config: TrainConfig, shape: LlamaConfig, gpus: int) -> RunEstimate:
    """The plan of a run on so many GPUs; ValueError where the run would refuse to start.

    Shards are counted by sharding: a model without memory is spread over processes that are only pretended. What a step
    holds besides is computed as if every token were trained, and leaves out what the allocator loses.
    """
    data, parallel = config.data, config.parallel
    with torch.device("meta"):
        whole = Llama(shape)
    sharded = _held(shape, parallel, gpus, data.capacity)
    gathered = _held(shape, ParallelConfig(tp=parallel.tp), parallel.tp, data.capacity)
    dp = gpus // parallel.tp
    packs = PackAssignment(data.streams, data.global_batch, dp).most_micro_batches
    return RunEstimate(
        parameters=sum(p.numel() for p in whole.parameters()),
        gpus=gpus,
        dp=dp,
        memory=_memory(config, shape, sharded, gathered, dp, packs),
        packs_per_rank=packs,
        tokens_per_step=data.global_batch * data.capacity,
        steps=config.run.steps or _steps_of_epochs(config),
        seconds_per_step=_flops(config, whole, dp * packs) / (gpus * PEAK_FLOPS * UTILISATION),
    )


@contextmanager
def _pretended(ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _held(shape: LlamaConfig, parallel: ParallelConfig, ranks: int, capacity: int) -> Held:
    with _pretended(ranks), torch.device("meta"):
        model = Llama(shape)
        parallelize(model, data_and_tensor_mesh("cpu", parallel), capacity=capacity)
        blocks = sum(local(p).numel() for p in model.blocks.parameters())
        return Held(blocks, sum(local(p).numel() for p in model.parameters()) - blocks)


def _memory(
    config: TrainConfig, shape: LlamaConfig, sharded: Held, gathered: Held, dp: int, packs: int
) -> dict[str, int]:
    run, parallel = config.run, config.parallel
    stored, computed = named_dtype(run.weights_dtype, GPU), named_dtype(run.compute_dtype, GPU)
    wrapped = dp > 1 or {stored, computed} != {torch.float32}
    waits = parallel.reduce_gradients == "step" and packs > 1
    # A layer and the one that is fetched meanwhile, or all.
    layers = 2 / shape.num_hidden_layers if parallel.reshard_after_forward else 1
    return {
        "weights": sharded.all * stored.itemsize,
        "optimizer": 2 * sharded.all * stored.itemsize,
        # Those of earlier packs wait in fp32 and whole, unless each pack's are reduced.
        "gradients": gathered.all * 4 if wrapped and waits else sharded.all * stored.itemsize,
        "gathered weights": int((gathered.ends + layers * gathered.blocks) * computed.itemsize) if wrapped else 0,
        "activations": computed.itemsize * activations(shape, config.data.capacity, parallel.tp, run.recompute),
        "logits": (4 + 2 * computed.itemsize) * config.data.capacity * shape.vocab_size // parallel.tp,
    }


def activations(shape: LlamaConfig, tokens: int, tp: int, recompute: Recompute) -> int:
    """Elements that a pack's forward pass keeps for its backward pass, and one layer's that are computed again."""
    heads, groups, size = shape.num_attention_heads, shape.num_key_value_heads, shape.head_size
    # Between layers tokens are shared out, inside heads are.
    row, whole_row = shape.hidden_size // tp, shape.hidden_size
    projected = (heads + 2 * groups) * size // tp
    turned = (heads + groups) * size // tp
    attention = row + whole_row + projected + turned + heads * size // tp
    # Input of the norm, what it gives, gate and up, the gate's silu, the product.
    feed_forward = row + whole_row + 4 * shape.intermediate_size // tp
    kept, again = {
        "none": (attention + feed_forward, 0),
        "selective": (attention + 2 * row, feed_forward - row),
        "full": (row, attention + feed_forward - row),
    }[recompute]
    return tokens * (shape.num_hidden_layers * kept + again)


def _flops(config: TrainConfig, model: Llama, packs: int) -> float:
    """Of a step of `packs`, empty ones included: 2 a weight and token forward, 4 backward, and what is computed twice.

    Without attention itself.
    """
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.ndim > 1)
    twice = {
        "none": 0,
        "selective": sum(p.numel() for name, p in model.blocks.named_parameters() if "gate_up" in name),
        "full": blocks,
    }[config.run.recompute]
    tokens = packs * config.data.capacity
    return tokens * (6 * (blocks + model.head.weight.numel()) + 2 * twice)


def _steps_of_epochs(config: TrainConfig) -> int | None:
    """How many steps the epochs make, from the first packs: reads and tokenizes a window of conversations.

    None where a source is streamed, whose rows nobody has counted.
    """
    loader = PackLoader(msgspec.structs.replace(config.data, workers=0), shard=Shard(0, 1))
    if loader.total_rows is None:
        return None
    packs = list(islice(loader, SAMPLED_PACKS))
    rows = sum(pack.conversations + len(pack.refused) for pack in packs)
    return math.ceil(loader.total_rows / (rows / len(packs) * config.data.global_batch))


def print_estimate(config: TrainConfig, gpus: int) -> None:
    """Print the estimate of a run on `gpus` GPUs, from rank 0 only.

    Raises ValueError if the run would refuse to start.
    """
    console = Console(quiet=os.environ.get("RANK", "0") != "0", highlight=False)
    show(estimate(config, find_source(config.model).shape, gpus), config, console)


def show(estimate: RunEstimate, config: TrainConfig, console: Console) -> None:
    """Print a plan for people."""
    parallel, data = config.parallel, config.data
    console.print(
        f"{config.run.directory}: {estimate.parameters:,} parameters on {estimate.gpus} GPUs (dp {estimate.dp} x tp {parallel.tp}"
        + (f", {parallel.replicas} replicas)" if parallel.replicas > 1 else ")")
    )
    table = Table("on each GPU", "GiB")
    for part, size in estimate.memory.items():
        table.add_row(part, f"{size / 2**30:.2f}")
    table.add_section()
    table.add_row("in all", f"{sum(estimate.memory.values()) / 2**30:.2f}")
    console.print(table)
    whole = "its number of steps is known when it ends, since a source is streamed"
    if estimate.steps is not None:
        hours = estimate.steps * estimate.seconds_per_step / 3600
        whole = f"{estimate.steps:,} steps, {estimate.steps * estimate.tokens_per_step:,} tokens: about {hours:,.1f} h"
    console.print(
        f"a step: {data.global_batch} packs of {data.capacity:,} tokens, {estimate.packs_per_rank} on each data-parallel "
        f"rank one after the other; {estimate.tokens_per_step:,} tokens\n"
        f"about {estimate.seconds_per_step:,.2f} s a step, at {UTILISATION:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s on each GPU\n"
        f"the run: {whole}",
        soft_wrap=True,
    )
