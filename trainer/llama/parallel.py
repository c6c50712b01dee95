"""Spread a Llama over a mesh: tensor parallelism (TP) inside layers, FSDP2 or replicas over "dp".

Example with `num_attention_heads` 4, `num_key_value_heads` 2 and `head_dim` 2: the fused matrix
`attention.qkv.weight` has 16 rows. On four ranks with "dp" 2 and "tp" 2, TP first gives each TP
rank one complete key-value group, then FSDP2 cuts the rows of each TP rank in two:

| rows   | heads of the rows | rank (dp, tp) | rows after FSDP2's gather over "dp" |
|--------|-------------------|---------------|-------------------------------------|
| 0-3    | q0, q1            | (0, 0)        | 0-7: q0, q1, k0, v0                 |
| 4-7    | k0, v0            | (1, 0)        | 0-7                                 |
| 8-11   | q2, q3            | (0, 1)        | 8-15: q2, q3, k1, v1                |
| 12-15  | k1, v1            | (1, 1)        | 8-15                                |

So a rank computes the attention of complete groups, without communication between TP ranks until
the output projection. The placements over ("dp", "tp") are
`(_StridedShard(0, split_factor=2), Shard(0))`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from trainer.llama.config import LlamaConfig
from trainer.llama.lora.layers import A, B, LoraConfig
from trainer.llama.lora.nf4 import Nf4Weight, require_blocks
from trainer.llama.model import Block, Llama
from trainer.llama.replicas import ReplicaSums
from trainer.llama.working import WorkingCopies


def build(
    config: LlamaConfig,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    capacity: int,
    compute_dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
    replicas: int = 1,
    lora: LoraConfig | None = None,
) -> Llama:
    """Return a Llama on `device`, spread by `parallelize`, with weights not yet set.

    The model is made without memory and allocated after the split: no rank ever holds more than its
    part. Parameters are stored in `weights_dtype`; with `lora` only frozen parameters are, and
    trained parameters in float32. Raises ValueError as `parallelize` does.
    """
    with torch.device("meta"):
        model = Llama(config, lora)
    for parameter in model.parameters():
        if lora is None or not parameter.requires_grad:
            parameter.data = parameter.data.to(weights_dtype)
    parallelize(
        model,
        mesh,
        capacity=capacity,
        compute_dtype=compute_dtype,
        reshard_after_forward=reshard_after_forward,
        replicas=replicas,
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
    replicas: int = 1,
) -> Llama:
    """Spread `model` over `mesh` in place, and return `model`.

    The mesh dimensions are "dp" and "tp". If "dp" is composed of "replicate" and "shard", weights
    are split over "shard" only. With as many `replicas` as the size of "dp", nothing is sharded
    over "dp", and FSDP2 is not used: layers compute with `WorkingCopies`, which sum gradients over
    "dp", or on a single rank of float32 weights and computation with the weights themselves.

    `capacity` is the tokens of a pack. Layers compute in `compute_dtype`, independent of the dtype
    of the parameters; gradients are summed in fp32. A model on "meta" is split without memory.

    Gradients are sums over "dp", not means. Under FSDP2 the gradients of weights that every rank of
    "tp" holds, such as norms, are summed over "tp" by FSDP2, in their own dtype; without it, by
    `gradient_norms`, once a step and in float32.

    Raises ValueError if the size of "tp" does not divide the model or the capacity.
    """
    tp = mesh["tp"]
    if tp.size() > 1:
        check_divisible(model.config, capacity, tp.size())
    if model.lora is not None and model.lora.quantize:
        require_blocks(model.config, tp.size())
    if tp.size() > 1:
        _shard_tensors(model, tp)
    dp = mesh["dp"]
    if dp.size() > replicas:
        _shard_data(model, _data_mesh(mesh), compute_dtype, reshard_after_forward)
    elif dp.size() > 1:
        model.register_forward_pre_hook(WorkingCopies(compute_dtype, ReplicaSums(dp.get_group())))
    elif {compute_dtype, *(parameter.dtype for parameter in model.parameters())} != {torch.float32}:
        model.register_forward_pre_hook(WorkingCopies(compute_dtype))
    return model


def _data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    names = mesh.mesh_dim_names or ()
    return mesh["replicate", "shard"] if "replicate" in names else mesh["dp"]


def check_divisible(config: LlamaConfig, capacity: int, tp: int) -> None:
    """Raise ValueError, with the possible sizes, if `tp` does not divide a size split by TP."""
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
    """Split the layers as Megatron-LM does, with sequence parallelism.

    Source: Korthikanti et al. 2022, arXiv:2205.05198. Between the layers a rank has `T / tp`
    tokens; inside attention and feed-forward a rank has all `T` tokens and `1 / tp` of the heads
    and channels. The logits stay split over the vocabulary.
    """
    gather, scatter = partial(_gather, tp.get_group()), partial(_scatter, tp.get_group())
    for path, module in model.named_modules():
        role = path.rpartition(".")[2]
        for name, parameter in module.named_parameters(recurse=False):
            # Every rank holds equal weights, or no memory yet, and cuts a part: no broadcast.
            split = distribute_tensor(parameter, tp, [placement_of(role, name)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(split, requires_grad=parameter.requires_grad))
        if isinstance(module, Block):
            module.tp, module.tp_rank = tp.size(), tp.get_local_rank()
        if isinstance(module, Nf4Weight):
            _shard_codes(module, tp, placement_of(path.split(".")[-2]))
        if role in ("qkv", "gate_up", "select"):
            module.register_forward_pre_hook(gather)
        if role in ("embedding", "output", "down"):
            module.register_forward_hook(scatter)
    model.tp = tp.size()
    model.tie()


def _shard_codes(weight: Nf4Weight, tp: DeviceMesh, placement: Placement) -> None:
    for name, buffer in list(weight.named_buffers()):
        follows = name in ("codes", "blocks") or (name in ("rows", "offsets") and placement == Shard(0))
        split = distribute_tensor(buffer, tp, [placement if follows else Replicate()], src_data_rank=None)
        weight.register_buffer(name, split, persistent=False)


def placement_of(role: str, name: str = "weight") -> Placement:
    """Return the placement of the parameter `name` over "tp".

    `role` is the last part of the module's name.
    """
    splits_columns = role in ("output", "down")
    # An adapter's other matrix meets only the rank, which is not split.
    if role.endswith("norm") or name == (B if splits_columns else A):
        return Replicate()
    return Shard(1) if splits_columns else Shard(0)


def _gather(group: dist.ProcessGroup, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gather the tokens of all ranks, `(T / tp, hidden_size)` to `(T, hidden_size)`."""
    return _Exchanged.apply(inputs[0], True, group.size(), group.group_name), *inputs[1:]  # type: ignore[no-untyped-call]


def _scatter(group: dist.ProcessGroup, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Sum the outputs over all ranks and keep the local tokens.

    `(T, hidden_size)` becomes `(T / tp, hidden_size)`.
    """
    return _Exchanged.apply(output, False, group.size(), group.group_name)  # type: ignore[no-any-return, no-untyped-call]


class _Exchanged(torch.autograd.Function):
    """All-gather or reduce-scatter of tokens; the backward pass runs the opposite on gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gathers: bool, size: int, group: str) -> Tensor:
        ctx.backward_arguments = not gathers, size, group
        return _exchange(x, gathers, size, group)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(upstream, *ctx.backward_arguments), None, None, None


def _exchange(x: Tensor, gathers: bool, size: int, group: str) -> Tensor:
    # The raw operations, because some functions of torch.distributed return a tensor subclass that
    # goes through Python until the wait, and the rest gave wrong gradients when compiled by torch
    # 2.11.
    ops, x = torch.ops._c10d_functional, x.contiguous()
    pending = (
        ops.all_gather_into_tensor(x, size, group) if gathers else ops.reduce_scatter_tensor(x, "sum", size, group)
    )
    return ops.wait_tensor(pending)  # type: ignore[no-any-return]


def _shard_data(model: Llama, mesh: DeviceMesh, compute_dtype: torch.dtype, reshard_after_forward: bool) -> None:
    # The loss's scale is an input in float32; all other inputs have the compute dtype already.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    if not model.config.tie_word_embeddings:  # then the head's exchanges run beside the layers
        fully_shard(model.head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        for method in ("loss", "token_losses"):
            register_fsdp_forward_method(model.head, method)
    # The root holds embedding and norm, with a tied head. Both ends of each pass need these
    # weights, so the weights stay gathered in between.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a factor alone needs an operation that gloo lacks


def reshard(model: nn.Module) -> None:
    """Free the gathered weights, which a pass without a backward pass leaves in memory."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
