"""Estimate memory, steps and time of a run, without a GPU: `python -m trainer.main run.toml
--plan[=GPUS]`.

Weights are counted exactly, by sharding a model without memory over simulated ranks. Time counts
matrix products only: per token 6 operations for each weight (2 forward, 4 backward), plus 2 for
each recomputed weight (Kaplan et al., "Scaling Laws for Neural Language Models",
https://arxiv.org/abs/2001.08361).

Example: a step of 524,288 tokens with 69.5e9 weights in matrices takes 6 * 524,288 * 69.5e9 =
2.2e17 operations, and 32 GPUs at 45 % of 989 TFLOP/s need about 15 s.
"""

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
from trainer.llama.config import LlamaConfig
from trainer.llama.model import Llama
from trainer.llama.parallel import parallelize
from trainer.llama.sharding import local
from trainer.training.model import find_source

GPU = torch.device("cuda")
PEAK_FLOPS = 989e12
"""Dense bfloat16 peak of an H100 or H200, in operations per second (NVIDIA's data sheet)."""
UTILISATION = 0.45
"""Assumed share of PEAK_FLOPS; this trainer's layers reach 0.5 to 0.6 on one GPU."""
SAMPLED_PACKS = 64
"""Number of packs read to estimate the rows per pack."""


class Held(NamedTuple):
    """Numbers of weights on one rank."""

    blocks: int
    """Weights in the blocks."""
    ends: int
    """Weights in embedding, final norm and head."""

    @property
    def all(self) -> int:
        """Weights of the whole model on the rank."""
        return self.blocks + self.ends


class RunEstimate(NamedTuple):
    """Sizes and times of a run."""

    parameters: int
    """Weights of the whole model."""
    gpus: int
    dp: int
    """Data-parallel size."""
    memory: dict[str, int]
    """Bytes on each GPU, by part."""
    packs_per_rank: int
    """Packs of the fullest step on a data-parallel rank."""
    tokens_per_step: int
    """Tokens of a step, padding included."""
    steps: int | None
    """Steps of the run; None for epochs over a streamed source, whose size is unknown."""
    seconds_per_step: float


def estimate(config: TrainConfig, shape: LlamaConfig, gpus: int) -> RunEstimate:
    """Estimate a run of a model of `shape` on `gpus` GPUs.

    Assumes that every token is trained, and leaves out fragmented memory. Raises ValueError if the
    run would refuse to start.
    """
    data, parallel = config.data, config.parallel
    with torch.device("meta"):
        model = Llama(shape)
    sharded = _held(shape, parallel, gpus, data.capacity)
    gathered = _held(shape, ParallelConfig(tp=parallel.tp), parallel.tp, data.capacity)
    dp = gpus // parallel.tp
    packs = PackAssignment(data.streams, data.global_batch, dp).most_micro_batches
    return RunEstimate(
        parameters=sum(p.numel() for p in model.parameters()),
        gpus=gpus,
        dp=dp,
        memory=_memory(config, shape, sharded, gathered, dp, packs),
        packs_per_rank=packs,
        tokens_per_step=data.global_batch * data.capacity,
        steps=config.run.steps or _steps_of_epochs(config),
        seconds_per_step=_flops(config, model, dp * packs) / (gpus * PEAK_FLOPS * UTILISATION),
    )


@contextmanager
def _simulated(ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _held(shape: LlamaConfig, parallel: ParallelConfig, ranks: int, capacity: int) -> Held:
    with _simulated(ranks), torch.device("meta"):
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
    # The present layer and the prefetched next layer, or all layers.
    layers = 2 / shape.num_hidden_layers if parallel.reshard_after_forward else 1
    return {
        "weights": sharded.all * stored.itemsize,
        "optimizer": 2 * sharded.all * stored.itemsize,
        # Gradients of earlier packs stay unsharded in float32 until the reduction.
        "gradients": gathered.all * 4 if wrapped and waits else sharded.all * stored.itemsize,
        "gathered weights": int((gathered.ends + layers * gathered.blocks) * computed.itemsize) if wrapped else 0,
        "activations": computed.itemsize * activations(shape, config.data.capacity, parallel.tp, run.recompute),
        "logits": (4 + 2 * computed.itemsize) * config.data.capacity * shape.vocab_size // parallel.tp,
    }


def activations(shape: LlamaConfig, tokens: int, tp: int, recompute: Recompute) -> int:
    """Return the number of activation elements that a pack of `tokens` keeps for the backward pass.

    Counts the kept activations of all layers, and the recomputed activations of one layer at a
    time.
    """
    heads, groups, size = shape.num_attention_heads, shape.num_key_value_heads, shape.head_size
    # Between layers each rank holds its share of the tokens, inside a layer its share of the heads.
    row, full_row = shape.hidden_size // tp, shape.hidden_size
    projected = (heads + 2 * groups) * size // tp
    rotated = (heads + groups) * size // tp
    attention = row + full_row + projected + rotated + heads * size // tp
    # Input and output of the norm; gate, up, silu(gate) and their product.
    feed_forward = row + full_row + 4 * shape.intermediate_size // tp
    kept, again = {
        "none": (attention + feed_forward, 0),
        "selective": (attention + 2 * row, feed_forward - row),
        "full": (row, attention + feed_forward - row),
    }[recompute]
    return tokens * (shape.num_hidden_layers * kept + again)


def _flops(config: TrainConfig, model: Llama, packs: int) -> float:
    """Return the operations of a step of `packs` (empty packs included), except attention."""
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.ndim > 1)
    recomputed = {
        "none": 0,
        "selective": sum(p.numel() for name, p in model.blocks.named_parameters() if "gate_up" in name),
        "full": blocks,
    }[config.run.recompute]
    tokens = packs * config.data.capacity
    return tokens * (6 * (blocks + model.head.weight.numel()) + 2 * recomputed)


def _steps_of_epochs(config: TrainConfig) -> int | None:
    """Estimate the steps of all epochs from the rows in the first `SAMPLED_PACKS` packs.

    Returns None if a source is streamed. Raises ValueError if the data cannot be read.
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
    show(estimate(config, find_source(config.model, config.data.tokenizer.path).shape, gpus), config, console)


def show(estimate: RunEstimate, config: TrainConfig, console: Console) -> None:
    """Print the estimate as a table and sentences."""
    parallel, data = config.parallel, config.data
    console.print(
        f"{config.run.directory}: {estimate.parameters:,} parameters on {estimate.gpus} GPUs (dp {estimate.dp} x tp {parallel.tp}"
        + (f", {parallel.replicas} replicas)" if parallel.replicas > 1 else ")")
    )
    table = Table("on each GPU", "GiB")
    for part, size in estimate.memory.items():
        table.add_row(part, f"{size / 2**30:.2f}")
    table.add_section()
    table.add_row("total", f"{sum(estimate.memory.values()) / 2**30:.2f}")
    console.print(table)
    length = "the number of steps is not known in advance, since a source is streamed"
    if estimate.steps is not None:
        hours = estimate.steps * estimate.seconds_per_step / 3600
        length = f"{estimate.steps:,} steps, {estimate.steps * estimate.tokens_per_step:,} tokens: about {hours:,.1f} h"
    console.print(
        f"a step: {data.global_batch} packs of {data.capacity:,} tokens, {estimate.packs_per_rank} on each data-parallel "
        f"rank one after the other; {estimate.tokens_per_step:,} tokens\n"
        f"about {estimate.seconds_per_step:,.2f} s a step, at {UTILISATION:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s on each GPU\n"
        f"the run: {length}",
        soft_wrap=True,
    )
