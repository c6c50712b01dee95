"""Estimate memory, steps and time of a run, without a GPU: `python -m trainer.main run.toml
--plan[=GPUS]`.

Weights are counted exactly, by the placements of the sharding code. Time counts
matrix products only: per token 6 operations for each weight (2 forward, 4 backward), 4 for each
frozen weight (no gradient of its own), plus 2 for each recomputed weight (Kaplan et al., "Scaling
Laws for Neural Language Models", https://arxiv.org/abs/2001.08361).

Example: a step of 524,288 tokens with 69.5e9 weights in matrices takes 6 * 524,288 * 69.5e9 =
2.2e17 operations, and 32 GPUs at 45 % of 989 TFLOP/s need about 15 s.
"""

from __future__ import annotations

import math
import os
from itertools import islice, product
from typing import Literal, NamedTuple

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor import Shard as Split

from sftstream import DataConfig, PackAssignment, PackLoader, Shard, pages
from trainer.activations import activations
from trainer.config import TrainConfig
from trainer.distributed.mesh import check_ranks, named_dtype
from trainer.llama.blocks import WAYS, Recompute
from trainer.llama.config import LlamaConfig
from trainer.llama.float8 import require_multiples
from trainer.llama.lora.layers import LoraConfig
from trainer.llama.lora.nf4 import Nf4Weight, count_weights, quantized, require_blocks
from trainer.llama.loss import chunk_rows
from trainer.llama.model import Llama
from trainer.llama.parallel import check_divisible, placement_of
from trainer.training.adamw8bit import block_size
from trainer.training.model import find_source

GPU = torch.device("cuda")
PEAK_FLOPS = 989e12
"""Dense bfloat16 peak of an H100 or H200, in operations per second (NVIDIA's data sheet)."""
UTILISATION = 0.45
"""Assumed share of PEAK_FLOPS; this trainer's layers reach 0.5 to 0.6 on one GPU."""
PLANNED_MEMORY = 80 * 10**9
"""Memory of a GPU in bytes that `--plan` assumes to resolve "auto" settings: an H100."""
FILLED = 0.95
"""Share of a GPU's memory that a run may fill by the estimate."""
SAMPLED_PACKS = 64
"""Number of packs read to estimate the rows per pack."""


class Held(NamedTuple):
    """Numbers of weights on one rank."""

    blocks: int
    """Weights in the blocks."""
    ends: int
    """Weights in embedding, final norm and head."""
    trained: int
    """Trained weights: all without adapters."""
    matrices: int
    """Trained weights in matrices of the blocks."""
    quantized: int = 0
    """Bytes of weights in 4 bits, which are not in the other numbers."""
    largest: int = 0
    """Weights of the largest matrix in 4 bits."""
    eight_bit: int = 0
    """Trained weights whose means `optimizer.kind = "adamw8bit"` quantizes."""
    scales: int = 0
    """Blocks of these means."""

    @property
    def all(self) -> int:
        """Weights of the whole model on the rank."""
        return self.blocks + self.ends

    @property
    def frozen(self) -> int:
        """Weights that are not trained."""
        return self.all - self.trained


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
    packs = _micro_batches(data, dp)
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
    return _flops(config, model, dp * _micro_batches(config.data, dp)) / (gpus * peak * UTILISATION)


def with_memory_settings(
    config: TrainConfig,
    shape: LlamaConfig,
    gpus: int,
    size: int,
    least: Recompute = "none",
    replicas: int | None = None,
) -> TrainConfig:
    """Return `config` with "auto" replaced in the settings that decide memory on a GPU.

    Takes the first `run.weights_dtype`, `run.recompute`, `parallel.replicas` and
    `parallel.reshard_after_forward` whose estimate fills at most `FILLED` of `size` bytes: float32
    before bfloat16, for each less recomputation first, from `least` on, for each `_replicas` in
    order, and for each gathered weights that are kept first. If none fits, takes the smallest.
    `replicas` is the number of a checkpoint of as many ranks.

    Raises ValueError as `memory` does.
    """
    run, parallel = config.run, config.parallel
    check_ranks(gpus, parallel)
    ways = WAYS[WAYS.index(least) :] if run.recompute == "auto" else (run.recompute,)
    freed = (False, True) if parallel.reshard_after_forward == "auto" else (parallel.reshard_after_forward,)
    for dtype in stored_dtypes(config, GPU):
        for way, groups, frees in product(ways, _replicas(config, gpus, dtype, replicas), freed):
            settings = {"weights_dtype": dtype, "recompute": way}
            chosen = msgspec.structs.replace(
                config,
                run=msgspec.structs.replace(run, **settings),
                parallel=msgspec.structs.replace(parallel, replicas=groups, reshard_after_forward=frees),
            )
            if sum(memory(chosen, shape, gpus).values()) <= FILLED * size:
                return chosen
    return chosen


def _replicas(config: TrainConfig, gpus: int, dtype: str, before: int | None) -> tuple[int, ...]:
    """Return the values of `parallel.replicas` to try, the preferred first.

    "auto" prefers whole weights on each data-parallel rank where this was measured to be faster:
    under adapters, whose gradients are small, and for two ranks of bfloat16 weights, whose
    gradients are exchanged in bfloat16. `before` is the number of a checkpoint.
    """
    parallel = config.parallel
    if parallel.replicas != "auto":
        return (parallel.replicas,)
    dp = gpus // parallel.tp
    faster = config.lora is not None or (dp == 2 and dtype == "bfloat16")
    whole = faster and parallel.tp == 1 and parallel.reduce_gradients == "step"
    return (dp, 1) if (whole if before is None else before == dp) else (1,)


def stored_dtypes(config: TrainConfig, device: torch.device) -> tuple[Literal["float32", "bfloat16"], ...]:
    """Return the possible values of `run.weights_dtype` on `device`: several only for "auto".

    Frozen weights lose nothing in the format of the computation.
    """
    if config.run.weights_dtype != "auto":
        return (config.run.weights_dtype,)
    if config.lora is not None:
        return ("bfloat16",) if named_dtype(config.run.compute_dtype, device) == torch.bfloat16 else ("float32",)
    return ("float32", "bfloat16") if device.type == "cuda" else ("float32",)


def _micro_batches(data: DataConfig, dp: int) -> int:
    """Return the largest number of packs of a shard in a step."""
    # Every number chosen for "auto" is a multiple of the shards, and divides the packs alike.
    streams = dp if data.streams == "auto" else data.streams
    return PackAssignment(streams, data.global_batch, dp).most_micro_batches


def memory(config: TrainConfig, shape: LlamaConfig, gpus: int) -> dict[str, int]:
    """Return the bytes on each GPU by part; `run.weights_dtype` and `run.recompute` are not "auto",
    `parallel.replicas` counts as 1 and `parallel.reshard_after_forward` as true if it is.

    The sum is the peak. A step of a single pack has its peak either at the end of the forward pass,
    before any gradient, or at the end of the backward pass, when almost all activations are freed:
    the part "not held together", negative, is what the sum of the other parts exceeds the peak by.

    Raises ValueError if the sizes of `[parallel]` do not divide the model or the GPUs, or if
    `run.float8` does not suit the sizes.
    """
    run, data, parallel = config.run, config.data, config.parallel
    check_ranks(gpus, parallel)
    if parallel.tp > 1:
        check_divisible(shape, data.capacity, parallel.tp)
    if config.lora is not None and config.lora.quantize:
        require_blocks(shape, parallel.tp)
    if run.float8:
        require_multiples(shape, parallel.tp)
    dp = gpus // parallel.tp
    packs = _micro_batches(data, dp)
    shards = dp // parallel.groups
    sharded = _held(shape, config.lora, parallel.tp, shards)
    gathered = _held(shape, config.lora, parallel.tp, 1)
    stored, computed = named_dtype(run.weights_dtype, GPU), named_dtype(run.compute_dtype, GPU)
    trained = stored if config.lora is None else torch.float32
    assert run.recompute != "auto"
    # The present layer and the prefetched next layer, or all layers.
    layers = 2 / shape.num_hidden_layers if parallel.reshards else 1
    working = int((gathered.ends + layers * gathered.blocks) * computed.itemsize)
    if shards == 1:
        copied = (0 if stored == computed else gathered.frozen) + (0 if trained == computed else gathered.trained)
        working = copied * computed.itemsize
    working += gathered.largest * computed.itemsize  # made again from its codes for each product
    # Gradients of earlier packs stay unsharded in float32 until the end of the step.
    sums = packs > 1 and (shards == 1 or parallel.reduce_gradients == "step")
    width = shape.vocab_size // parallel.tp
    logits = chunk_rows(data.capacity, width, computed.itemsize) * width * computed.itemsize
    compiled = run.compile is not False
    kept, again = activations(shape, data.capacity, parallel.tp, run.recompute, config.lora, compiled=compiled)
    gradients = gathered.trained * 4 if sums else sharded.trained * trained.itemsize
    # The logits, overwritten by their gradient; a trained head's gradient.
    head = logits + (width * shape.hidden_size * computed.itemsize if _trains_head(config.lora) else 0)
    freed = head + computed.itemsize * (kept - kept // shape.num_hidden_layers)
    return {
        "weights": sharded.frozen * stored.itemsize + sharded.trained * trained.itemsize + sharded.quantized,
        "optimizer": _optimizer_state(config.optimizer.kind, sharded, trained.itemsize),
        "gradients": gradients,
        "working weights": working,
        "activations": computed.itemsize * (kept + again),
        "head": head,
        "not held together": -min(gradients, freed) if packs == 1 else 0,
    }


def _optimizer_state(kind: str, held: Held, itemsize: int) -> int:
    """Return the bytes of the optimizer's state; `itemsize` is that of a trained weight."""
    match kind:
        case "muon":  # one mean of the gradients of its matrices, not two
            return (2 * held.trained - held.matrices) * itemsize
        case "adamw8bit":
            return 2 * ((held.trained - held.eight_bit) * itemsize + held.eight_bit + 4 * held.scales)
    return 2 * held.trained * itemsize


def _trains_head(lora: LoraConfig | None) -> bool:
    return lora is None or "lm_head" in lora.modules_to_save


def _held(shape: LlamaConfig, lora: LoraConfig | None, tp: int, shards: int) -> Held:
    """Count the weights on the first of `tp` x `shards` ranks; FSDP rounds rows up."""
    with torch.device("meta"):
        model = Llama(shape, lora)
    blocks = ends = trained = matrices = eight_bit = scales = 0
    for name, weight in model.named_parameters():
        rows, columns = weight.shape[0], weight[0].numel()
        placement = placement_of(*name.split(".")[-2:])
        if isinstance(placement, Split):
            rows, columns = (rows // tp, columns) if placement.dim == 0 else (rows, columns // tp)
        held = math.ceil(rows / shards) * columns
        blocks, ends = (blocks + held, ends) if name.startswith("blocks.") else (blocks, ends + held)
        trained += held if weight.requires_grad else 0
        matrices += held if weight.requires_grad and weight.ndim == 2 and name.startswith("blocks.") else 0
        block = block_size(weight.numel(), (rows, columns) if weight.ndim == 2 else (rows,))
        if block is not None and weight.requires_grad:
            eight_bit, scales = eight_bit + held, scales + held // block
    in_4_bits = quantized(model).values()
    largest = max((2 * matrix.codes.numel() // tp for matrix in in_4_bits), default=0)
    codes = sum(_bytes(matrix) // tp for matrix in in_4_bits)
    return Held(blocks, ends, trained, matrices, codes, largest, eight_bit, scales)


def _bytes(matrix: Nf4Weight) -> int:
    return sum(buffer.numel() * buffer.itemsize for buffer in matrix.buffers())


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
