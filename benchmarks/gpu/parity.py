"""Measure parity with transformers and its price, as Markdown.

    python benchmarks/gpu/parity.py > benchmarks/gpu/parity.md

Model families over ranks on a CPU with gloo. Then, with a GPU, a Llama of 1B: parity in bfloat16,
compiled layers over 50 packs with different segments, the price of determinism, and estimated
against measured memory.
"""

from __future__ import annotations

import gc
import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.multiprocessing as mp
import transformers
from packs import random_packs

from sftstream import Pack
from trainer.comparison import CAPACITY, Check, compare
from trainer.config_file import parse_config
from trainer.distributed.determinism import determinism
from trainer.distributed.mesh import ParallelConfig, Topology, distributed
from trainer.estimate import estimate
from trainer.llama.blocks import prepare_blocks
from trainer.llama.config import LlamaConfig
from trainer.llama.hf_config import read_config
from trainer.llama.init import init_weights
from trainer.llama.model import Llama
from trainer.llama.parallel import build
from trainer.llama.weights import load_weights
from trainer.training.optimizer import OptimizerConfig, build_optimizer
from trainer.training.step import train_step

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama 2": {"num_key_value_heads": 8},
    "Llama 3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "Llama 3.2, tied": {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "Mistral": {"model_type": "mistral", "sliding_window": None},
    "Qwen2": {"model_type": "qwen2"},
    "Qwen3": {"model_type": "qwen3", "head_dim": 16},
}
SMALL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
ONE_B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
    initializer_range=0.02,
)
CAPACITY_OF_A_GPU = 16384
SPREADS = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 4: [(1, 4), (2, 2)]}


def save_public(directory: Path, **keys: Any) -> Path:
    """Save a transformers model with random weights, including norms and biases; return its
    directory."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**keys))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    return directory


def loaded(directory: Path, topology: Topology, dtype: torch.dtype) -> Llama:
    model = build(read_config(directory), topology.mesh, topology.device, capacity=CAPACITY, compute_dtype=dtype)
    load_weights(model, directory)
    return model


def on_a_rank(rank: int, ranks: int, port: int, tp: int, jobs: list[tuple[str, str]], results: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    with distributed("cpu", ParallelConfig(tp=tp)) as topology:
        for directory, name in jobs:
            dtype = getattr(torch, name)
            checks = compare(loaded(Path(directory), topology, dtype), Path(directory), topology, dtype)
            if topology.first:
                results.put([tuple(check) for check in checks])


def families_on_a_cpu() -> None:
    spreads = [(dp, tp) for spreads in SPREADS.values() for dp, tp in spreads]
    print(
        "Errors of logits / loss / gradients, for the tensor nearest to its limit (`trainer/parity.py`); in float32 the"
    )
    print("greedy tokens are equal too.\n")
    print("| family | computed in | " + " | ".join(f"dp {dp} x tp {tp}" for dp, tp in spreads) + " |")
    print("|---|---|" + "---|" * len(spreads))
    with tempfile.TemporaryDirectory() as root:
        jobs = [
            (name, str(save_public(Path(root) / str(number), **(SMALL | keys))), dtype)
            for number, (name, keys) in enumerate(FAMILIES.items())
            for dtype in ("float32", "bfloat16")
        ]
        columns = [_over_ranks(dp, tp, [job[1:] for job in jobs]) for dp, tp in spreads]
    for (name, _, dtype), *cells in zip(jobs, *columns, strict=True):
        print(f"| {name} | {dtype} | " + " | ".join(cells) + " |")


def _over_ranks(dp: int, tp: int, jobs: list[tuple[str, str]]) -> list[str]:
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(on_a_rank, (dp * tp, _free_port(), tp, jobs, results), nprocs=dp * tp)
    return [_cell([Check(*check) for check in results.get()]) for _ in jobs]


def _cell(checks: list[Check]) -> str:
    errors = " / ".join(f"{check.error:.0e}" for check in checks[:3])
    return errors if all(check.holds for check in checks) else f"{errors}: DOES NOT HOLD"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Trial:
    """A model that steps over packs, one pack per step."""

    def __init__(self, shape: LlamaConfig, topology: Topology, capacity: int, **ways: Any) -> None:
        dtype = torch.bfloat16 if topology.device.type == "cuda" else torch.float32
        self.topology = topology
        self.model = build(
            shape,
            topology.mesh,
            topology.device,
            capacity=capacity,
            compute_dtype=dtype,
            weights_dtype=getattr(torch, ways.get("weights_dtype", "float32")),
        )
        init_weights(self.model, 0)
        prepare_blocks(self.model, recompute=ways.get("recompute", "none"), compiled=ways.get("compile", False))
        self.optimizer = build_optimizer(self.model, OptimizerConfig())

    def step(self, pack: Pack) -> float:
        """Run one step; return seconds, including the device's work."""
        began = time.perf_counter()
        train_step(  # waits for the device at its end
            self.model,
            self.optimizer,
            [pack],
            self.topology,
            trained_tokens=pack.trained_tokens,
            learning_rate=1e-5,
            clip=1.0,
        )
        return time.perf_counter() - began


def compiled_without_recompiles(shape: LlamaConfig, topology: Topology, capacity: int) -> None:
    torch._dynamo.reset()
    trial, (first, second, *packs) = Trial(shape, topology, capacity, compile=True), random_packs(shape, capacity, 52)
    warm_up = trial.step(first) + trial.step(second)
    with torch._dynamo.config.patch(error_on_recompile=True):
        seconds = [trial.step(pack) for pack in packs]
    plain = Trial(shape, topology, capacity)
    before = [plain.step(pack) for pack in (first, second, *packs)][2:]
    faster = statistics.median(before) / statistics.median(seconds)
    print(f"Compiled: 0 recompiles over {len(packs)} packs of 3 to 52 conversations (a recompile would be an error);")
    print(f"warm-up {warm_up:.0f} s; a step takes 1/{faster:.2f} of the time of a plain step (medians).\n")


def price_of_determinism(shape: LlamaConfig, topology: Topology, capacity: int) -> None:
    packs, medians, ends = random_packs(shape, capacity, 12), {}, []
    for wanted in (False, True, True):
        with determinism(wanted):
            trial = Trial(shape, topology, capacity)
            medians[wanted] = statistics.median([trial.step(pack) for pack in packs][2:])
            ends.append([parameter.detach().clone().cpu() for parameter in trial.model.parameters()])
        del trial
        gc.collect()  # modules and hooks hold one another
    equal = all(torch.equal(a, b) for a, b in zip(ends[1], ends[2], strict=True))
    print(
        f"Deterministic: {len(packs)} steps twice give {'equal' if equal else 'DIFFERENT'} bits, at "
        f"{medians[True] / medians[False]:.3f} times the time of non-deterministic steps (medians).\n"
    )


WAYS = [{"weights_dtype": w, "recompute": r} for w in ("float32", "bfloat16") for r in ("none", "selective", "full")]


def estimated_and_measured_memory(shape: LlamaConfig, topology: Topology, capacity: int, *planned: float) -> None:
    """Print estimated and measured memory; `planned` is GiB for each of `WAYS`."""
    print("| weights | recompute | estimated, GiB | held at most, GiB | step, relative |")
    print("|---|---|---|---|---|")
    packs, first = random_packs(shape, capacity, 8), 0.0
    for way, size in zip(WAYS, planned, strict=True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        trial = Trial(shape, topology, capacity, **way)
        seconds = statistics.median([trial.step(pack) for pack in packs][2:])
        held = torch.cuda.max_memory_allocated() / 2**30
        first = first or seconds
        print(f"| {way['weights_dtype']} | {way['recompute']} | {size:.2f} | {held:.2f} | {seconds / first:.2f} |")
        del trial
        gc.collect()  # modules and hooks hold one another


def _estimated(shape: LlamaConfig, capacity: int, ways: dict[str, str]) -> float:
    data = {"sources": [{"path": "none"}], "tokenizer": {"path": "none"}, "capacity": capacity, "global_batch": 1}
    tables = {"run": {"steps": 1, **ways}, "data": data | {"streams": 1}, "model": msgspec.to_builtins(shape)}
    return sum(estimate(parse_config(tables), shape, 1).memory.values()) / 2**30


def _alone(_: int, work: Callable[..., None], arguments: list[float]) -> None:
    with distributed("auto", ParallelConfig()) as topology:
        work(ONE_B, topology, *arguments)


def one_b_parity(shape: LlamaConfig, topology: Topology) -> None:
    keys = {
        key: value for key, value in msgspec.to_builtins(shape).items() if value is not None and key != "rope_theta"
    }
    dtype = torch.bfloat16 if topology.device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as root:
        directory = save_public(Path(root), **keys)
        checks = compare(loaded(directory, topology, dtype), directory, topology, dtype)
    print(f"| {dtype} | error | limit | holds | worst in |\n|---|---|---|---|---|")
    for check in checks:
        print(
            f"| {check.subject} | {check.error:.1e} | {check.limit:.1e} | {'yes' if check.holds else 'NO'} | {check.tensor} |"
        )


def main() -> None:
    gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPUs"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    print("# Parity with transformers\n")
    print(f"`python benchmarks/gpu/parity.py`, {time.strftime('%Y-%m-%d')}; {where}; {versions}.\n")
    print("## Over ranks, on a CPU\n")
    families_on_a_cpu()
    if not gpu:
        return
    print("\n## A Llama of 1B on the GPU\n")
    for work, *arguments in (
        (one_b_parity,),
        (compiled_without_recompiles, CAPACITY_OF_A_GPU),
        (price_of_determinism, CAPACITY_OF_A_GPU),
        # Estimated here: an estimate uses a fake process group, a trial a real one.
        (
            estimated_and_measured_memory,
            CAPACITY_OF_A_GPU,
            *(_estimated(ONE_B, CAPACITY_OF_A_GPU, way) for way in WAYS),
        ),
    ):
        print(flush=True)
        mp.spawn(
            _alone, (work, arguments), nprocs=1
        )  # in a new process: memory and compiled code must not leak into the next work


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
