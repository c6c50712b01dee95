"""Count the memory of a GPU of a run, by part, before the run and without a GPU.

Weights are counted exactly, by the placements of the sharding code. Fragmented memory is left out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.distributed.tensor import Shard as Split

from sftstream import DataConfig, PackAssignment
from trainer.activations import activations
from trainer.config import TrainConfig
from trainer.distributed.mesh import check_ranks, named_dtype
from trainer.llama.config import LlamaConfig
from trainer.llama.float8 import require_multiples
from trainer.llama.lora.layers import LoraConfig
from trainer.llama.lora.nf4 import Nf4Weight, quantized, require_blocks
from trainer.llama.loss import chunk_rows
from trainer.llama.model import Llama
from trainer.llama.parallel import check_divisible, placement_of
from trainer.training.adamw8bit import block_size

GPU = torch.device("cuda")


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
    packs = micro_batches(data, dp)
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


def micro_batches(data: DataConfig, dp: int) -> int:
    """Return the largest number of packs of a shard in a step."""
    # Every number chosen for "auto" is a multiple of the shards, and divides the packs alike.
    streams = dp if data.streams == "auto" else data.streams
    return PackAssignment(streams, data.global_batch, dp).most_micro_batches
