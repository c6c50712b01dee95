"""Compare the speed of one training step with other trainers, as rows of a Markdown table.

    python benchmarks/gpu/train_step.py [--shape 1b] [--capacity 16384] [--layers N] [--steps 20]
        [--recompute full] [--systems ours-default ours-bf16 hf-liger trl-liger ...]

All systems train the same packs: conversations with log-normal lengths of mean 600 tokens, the last
60 % of each conversation in the loss, a vocabulary of 128,256; one pack a step, AdamW, gradient
clipping at 1.0, random weights. Each system runs in a process of its own; the median step counts,
after 5 steps of warm-up. The peers need `pip install trl liger-kernel` and an attention kernel for
packed rows; `--attention` names the kernel in transformers' spelling.

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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from sftstream import Pack, Segment
from trainer.distributed.determinism import determinism
from trainer.distributed.mesh import ParallelConfig, distributed
from trainer.llama.attention import Shape, choose_kernel
from trainer.llama.blocks import prepare_blocks
from trainer.llama.config import LlamaConfig
from trainer.llama.flops import model_flops, peak_flops, squared_lengths
from trainer.llama.init import init_adapters
from trainer.llama.lora.layers import LoraConfig
from trainer.llama.lora.nf4 import quantize, quantized
from trainer.llama.parallel import build
from trainer.llama.sharding import local
from trainer.training.optimizer import OptimizerConfig, build_optimizer
from trainer.training.step import train_step
from trainer.training.warm_up import warm_up

WARM_UP = 5
"""Steps before the measurement."""
PACKS = 4
"""Different packs, trained in turn."""
VOCABULARY = 128_256

SIZES = {
    "1b": (2048, 8192, 16, 32, True),
    "8b": (4096, 14336, 32, 32, False),
    "tiny": (64, 128, 2, 8, True),
}
"""Hidden size, size of the feed-forward, layers, query heads, tied embeddings: Llama 3.2 1B, Llama
3.1 8B, and a shape for tests."""


class Job(NamedTuple):
    """One system's measurement."""

    system: str
    shape: str
    layers: int | None
    capacity: int
    steps: int
    attention: str
    recompute: str = "none"


class Result(NamedTuple):
    """Median seconds of a step, peak of allocated GPU memory in bytes, attention kernel."""

    seconds: float
    peak: int
    attention: str


def sizes(shape: str, layers: int | None = None) -> dict[str, Any]:
    """Return the sizes of a model under the keys of `config.json`; `layers` are by default all."""
    hidden, inner, all_layers, heads, tied = SIZES[shape]
    return {
        "vocab_size": VOCABULARY if shape != "tiny" else 1024,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers or all_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "tie_word_embeddings": tied,
    }


def packs(job: Job) -> list[Pack]:
    """Return packs of conversations with log-normal lengths, filled to the capacity."""
    draw = np.random.default_rng(0)
    return [_pack(draw, job.capacity, sizes(job.shape)["vocab_size"]) for _ in range(PACKS)]


def _pack(draw: np.random.Generator, capacity: int, vocabulary: int) -> Pack:
    lengths: list[int] = []
    while (room := capacity - sum(lengths)) > 0:
        lengths.append(min(room, max(8, int(draw.lognormal(np.log(600) - 0.5, 1.0)))))
    trained = np.concatenate([np.arange(length) >= 0.4 * length for length in lengths])
    borders = np.cumsum([0, *lengths], dtype=np.int32)
    segments = tuple(Segment(0, row, length, 0) for row, length in enumerate(lengths))
    return Pack(draw.integers(vocabulary, size=capacity, dtype=np.int32), trained, borders, segments)


def timed(step: Callable[[int], None], steps: int) -> Iterator[float]:
    """Yield the seconds from the end of a step to the end of the next, after the warm-up."""
    before = time.perf_counter()
    for number in range(WARM_UP + steps):
        step(number)
        torch.cuda.synchronize()
        before, began = time.perf_counter(), before
        if number >= WARM_UP:
            yield before - began


class Ours(NamedTuple):
    """Settings of this trainer in a measurement."""

    weights: torch.dtype = torch.bfloat16
    deterministic: bool = True
    compiled: bool = True
    lora: LoraConfig | None = None
    float8: bool = False


LORA = LoraConfig(rank=16, alpha=32.0)
"""Adapters of the systems with "lora" in their names."""

OURS = {
    "ours-default": Ours(torch.float32),
    "ours-bf16": Ours(),
    "ours-bf16-free": Ours(deterministic=False),
    "ours-bf16-plain": Ours(compiled=False),
    "ours-float8": Ours(float8=True),
    "ours-fp32-float8": Ours(torch.float32, float8=True),
    "ours-lora": Ours(lora=LORA),
    "ours-lora-free": Ours(deterministic=False, lora=LORA),
    "ours-qlora": Ours(lora=LoraConfig(rank=16, alpha=32.0, quantize="nf4")),
}


def ours(job: Job) -> Result:
    """Measure this trainer's step."""
    settings, given = OURS[job.system], packs(job)
    config = LlamaConfig(**sizes(job.shape, job.layers))
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    with determinism(settings.deterministic), distributed("cuda", ParallelConfig()) as topology:
        heads = Shape(job.capacity, config.num_attention_heads, config.num_key_value_heads, config.head_size)
        kernel, passed = choose_kernel("auto", heads, device, dtype)
        print("attention", kernel.name, *passed, file=sys.stderr)
        model = build(
            config,
            topology.mesh,
            topology.device,
            capacity=job.capacity,
            compute_dtype=dtype,
            weights_dtype=settings.weights,
            lora=settings.lora,
        )
        with torch.no_grad():
            for parameter in model.parameters():
                local(parameter).normal_(0, 0.02) if parameter.ndim > 1 else local(parameter).fill_(1)
        init_adapters(model, 0)
        for matrix in quantized(model).values():
            rows, columns = matrix.shape
            whole = quantize(torch.randn(rows, columns, dtype=dtype, device=device) * 0.02)
            matrix.fill({"random": whole}, [("random", 0, 0, rows)], 0)
        prepare_blocks(
            model, recompute=job.recompute, compiled=settings.compiled, kernel=kernel, float8=settings.float8
        )
        if settings.compiled:
            warm_up(model, job.capacity, topology)
        optimizer = build_optimizer(model, OptimizerConfig())

        def step(number: int) -> None:
            pack = given[number % PACKS]
            tokens = pack.trained_tokens
            train_step(model, optimizer, [pack], topology, trained_tokens=tokens, learning_rate=1e-5, clip=1.0)

        seconds = statistics.median(timed(step, job.steps))
        return Result(seconds, torch.cuda.max_memory_allocated(), kernel.name)


def public_model(config: Any, device: str, weights: torch.dtype) -> Any:
    """Return a Llama of transformers with random weights."""
    from transformers import LlamaForCausalLM

    with torch.device(device):
        torch.set_default_dtype(weights)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model


def _liger_model(job: Job, weights: torch.dtype = torch.bfloat16) -> Any:
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers import LlamaConfig as HuggingFaceConfig

    config = HuggingFaceConfig(**sizes(job.shape, job.layers), attn_implementation=job.attention, dtype=weights)
    model = public_model(config, "cuda", weights)
    apply_liger_kernel_to_llama(model=model)
    if job.recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _peft_config() -> Any:
    from peft import LoraConfig as PeftConfig

    return PeftConfig(r=LORA.rank, lora_alpha=int(LORA.alpha), target_modules="all-linear", task_type="CAUSAL_LM")


def _adapted(model: Any) -> Any:
    """Return a model of transformers with trainable adapters on frozen weights."""
    from peft import get_peft_model

    model.enable_input_require_grads()  # for recomputation, which needs an input with a gradient
    return get_peft_model(model, _peft_config())


def _unshifted_labels(pack: Pack) -> torch.Tensor:
    """Return labels as transformers expects: the token itself at trained positions, else -100."""
    labels = np.where(pack.trained, pack.ids, -100).astype(np.int64)
    labels[pack.borders[:-1]] = -100
    return torch.from_numpy(labels)


def hugging_face(job: Job) -> Result:
    """Measure a plain loop over a transformers model with Liger kernels."""
    weights = torch.float32 if job.system == "hf-liger-fp32" else torch.bfloat16
    model = _liger_model(job, weights)
    if "lora" in job.system:
        model = _adapted(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    batches = [
        {
            "input_ids": pack.input_ids.cuda()[None],
            "position_ids": pack.position_ids.cuda()[None],
            "labels": _unshifted_labels(pack).cuda()[None],
            "cu_seq_lens_q": pack.cu_seqlens.cuda(),
            "cu_seq_lens_k": pack.cu_seqlens.cuda(),
            "max_length_q": pack.max_seqlen,
            "max_length_k": pack.max_seqlen,
        }
        for pack in packs(job)
    ]

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        # Adapters are float32, as peft makes them.
        with torch.autocast("cuda", torch.bfloat16, enabled=weights == torch.float32 or "lora" in job.system):
            loss = model(**batches[number % PACKS], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    seconds = statistics.median(timed(step, job.steps))
    return Result(seconds, torch.cuda.max_memory_allocated(), job.attention)


def trl(job: Job) -> Result:
    """Measure TRL's SFTTrainer with Liger kernels, on rows that are packed already."""
    import datasets
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """Records the end of each step."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    rows = [
        {
            "input_ids": pack.ids.tolist(),
            "labels": _unshifted_labels(pack).tolist(),
            "seq_lengths": [segment.length for segment in pack.segments],
        }
        for pack in packs(job)
    ]
    words = Tokenizer(WordLevel({"<eos>": 0}, unk_token="<eos>"))
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        config = SFTConfig(
            output_dir=directory,
            max_steps=WARM_UP + job.steps,
            per_device_train_batch_size=1,
            learning_rate=1e-5,
            max_grad_norm=1.0,
            padding_free=True,
            max_length=None,
            bf16=True,
            gradient_checkpointing=job.recompute == "full",
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_liger_kernel=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            optim="adamw_torch_fused",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=_liger_model(job),
            args=config,
            train_dataset=datasets.Dataset.from_list(rows * (1 + (WARM_UP + job.steps) // PACKS)),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>"),
            callbacks=[clock],
            peft_config=_peft_config() if "lora" in job.system else None,
        )
        trainer.train()
    return Result(
        statistics.median(np.diff(clock.ends)[WARM_UP - 1 :]), torch.cuda.max_memory_allocated(), job.attention
    )


SYSTEMS: dict[str, tuple[str, Callable[[Job], Result]]] = {
    "ours-default": ("sftstream, the defaults: fp32 weights, deterministic, compiled", ours),
    "ours-bf16": ("sftstream, bf16 weights, deterministic, compiled", ours),
    "ours-bf16-free": ("sftstream, bf16 weights, not deterministic, compiled", ours),
    "ours-bf16-plain": ("sftstream, bf16 weights, deterministic, not compiled", ours),
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


def measured(job: Job) -> Result | str:
    """Run a job in a process of its own; return the result, or the last line of the error."""
    command = [sys.executable, __file__, "--job", json.dumps(job._asdict())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
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
    return operations / result.seconds / (peak_flops(torch.cuda.get_device_name()) or math.inf)


def main() -> None:
    """Print the table, or run a single job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SIZES), default="1b")
    parser.add_argument("--layers", type=int, help="layers of the model; default: all of the shape")
    parser.add_argument("--capacity", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--recompute", choices=["none", "full"], default="none", help="of all systems")
    parser.add_argument("--attention", default="flash_attention_4", help="the peers' kernel")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=FULL)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job = Job(**json.loads(arguments.job))
        print(json.dumps(SYSTEMS[job.system][1](job)._asdict()))
        return
    print(f"{torch.cuda.get_device_name()}; {versions()}; {arguments.shape}, packs of {arguments.capacity}\n")
    print("| system | attention | tokens/s | ms a step | MFU | peak GiB |\n|---|---|---|---|---|---|", flush=True)
    for system in arguments.systems:
        keys = {name: getattr(arguments, name) for name in Job._fields if name != "system"}
        job = Job(system=system, **keys)
        result = measured(job)
        if isinstance(result, str):
            print(f"| {SYSTEMS[system][0]} | | {result} | | | |", flush=True)
        else:
            speed, peak = arguments.capacity / result.seconds, result.peak / 2**30
            figures = f"{speed:,.0f} | {1000 * result.seconds:.1f} | {utilisation(job, result):.1%} | {peak:.1f}"
            print(f"| {SYSTEMS[system][0]} | {result.attention} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
