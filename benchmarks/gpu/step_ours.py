"""The measured training step of this trainer."""

from __future__ import annotations

import sys
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from step_job import LORA, PACKS, Job, Result, measured, packs, sizes

from trainer.choices import with_memory_settings
from trainer.config import TrainConfig
from trainer.config_file import parse_config
from trainer.distributed.determinism import determinism
from trainer.distributed.mesh import distributed
from trainer.estimate import PLANNED_MEMORY
from trainer.llama.attention import Shape, choose_kernel
from trainer.llama.blocks import prepare_blocks, use_kernel
from trainer.llama.config import LlamaConfig
from trainer.llama.init import init_adapters
from trainer.llama.lora.layers import LoraConfig
from trainer.llama.lora.nf4 import quantize, quantized
from trainer.llama.model import Llama
from trainer.llama.parallel import build
from trainer.llama.sharding import local
from trainer.training.optimizer import OptimizerConfig, build_optimizer
from trainer.training.step import train_step
from trainer.training.warm_up import warm_up


class Ours(NamedTuple):
    """Settings of this trainer in a measurement."""

    weights: torch.dtype = torch.bfloat16
    deterministic: bool = True
    compiled: bool = True
    lora: LoraConfig | None = None
    float8: bool = False
    replicas: int | Literal["auto"] = "auto"


OURS = {
    "ours-default": Ours(torch.float32),
    "ours-bf16": Ours(),
    "ours-bf16-free": Ours(deterministic=False),
    "ours-bf16-plain": Ours(compiled=False),
    "ours-bf16-sharded": Ours(replicas=1),
    "ours-float8": Ours(float8=True),
    "ours-fp32-float8": Ours(torch.float32, float8=True),
    "ours-lora": Ours(lora=LORA),
    "ours-lora-free": Ours(deterministic=False, lora=LORA),
    "ours-qlora": Ours(lora=LoraConfig(rank=16, alpha=32.0, quantize="nf4")),
}


def trainer_config(job: Job) -> TrainConfig:
    """Return the config of a run with the work of `job`."""
    settings, model = OURS[job.system], sizes(job.shape, job.layers)
    tables: dict[str, Any] = {
        "run": {
            "steps": 1,
            "weights_dtype": str(settings.weights).removeprefix("torch."),
            "recompute": job.recompute,
            "float8": settings.float8,
        },
        "data": {
            "sources": [{"path": "rows.jsonl"}],
            "tokenizer": {"path": "."},
            "capacity": job.capacity,
            "global_batch": job.dp * job.accumulate,
        },
        "model": model if settings.lora is None else {"init_from": "model"},
        "parallel": {"tp": job.tp, "replicas": settings.replicas},
    }
    if settings.lora is not None:
        tables["lora"] = msgspec.to_builtins(settings.lora)
    config = parse_config(tables)
    size = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else PLANNED_MEMORY
    return with_memory_settings(config, LlamaConfig(**model), job.dp * job.tp, size)


def ours(job: Job) -> Result:
    """Measure this trainer's step on this rank."""
    settings, parallel = OURS[job.system], trainer_config(job).parallel
    config = LlamaConfig(**sizes(job.shape, job.layers))
    with determinism(settings.deterministic), distributed("auto", parallel) as topology:
        device = topology.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        heads, groups = config.num_attention_heads // job.tp, config.num_key_value_heads // job.tp
        kernel, passed = choose_kernel("auto", Shape(job.capacity, heads, groups, config.head_size), device, dtype)
        print("attention", kernel.name, *passed, file=sys.stderr)
        model = build(
            config,
            topology.mesh,
            device,
            capacity=job.capacity,
            compute_dtype=dtype,
            weights_dtype=settings.weights,
            reshard_after_forward=parallel.reshards,
            replicas=parallel.groups,
            lora=settings.lora,
        )
        _draw(model, dtype)
        prepare_blocks(model, recompute=job.recompute, compiled=settings.compiled, float8=settings.float8)
        if settings.compiled:
            warm_up(model, job.capacity, topology)
        use_kernel(model, kernel)
        optimizer = build_optimizer(model, OptimizerConfig())
        of_ranks = [packs(job, rank) for rank in range(job.dp)]
        mine = of_ranks[topology.shard.index]

        def step(number: int) -> None:
            turns = [(number * job.accumulate + n) % PACKS for n in range(job.accumulate)]
            tokens = sum(given[turn].trained_tokens for given in of_ranks for turn in turns)
            taken = [mine[turn] for turn in turns]
            train_step(model, optimizer, taken, topology, trained_tokens=tokens, learning_rate=1e-5, clip=1.0)

        return measured(step, job.steps, kernel.name)


@torch.no_grad()
def _draw(model: Llama, dtype: torch.dtype) -> None:
    """Set random weights, drawn on the device."""
    for parameter in model.parameters():
        local(parameter).normal_(0, 0.02) if parameter.ndim > 1 else local(parameter).fill_(1)
    init_adapters(model, 0)
    for matrix in quantized(model).values():
        codes = local(matrix.codes)
        rows, columns = len(codes), 2 * codes.shape[1]
        whole = quantize(torch.randn(rows, columns, dtype=dtype, device=codes.device) * 0.02)
        matrix.fill({"random": whole}, [("random", 0, 0, rows)], 0)
