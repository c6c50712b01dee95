"""A finished Llama spread over a mesh: tensor parallelism inside its layers, sharded data parallelism around them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from trainer.llama.config import LlamaConfig
from trainer.llama.model import Llama


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
    """Megatron-LM's split with sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198).

    Between the layers each rank has `T / tp` tokens, inside attention and feed-forward all tokens and its share of the
    heads and channels. The logits stay split over the vocabulary.
    """
    gather, scatter = partial(_gather, tp.get_group()), partial(_scatter, tp.get_group())
    for path, module in model.named_modules():
        role = path.rpartition(".")[2]
        for name, parameter in module.named_parameters(recurse=False):
            # Every rank holds the same weights, or none yet, and so cuts its own share: no broadcast.
            share = distribute_tensor(parameter, tp, [_placement(role)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(share))
        if role in ("qkv", "gate_up", "select"):
            module.register_forward_pre_hook(gather)
        if role in ("embedding", "output", "down"):
            module.register_forward_hook(scatter)
    model.tie()


def _placement(role: str) -> Placement:
    if role.endswith("norm"):
        return Replicate()
    return Shard(1) if role in ("output", "down") else Shard(0)


def _gather(group: dist.ProcessGroup, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tokens of all ranks, for a module that has a share of the channels."""
    return _Exchanged.apply(inputs[0], True, group.size(), group.group_name), *inputs[1:]  # type: ignore[no-untyped-call]


def _scatter(group: dist.ProcessGroup, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Of this rank's tokens the sum of what all ranks made of them."""
    return _Exchanged.apply(output, False, group.size(), group.group_name)  # type: ignore[no-any-return, no-untyped-call]


class _Exchanged(torch.autograd.Function):
    """Tokens gathered or summed and scattered; their gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gathers: bool, size: int, group: str) -> Tensor:
        ctx.back = not gathers, size, group
        return _exchange(x, gathers, size, group)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(upstream, *ctx.back), None, None, None


def _exchange(x: Tensor, gathers: bool, size: int, group: str) -> Tensor:
    # The operations themselves. Of `torch.distributed`'s functions some return a class of tensor that goes through Python until
    # it is waited for, and the others, compiled by torch 2.11, gave wrong gradients.
    ops, x = torch.ops._c10d_functional, x.contiguous()
    under_way = (
        ops.all_gather_into_tensor(x, size, group) if gathers else ops.reduce_scatter_tensor(x, "sum", size, group)
    )
    return ops.wait_tensor(under_way)  # type: ignore[no-any-return]


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
