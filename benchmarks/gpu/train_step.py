"""Compare the speed of one training step with other trainers, as rows of a Markdown table.

    python benchmarks/gpu/train_step.py [--shape 1b] [--capacity 16384] [--layers N] [--steps 20]
        [--recompute full] [--dp 1] [--tp 1] [--accumulate 1] [--equal]
        [--systems ours-bf16 hf-liger ...]

All systems train the same packs: conversations with log-normal lengths of mean 600 tokens, the last
60 % of each conversation in the loss, a vocabulary of 128,256; `--accumulate` packs a step and
data-parallel rank, AdamW, gradient clipping at 1.0, random weights. Each system runs in processes
of its own, one for each GPU; the median step counts, after 5 steps of warm-up. The peers need `pip
install trl liger-kernel` and an attention kernel for packed rows; `--attention` names the kernel in
transformers' spelling. They run with `--dp` alone, sharded by FSDP2.

The systems with "lora" in their names train adapters of rank 16 on all linear layers of a frozen
bf16 model; their peers need `pip install peft` as well. Their MFU counts 4 operations for a frozen
weight. Example: `--shape 8b --capacity 8192 --systems ours-lora hf-liger-lora trl-liger-lora`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from step_job import LORA, SIZES, Job, Result, packs, sizes
from step_ours import ours
from step_peers import hugging_face, trl

from trainer.llama.config import LlamaConfig
from trainer.llama.flops import model_flops, peak_flops, squared_lengths

SYSTEMS: dict[str, tuple[str, Callable[[Job], Result]]] = {
    "ours-default": ("sftstream, the defaults: fp32 weights, deterministic, compiled", ours),
    "ours-bf16": ("sftstream, bf16 weights, deterministic, compiled", ours),
    "ours-bf16-free": ("sftstream, bf16 weights, not deterministic, compiled", ours),
    "ours-bf16-plain": ("sftstream, bf16 weights, deterministic, not compiled", ours),
    "ours-bf16-sharded": ("sftstream, bf16 weights, deterministic, compiled, sharded over dp", ours),
    "ours-float8": ("sftstream, float8 products, bf16 weights, deterministic, compiled", ours),
    "ours-fp32-float8": ("sftstream, float8 products, fp32 weights, deterministic, compiled", ours),
    "ours-lora": ("sftstream, LoRA on a bf16 model, deterministic, compiled", ours),
    "ours-lora-free": ("sftstream, LoRA on a bf16 model, not deterministic, compiled", ours),
    "ours-qlora": ("sftstream, LoRA on a 4-bit model, deterministic, compiled", ours),
    "hf-liger": ("transformers and Liger, plain loop, bf16 weights", hugging_face),
    "hf-liger-fp32": ("transformers and Liger, plain loop, fp32 weights, autocast", hugging_face),
    "trl-liger": ("TRL SFTTrainer and Liger, bf16 weights", trl),
    "hf-liger-lora": ("transformers, peft and Liger, plain loop, LoRA on a bf16 model", hugging_face),
    "trl-liger-lora": ("TRL SFTTrainer, peft and Liger, LoRA on a bf16 model", trl),
}
FULL = [name for name in SYSTEMS if "lora" not in name]
"""Systems that train all weights."""


def run(job: Job, gpus: list[int] | None = None) -> Result | str:
    """Run a job in processes of its own, on the first GPUs or on `gpus`; return the result, or a
    line of the error."""
    command = [sys.executable, __file__, "--job", json.dumps(job._asdict())]
    if job.dp * job.tp > 1:
        ranks = ["--standalone", "--nproc-per-node", str(job.dp * job.tp)]
        command[1:1] = ["-m", "torch.distributed.run", *ranks]
    visible = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | visible)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        return next(iter(errors), f"exit code {done.returncode}")[:200]
    return Result(**json.loads(done.stdout.strip().splitlines()[-1]))


def versions() -> str:
    """Return the versions of all libraries in the comparison."""
    found = []
    for name in ("torch", "transformers", "trl", "liger-kernel", "peft", "flash-attn", "flash-attn-4"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def utilisation(job: Job, result: Result) -> float:
    """Return the model's operations of a step as a share of the GPU's bf16 peak (MFU)."""
    config, given = LlamaConfig(**sizes(job.shape, job.layers)), packs(job)
    counts = [(pack.tokens, pack.trained_tokens, squared_lengths(pack)) for pack in given]
    lora = LORA if "lora" in job.system else None
    operations = statistics.mean(model_flops(config, *numbers, lora) for numbers in counts)
    return operations * job.packs_a_step / job.tp / result.seconds / (peak_flops(device()) or math.inf)


def device() -> str:
    """Return the name of the GPU, or "CPU"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def row(job: Job, result: Result | str) -> str:
    """Return a line of the table."""
    name, ranks = SYSTEMS[job.system][0], f"dp {job.dp} x tp {job.tp}"
    if isinstance(result, str):
        return f"| {name} | {ranks} | | {result} | | | |"
    speed, peak = job.capacity * job.packs_a_step / job.tp / result.seconds, result.peak / 2**30
    figures = f"{speed:,.0f} | {1000 * result.seconds:.1f} | {utilisation(job, result):.1%} | {peak:.1f}"
    return f"| {name} | {ranks} | {result.attention} | {figures} |"


HEADER = "| system | ranks | attention | tokens/s a GPU | ms a step | MFU | peak GiB |\n|---|---|---|---|---|---|---|"


def main() -> None:
    """Print the table, or run a rank of a single job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SIZES), default="1b")
    parser.add_argument("--layers", type=int, help="layers of the model; default: all of the shape")
    parser.add_argument("--capacity", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--recompute", choices=["none", "full"], default="none", help="of all systems")
    parser.add_argument("--dp", type=int, default=1, help="data-parallel ranks")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--accumulate", type=int, default=1, help="packs of a step on a rank, of our systems")
    parser.add_argument("--equal", action="store_true", help="all ranks train on the same packs")
    parser.add_argument("--attention", default="flash_attention_4", help="the peers' kernel")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=FULL)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job = Job(**json.loads(arguments.job))
        result = SYSTEMS[job.system][1](job)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result._asdict()))
        return
    print(f"{device()}; {versions()}; {arguments.shape}, packs of {arguments.capacity}\n\n{HEADER}", flush=True)
    for system in arguments.systems:
        keys = {name: getattr(arguments, name) for name in Job._fields if name != "system"}
        job = Job(system=system, **keys)
        print(row(job, run(job)), flush=True)


if __name__ == "__main__":
    main()
