"""Measure tokens per second of a model over several GPUs, on packs in memory, as rows of Markdown.

    torchrun --nproc-per-node RANKS benchmarks/gpu/spread.py [--tp 1] [--shapes small 8b]
        [--layers plain compiled] [--capacity 8192] [--steps 5]

Steps of `PACKS` random packs per data-parallel rank, about 40 conversations each, deterministic, in
bfloat16 on GPUs; the median step counts. "small" is the model of `data_wait.py`, "8b" four layers
and both ends of Llama 3.1 8B.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Iterator

import torch
from packs import random_packs

from sftstream import Pack
from trainer.distributed.determinism import determinism
from trainer.distributed.mesh import ParallelConfig, Topology, distributed, named_dtype
from trainer.llama.blocks import prepare_blocks
from trainer.llama.config import LlamaConfig
from trainer.llama.model import Llama
from trainer.llama.parallel import build
from trainer.llama.sharding import local
from trainer.training.optimizer import OptimizerConfig, build_optimizer
from trainer.training.step import train_step

WARM_UP = 2
"""Steps before the measurement."""
PACKS = 8


def _shape(hidden: int, inner: int, layers: int, heads: int, tied: bool, vocabulary: int = 128_256) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=tied,
    )


SHAPES = {
    "tiny": _shape(64, 128, 1, 16, tied=True, vocabulary=4096),
    "small": _shape(1024, 4096, 8, 16, tied=True),
    "8b": _shape(4096, 14336, 4, 32, tied=False),
}


@torch.no_grad()
def built(shape: LlamaConfig, topology: Topology, capacity: int, *, compiled: bool) -> Llama:
    """Build a model with random weights drawn on the device: faster than drawing on the CPU."""
    dtype = named_dtype("auto", topology.device)
    model = build(shape, topology.mesh, topology.device, capacity=capacity, compute_dtype=dtype)
    torch.manual_seed(0)
    for parameter in model.parameters():
        local(parameter).normal_(0, shape.initializer_range) if parameter.ndim > 1 else local(parameter).fill_(1)
    prepare_blocks(model, recompute="none", compiled=compiled)
    return model


def seconds(model: Llama, topology: Topology, packs: list[Pack]) -> Iterator[float]:
    """Train step after step; yield the seconds of each."""
    optimizer = build_optimizer(model, OptimizerConfig())
    mine = packs[topology.shard.index :: topology.shard.count]
    trained = sum(pack.trained_tokens for pack in packs)
    while True:
        began = time.perf_counter()
        # Waits for the device at its end.
        train_step(model, optimizer, mine, topology, trained_tokens=trained, learning_rate=1e-5, clip=1.0)
        yield time.perf_counter() - began


def row(name: str, topology: Topology, capacity: int, steps: int, layers: str) -> str:
    """Return a line of the table."""
    shape = SHAPES[name]
    packs = random_packs(shape, capacity, 32 + PACKS * topology.dp)[32:]  # the first have few conversations
    step = seconds(built(shape, topology, capacity, compiled=layers == "compiled"), topology, packs)
    median = statistics.median([next(step) for _ in range(WARM_UP + steps)][WARM_UP:])
    speed = len(packs) * capacity / median
    return f"| {name} | {layers} | dp {topology.dp} x tp {topology.tp} | {speed:,.0f} | {median / PACKS * 1e3:.1f} |"


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["small", "8b"])
    parser.add_argument("--layers", nargs="+", choices=["plain", "compiled"], default=["plain", "compiled"])
    parser.add_argument("--capacity", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    with distributed("auto", ParallelConfig(tp=arguments.tp)) as topology, determinism(True):
        if topology.first:
            print("| shape | layers | ranks | tokens/s | ms a pack |\n|---|---|---|---|---|", flush=True)
        for name in arguments.shapes:
            for layers in arguments.layers:
                line = row(name, topology, arguments.capacity, arguments.steps, layers)
                if topology.first:
                    print(line, flush=True)
                gc.collect()  # modules and hooks hold one another
                torch._dynamo.reset()


if __name__ == "__main__":
    main()
