"""AdamW with states of 8 bits: that of torchao, on any topology."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import runs
import torch
from gloo_ranks import run_ranks
from tiny_llama import CONFIG
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh

from trainer.config_file import parse_config
from trainer.llama.init import init_weights
from trainer.llama.model import Llama
from trainer.llama.parallel import build
from trainer.llama.sharding import gather_full, local
from trainer.memory import memory
from trainer.training.adamw8bit import AdamW8bit, block_of, block_size
from trainer.training.optimizer import OptimizerConfig, build_optimizer, clipped_step, global_norm

torchao = pytest.importorskip("torchao.optim")

EIGHT_BITS = OptimizerConfig(kind="adamw8bit", learning_rate=0.01, weight_decay=0.1)
WIDE = msgspec.structs.replace(CONFIG, hidden_size=512, intermediate_size=512, num_hidden_layers=1)
"""A model whose matrices have rows of 512 numbers."""


def gradients(model: Llama, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=draw) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("numel", "rows", "expected"),
    [
        (4096, (4, 1024), 256),
        (4096, (0, 1024), 256),  # an empty part has the blocks of the others
        (4096, (32, 128), 128),
        (57344, (64, 896), 128),
        (36864, (64, 576), 64),
        (6400, (64, 100), None),
        (4095, (3, 1365), None),
        (4096, (4096,), None),
    ],
)
def test_a_block_is_the_largest_that_divides_the_rows_of_a_large_matrix(
    numel: int, rows: tuple[int, ...], expected: int | None
) -> None:
    assert block_size(numel, rows) == expected


@pytest.mark.parametrize("clip", [None, 1.0])
def test_steps_equal_those_of_torchao_to_the_bit(clip: float | None) -> None:
    model = Llama(WIDE)
    init_weights(model, 0)
    theirs = {name: torch.nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    groups = [
        {"params": [p for p in theirs.values() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    reference = torchao.AdamW8bit(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    optimizer = build_optimizer(model, EIGHT_BITS)
    for step in range(2):
        for name, gradient in gradients(model, step).items():
            model.get_parameter(name).grad, theirs[name].grad = gradient.clone(), gradient
        norm = global_norm(model.parameters())
        if clip is not None:
            for parameter in theirs.values():
                parameter.grad /= norm
        clipped_step(optimizer, norm, clip)
        with torch.compiler.set_stance("force_eager"):
            reference.step()
    quantized = [name for name, p in model.named_parameters() if block_of(p)]
    assert len(quantized) == 4 + 2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
        if name in quantized:
            mine, other = optimizer.state[parameter], reference.state[theirs[name]]["exp_avg"]
            assert torch.equal(mine["exp_avg_codes"], other.codes)
            assert torch.equal(mine["exp_avg_scales"].view(-1), other.scale)


def stepped(rank: int, dp: int, tp: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the weights and the state after two steps, gathered."""
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    model = build(WIDE, mesh, torch.device("cpu"), capacity=16)
    init_weights(model, 0)
    optimizer = build_optimizer(model, EIGHT_BITS)
    for factor in (0.5, -2.0):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * factor
        optimizer.step()
    state = get_optimizer_state_dict(model, optimizer)["state"]
    return (
        {name: gather_full(p.detach()).numpy().copy() for name, p in model.named_parameters()},
        {f"{n}.{k}": gather_full(t).numpy().copy() for n, held in state.items() for k, t in held.items()},
    )


def test_every_topology_takes_the_same_step_and_has_the_same_state_to_the_bit() -> None:
    (expected,) = run_ranks(1, stepped, 1, 1)
    assert expected[1]["blocks.0.mlp.down.weight.exp_avg_codes"].dtype == np.uint8
    assert expected[1]["blocks.0.mlp.down.weight.exp_avg_scales"].shape == (512, 2)
    for dp, tp in ((2, 1), (1, 2)):
        for found in run_ranks(2, stepped, dp, tp):
            for mine, theirs in zip(found, expected, strict=True):
                assert mine.keys() == theirs.keys()
                for name, tensor in mine.items():
                    assert np.array_equal(tensor, theirs[name]), f"{name} with dp {dp}, tp {tp}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_has_the_types_and_bits_of_the_saved_one(dtype: torch.dtype) -> None:
    model = Llama(WIDE).to(dtype)
    init_weights(model, 0)
    first, second = (build_optimizer(model, EIGHT_BITS) for _ in range(2))
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.3
    first.step()
    saved = get_optimizer_state_dict(model, first)
    set_optimizer_state_dict(model, second, saved)
    assert isinstance(second, AdamW8bit)
    for parameter in model.parameters():
        mine, theirs = first.state[parameter], second.state[parameter]
        assert mine.keys() == theirs.keys()
        assert all(mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]) for key in mine)


def config_of(directory: Path, tokenizer: str, **changes: dict[str, Any]) -> dict[str, Any]:
    shape = {"hidden_size": 128, "intermediate_size": 256}
    config = runs.run_config(tokenizer, runs.sources(directory), **changes)
    config["model"] = config["model"] | shape
    config["optimizer"] = {"kind": "adamw8bit", "learning_rate": 1e-3}
    return config


def test_a_killed_run_resumes_to_the_bit_and_its_checkpoint_has_plain_tensors(tmp_path: Path, tokenizer: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        directory.mkdir()
    config = config_of(whole, tokenizer, run={"steps": 6})
    runs.run(whole, config, processes=2)
    job = runs.Job(killed, config, processes=2)
    runs.wait_for((killed / "runs" / "run" / "checkpoints" / "step-00000004").exists, job)
    job.kill()
    runs.run(killed, config, processes=2)
    assert runs.outcome(killed) == runs.outcome(whole)
    from checkpoints import CheckpointStore

    tensors = CheckpointStore(whole / "runs" / "run" / "checkpoints").manifest(6).tensors
    down = {name.rpartition(".")[2]: spec for name, spec in tensors.items() if "state.blocks.0.mlp.down" in name}
    assert {name: (spec.dtype, tuple(spec.shape)) for name, spec in down.items()} == {
        "exp_avg_codes": ("U8", (128, 256)),
        "exp_avg_scales": ("F32", (128, 1)),
        "exp_avg_sq_codes": ("U8", (128, 256)),
        "exp_avg_sq_scales": ("F32", (128, 1)),
        "step": ("F32", ()),
    }


def test_another_topology_goes_on_where_its_blocks_agree_and_is_refused_with_the_reason_where_not(
    tmp_path: Path, tokenizer: str
) -> None:
    config = config_of(tmp_path, tokenizer, run={"steps": 2})
    runs.run(tmp_path, config)
    more = config | {"run": config["run"] | {"steps": 4}}
    runs.run(tmp_path, more, processes=2)  # rows are cut, blocks are not
    assert len(runs.metrics(tmp_path)) == 4
    # A row of 128 numbers is a block, and half a row is a block of 64.
    split = config | {"run": config["run"] | {"steps": 6}, "parallel": {"tp": 2}}
    job = runs.Job(tmp_path, split, processes=2)
    assert job.finish() == 1
    assert (
        "the checkpoint's optimizer state of blocks.0.attention.output.weight is quantized in blocks of 128 numbers, and on "
        "this topology quantized in blocks of 64 numbers, since parallel.tp = 2 cuts its rows in other parts; set "
        "parallel.tp = 1 as the checkpoint, with any number of data-parallel ranks"
    ) in job.output()
    runs.run(tmp_path, split | {"parallel": {"tp": 1}})


def test_a_plan_counts_codes_and_scales(tokenizer: str) -> None:
    def optimizer_bytes(kind: str, tp: int) -> int:
        table = runs.run_config(tokenizer, "rows.jsonl", optimizer={"kind": kind}, parallel={"tp": tp})
        table["run"] |= {"weights_dtype": "float32", "recompute": "none"}
        return memory(parse_config(table), WIDE, tp)["optimizer"]

    def bytes_of_states(tp: int) -> int:
        return sum(run_ranks(tp, state_bytes, tp)[:1])

    for tp in (1, 2):
        assert optimizer_bytes("adamw8bit", tp) == bytes_of_states(tp)
        assert optimizer_bytes("adamw8bit", tp) < 0.3 * optimizer_bytes("adamw", tp)


def state_bytes(rank: int, tp: int) -> int:
    mesh = init_device_mesh("cpu", (1, tp), mesh_dim_names=("dp", "tp"))
    model = build(WIDE, mesh, torch.device("cpu"), capacity=16)
    optimizer = build_optimizer(model, EIGHT_BITS)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    return sum(local(t).numel() * t.dtype.itemsize for t in held)
