"""Estimate memory, steps and time of a run, without a GPU: `python -m trainer.main run.toml
--plan[=GPUS]`.

`memory.py` counts the memory. Time counts matrix products only: per token 6 operations for each
weight (2 forward, 4 backward), 4 for each frozen weight (no gradient of its own), plus 2 for each
recomputed weight (Kaplan et al., "Scaling Laws for Neural Language Models",
https://arxiv.org/abs/2001.08361).

Example: a step of 524,288 tokens with 69.5e9 weights in matrices takes 6 * 524,288 * 69.5e9 =
2.2e17 operations, and 32 GPUs at 45 % of 989 TFLOP/s need about 15 s.
"""

from __future__ import annotations

import math
import os
from itertools import islice
from typing import NamedTuple

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from sftstream import PackLoader, Shard, pages
from trainer.choices import with_memory_settings
from trainer.config import TrainConfig
from trainer.llama.config import LlamaConfig
from trainer.llama.lora.nf4 import count_weights, quantized
from trainer.llama.model import Llama
from trainer.memory import memory, micro_batches
from trainer.training.model import find_source

PEAK_FLOPS = 989e12
"""Dense bfloat16 peak of an H100 or H200, in operations per second (NVIDIA's data sheet)."""
UTILISATION = 0.45
"""Assumed share of PEAK_FLOPS; this trainer's layers reach 0.5 to 0.6 on one GPU."""
PLANNED_MEMORY = 80 * 10**9
"""Memory of a GPU in bytes that `--plan` assumes to resolve "auto" settings: an H100."""
SAMPLED_PACKS = 64
"""Number of packs read to estimate the rows per pack."""


class RunEstimate(NamedTuple):
    """Sizes and times of a run."""

    parameters: int
    """Weights of the whole model, adapters included."""
    trained: int
    """Trained weights."""
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
    config: TrainConfig
    """The run's config with its "auto" settings resolved for GPUs of `PLANNED_MEMORY`."""


def estimate(config: TrainConfig, shape: LlamaConfig, gpus: int) -> RunEstimate:
    """Estimate a run of a model of `shape` on `gpus` GPUs.

    Assumes that every token is trained, and leaves out fragmented memory. Raises ValueError if the
    run would refuse to start.
    """
    run = msgspec.structs.replace(config.run, compile=config.run.compile is not False)
    config = with_memory_settings(msgspec.structs.replace(config, run=run), shape, gpus, PLANNED_MEMORY)
    data, parallel = config.data, config.parallel
    with torch.device("meta"):
        model = Llama(shape, config.lora)
    dp = gpus // parallel.tp
    packs = micro_batches(data, dp)
    return RunEstimate(
        parameters=count_weights(model),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        gpus=gpus,
        dp=dp,
        memory=memory(config, shape, gpus),
        packs_per_rank=packs,
        tokens_per_step=data.global_batch * data.capacity,
        steps=config.run.steps or _steps_of_epochs(config),
        seconds_per_step=_seconds(config, model, gpus, PEAK_FLOPS),
        config=config,
    )


def step_seconds(config: TrainConfig, shape: LlamaConfig, gpus: int, peak: float) -> float:
    """Return the estimated seconds of a step on `gpus` GPUs that reach `UTILISATION` of `peak`
    operations per second; `run.recompute` is not "auto"."""
    with torch.device("meta"):
        model = Llama(shape, config.lora)
    return _seconds(config, model, gpus, peak)


def _seconds(config: TrainConfig, model: Llama, gpus: int, peak: float) -> float:
    dp = gpus // config.parallel.tp
    return _flops(config, model, dp * micro_batches(config.data, dp)) / (gpus * peak * UTILISATION)


def _flops(config: TrainConfig, model: Llama, packs: int) -> float:
    """Return the operations of a step of `packs` (empty packs included), except attention."""
    in_4_bits = {name: 2 * weight.codes.numel() for name, weight in quantized(model).items()}
    matrices = {name: p for name, p in model.blocks.named_parameters() if p.ndim > 1}
    trained = [p.numel() for p in (*matrices.values(), model.head.weight) if p.requires_grad]
    frozen = [p.numel() for p in (*matrices.values(), model.head.weight) if not p.requires_grad]
    products = 6 * sum(trained) + 4 * (sum(frozen) + sum(in_4_bits.values()))
    sizes = {name: p.numel() for name, p in matrices.items()} | in_4_bits
    recomputed = {
        "none": 0,
        "selective": sum(size for name, size in sizes.items() if "gate_up" in name),
        "full": sum(sizes.values()),
    }[config.run.recompute]
    tokens = packs * config.data.capacity
    return tokens * (products + 2 * recomputed)


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


def print_estimate(config: TrainConfig, gpus: int, *, as_json: bool = False) -> None:
    """Print the estimate of a run on `gpus` GPUs, from rank 0 only; `as_json` prints a document.

    Raises ValueError if the run would refuse to start.
    """
    console = Console(quiet=os.environ.get("RANK", "0") != "0", highlight=False)
    source = find_source(config.model, config.data.tokenizer.path, config.lora)
    found = estimate(config, source.shape, gpus)
    if as_json:
        console.print_json(msgspec.json.encode(_numbers(found)).decode())
    else:
        show(found, config, console)


def _numbers(estimate: RunEstimate) -> dict[str, object]:
    """Return the estimate as one level of JSON-able values."""
    run = estimate.config.run
    return {
        **{name: value for name, value in estimate._asdict().items() if name not in ("config", "memory")},
        "memory": sum(estimate.memory.values()),
        "memory_of_parts": estimate.memory,
        "recompute": run.recompute,
        "weights_dtype": run.weights_dtype,
        "compile": run.compile,
        "replicas": estimate.config.parallel.groups,
        "reshard_after_forward": estimate.config.parallel.reshards,
    }


def show(estimate: RunEstimate, config: TrainConfig, console: Console) -> None:
    """Print the estimate as a table and sentences."""
    parallel, data, run = estimate.config.parallel, config.data, estimate.config.run
    trained = f", {estimate.trained:,} of them trained," if estimate.trained < estimate.parameters else ""
    gpus = "1 GPU" if estimate.gpus == 1 else f"{estimate.gpus} GPUs"
    replicas = parallel.groups
    console.print(
        f"{config.run.directory}: {estimate.parameters:,} parameters{trained} on {gpus} "
        f"(dp {estimate.dp} x tp {parallel.tp}" + (f", {replicas} replicas)" if replicas > 1 else ")")
    )
    table = Table("on each GPU", "GiB")
    for part, size in estimate.memory.items():
        table.add_row(part, f"{size / 2**30:.2f}")
    table.add_section()
    table.add_row("total", f"{sum(estimate.memory.values()) / 2**30:.2f}")
    console.print(table)
    kept = estimate.dp > replicas and not parallel.reshards
    console.print(
        f"{run.weights_dtype} weights, recompute {run.recompute}, compile {str(run.compile).lower()}"
        + (", gathered weights kept for a step" if kept else "")
        + (", products in float8 (their speed is not counted)" if run.float8 else ""),
        soft_wrap=True,
    )
    length = "the number of steps is not known in advance, since a source is streamed"
    if estimate.steps is not None:
        time = pages.figures.duration(estimate.steps * estimate.seconds_per_step)
        length = f"{estimate.steps:,} steps, {estimate.steps * estimate.tokens_per_step:,} tokens: about {time}"
    console.print(
        f"a step: {data.global_batch} packs of {data.capacity:,} tokens, {estimate.packs_per_rank} on each data-parallel "
        f"rank one after the other; {estimate.tokens_per_step:,} tokens\n"
        f"about {pages.figures.duration(estimate.seconds_per_step)} a step, at {UTILISATION:.0%} of "
        f"{PEAK_FLOPS / 1e12:.0f} TFLOP/s on each GPU\n"
        f"the run: {length}",
        soft_wrap=True,
    )
