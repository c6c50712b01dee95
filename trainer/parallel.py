"""A finished Llama spread over a mesh: tensor parallelism inside its layers, sharded data parallelism around them."""

from __future__ import annotations

from typing import Literal

import msgspec
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from trainer.model import Llama, LlamaConfig


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


def build(
    config: LlamaConfig,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    capacity: int,
    compute_dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
) -> Llama:
    """A Llama spread by `parallelize`, on `device`, its weights still to be set; no rank ever holds the whole of it."""
    with torch.device("meta"):
        model = Llama(config).to(weights_dtype)
    parallelize(
        model, mesh, capacity=capacity, compute_dtype=compute_dtype, reshard_after_forward=reshard_after_forward
    )
    model.to_empty(device=device)
    model.tie()
    return model


def parallelize(
    model: Llama,
    mesh: DeviceMesh,
    *,
    capacity: int,
    compute_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
) -> Llama:
    """Shard `model` in place over `mesh`, whose dimensions are named "dp" and "tp", and return it.

    "dp" may be made of "replicate" and "shard": weights are then sharded over the second only. `capacity` is the tokens of
    a pack. `compute_dtype` is what layers compute in, whatever the parameters' dtype; gradients are added up in fp32. A
    model on "meta" is sharded without memory. Where nothing is to be split or cast, nothing is wrapped.

    Gradients come out summed over "dp", not averaged; those of the norms are partial sums over "tp" until
    `clip_by_global_norm` or the optimizer completes them, once a step instead of once a pack.

    Raises ValueError where the model or the capacity can't be divided by the size of "tp".
    """
    tp = mesh["tp"]
    if tp.size() > 1:
        check_divisible(model.config, capacity, tp.size())
        _shard_tensors(model, tp)
    if mesh["dp"].size() > 1 or {compute_dtype, model.norm.weight.dtype} != {torch.float32}:
        _shard_data(model, _data_mesh(mesh), compute_dtype, reshard_after_forward)
    return model


def _data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    names = mesh.mesh_dim_names or ()
    return mesh["replicate", "shard"] if "replicate" in names else mesh["dp"]


def check_divisible(config: LlamaConfig, capacity: int, tp: int) -> None:
    """Raise ValueError, naming the sizes that would do, where `tp` does not divide what it splits."""
    split = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "capacity": capacity,
    }
    uneven = [f"{name} {size}" for name, size in split.items() if size % tp]
    if uneven:
        possible = [n for n in range(1, config.num_key_value_heads + 1) if not any(size % n for size in split.values())]
        raise ValueError(f"tp {tp} does not divide {', '.join(uneven)}: choose a tp of {possible}")


def _shard_tensors(model: Llama, tp: DeviceMesh) -> None:
    # Every rank holds the same weights, or none yet, and so cuts its own share: no broadcast.
    parallelize_module(model, tp, _tensor_parallel_plan(model.config), src_data_rank=None)
    model.tie()


def _tensor_parallel_plan(config: LlamaConfig) -> dict[str, ParallelStyle]:
    """Megatron-LM's split with sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198).

    Between the layers each rank has `T / tp` tokens, inside attention and feed-forward all tokens and its share of the
    heads and channels. The logits stay split over the vocabulary.
    """
    rows, all_rows = Shard(0), Replicate()
    # The norms of single heads: (T, groups of this rank, queries, D), one weight for all heads.
    own_heads = SequenceParallel(sequence_dim=1, use_local_output=True)
    of_heads = {f"blocks.*.attention.{name}": own_heads for name in ("query_norm", "key_norm")}
    return (of_heads if config.head_norms else {}) | {
        "embedding": RowwiseParallel(input_layouts=all_rows, output_layouts=rows),
        "blocks.*.attention_norm": SequenceParallel(sequence_dim=0),
        "blocks.*.attention.qkv": ColwiseParallel(input_layouts=rows),
        "blocks.*.attention.output": RowwiseParallel(output_layouts=rows),
        "blocks.*.mlp_norm": SequenceParallel(sequence_dim=0),
        "blocks.*.mlp.gate_up": ColwiseParallel(input_layouts=rows),
        "blocks.*.mlp.down": RowwiseParallel(output_layouts=rows),
        "norm": SequenceParallel(sequence_dim=0),
        "select": PrepareModuleInputOutput(
            input_layouts=(rows, None),
            desired_input_layouts=(all_rows, None),
            use_local_input=True,
            output_layouts=all_rows,
            desired_output_layouts=all_rows,
            use_local_output=False,
        ),
        "head": ColwiseParallel(input_layouts=rows, output_layouts=Shard(1), use_local_output=False),
    }


def _shard_data(model: Llama, mesh: DeviceMesh, compute_dtype: torch.dtype, reshard_after_forward: bool) -> None:
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # The root keeps embedding, norm and head together: tied, the two ends are one parameter. What it gathers is needed at
    # both ends of either pass, and so stays between them.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else a factor asks for an operation that gloo lacks
