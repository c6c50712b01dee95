"""Compare the speed of one training step with other trainers, as rows of a Markdown table.

    python benchmarks/gpu/train_step.py [--shape 1b] [--capacity 16384] [--layers N] [--steps 20]
        [--systems ours-default ours-bf16 ours-compiled hf-liger trl-liger]

All systems train the same packs: conversations with log-normal lengths of mean 600 tokens, the last
60 % of each conversation in the loss, a vocabulary of 128,256; one pack a step, AdamW, gradient
clipping at 1.0, random weights. Each system runs in a process of its own; the median step counts,
after 5 steps of warm-up. The peers need `pip install trl liger-kernel` and an attention kernel for
packed rows; `--attention` names the kernel in transformers' spelling.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
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
from trainer.llama.blocks import prepare_blocks
from trainer.llama.config import LlamaConfig
from trainer.llama.parallel import build
from trainer.llama.sharding import local
from trainer.training.optimizer import OptimizerConfig, build_optimizer
from trainer.training.step import train_step

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


class Result(NamedTuple):
    """Median seconds of a step, and the peak of allocated GPU memory in bytes."""

    seconds: float
    peak: int


def sizes(job: Job) -> dict[str, Any]:
    """Return the model's sizes under the keys of `config.json`."""
    hidden, inner, layers, heads, tied = SIZES[job.shape]
    return {
        "vocab_size": VOCABULARY if job.shape != "tiny" else 1024,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": job.layers or layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "tie_word_embeddings": tied,
    }


def packs(job: Job) -> list[Pack]:
    """Return packs of conversations with log-normal lengths, filled to the capacity."""
    draw = np.random.default_rng(0)
    return [_pack(draw, job.capacity, sizes(job)["vocab_size"]) for _ in range(PACKS)]


def _pack(draw: np.random.Generator, capacity: int, vocabulary: int) -> Pack:
    lengths: list[int] = []
    while (room := capacity - sum(lengths)) > 0:
        lengths.append(min(room, max(8, int(draw.lognormal(np.log(600) - 0.5, 1.0)))))
    trained = np.concatenate([np.arange(length) >= 0.4 * length for length in lengths])
    borders = np.cumsum([0, *lengths], dtype=np.int32)
    segments = tuple(Segment(0, row, length, 0) for row, length in enumerate(lengths))
    return Pack(draw.integers(vocabulary, size=capacity, dtype=np.int32), trained, borders, segments)


def timed(step: Callable[[int], None], steps: int) -> Iterator[float]:
    """Yield the seconds of each step after the warm-up."""
    for number in range(WARM_UP + steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step(number)
        torch.cuda.synchronize()
        if number >= WARM_UP:
            yield time.perf_counter() - began


def ours(job: Job) -> Result:
    """Measure this trainer's step."""
    bf16, compiled = job.system != "ours-default", job.system == "ours-compiled"
    deterministic = job.system == "ours-default"
    given = packs(job)
    with determinism(deterministic), distributed("cuda", ParallelConfig()) as topology:
        model = build(
            LlamaConfig(**sizes(job)),
            topology.mesh,
            topology.device,
            capacity=job.capacity,
            compute_dtype=torch.bfloat16,
            weights_dtype=torch.bfloat16 if bf16 else torch.float32,
        )
        with torch.no_grad():
            for parameter in model.parameters():
                local(parameter).normal_(0, 0.02) if parameter.ndim > 1 else local(parameter).fill_(1)
        prepare_blocks(model, recompute="none", compiled=compiled)
        optimizer = build_optimizer(model, OptimizerConfig())

        def step(number: int) -> None:
            pack = given[number % PACKS]
            tokens = pack.trained_tokens
            train_step(model, optimizer, [pack], topology, trained_tokens=tokens, learning_rate=1e-5, clip=1.0)

        seconds = statistics.median(timed(step, job.steps))
        return Result(seconds, torch.cuda.max_memory_allocated())


def _liger_model(job: Job) -> Any:
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers import LlamaConfig as HuggingFaceConfig
    from transformers import LlamaForCausalLM

    config = HuggingFaceConfig(**sizes(job), attn_implementation=job.attention, dtype=torch.bfloat16)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    apply_liger_kernel_to_llama(model=model)
    return model.train()


def _unshifted_labels(pack: Pack) -> torch.Tensor:
    """Return labels as transformers expects: the token itself at trained positions, else -100."""
    labels = np.where(pack.trained, pack.ids, -100).astype(np.int64)
    labels[pack.borders[:-1]] = -100
    return torch.from_numpy(labels)


def hugging_face(job: Job) -> Result:
    """Measure a plain loop over a transformers model with Liger kernels."""
    model = _liger_model(job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
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
        model(**batches[number % PACKS], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    seconds = statistics.median(timed(step, job.steps))
    return Result(seconds, torch.cuda.max_memory_allocated())


def trl(job: Job) -> Result:
    """Measure TRL's SFTTrainer with Liger kernels, on rows that are packed already."""
    import datasets
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """Records the seconds of each step."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.began)

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
            gradient_checkpointing=False,
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
        )
        trainer.train()
    return Result(statistics.median(clock.seconds[WARM_UP:]), torch.cuda.max_memory_allocated())


SYSTEMS: dict[str, tuple[str, Callable[[Job], Result]]] = {
    "ours-default": ("sftstream, the defaults: fp32 weights, deterministic, plain layers", ours),
    "ours-bf16": ("sftstream, bf16 weights, plain layers", ours),
    "ours-compiled": ("sftstream, bf16 weights, compiled layers", ours),
    "hf-liger": ("transformers and Liger, plain loop, bf16 weights", hugging_face),
    "trl-liger": ("TRL SFTTrainer and Liger, bf16 weights", trl),
}


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
    for name in ("torch", "transformers", "trl", "liger-kernel", "flash-attn", "flash-attn-4"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def main() -> None:
    """Print the table, or run a single job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SIZES), default="1b")
    parser.add_argument("--layers", type=int, help="layers of the model; default: all of the shape")
    parser.add_argument("--capacity", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--attention", default="flash_attention_4", help="the peers' kernel")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job = Job(**json.loads(arguments.job))
        print(json.dumps(SYSTEMS[job.system][1](job)._asdict()))
        return
    print(f"{torch.cuda.get_device_name()}; {versions()}; {arguments.shape}, packs of {arguments.capacity}\n")
    print("| system | tokens/s | GiB |\n|---|---|---|", flush=True)
    for system in arguments.systems:
        job = Job(system, arguments.shape, arguments.layers, arguments.capacity, arguments.steps, arguments.attention)
        result = measured(job)
        if isinstance(result, str):
            print(f"| {SYSTEMS[system][0]} | {result} | |", flush=True)
        else:
            speed, peak = arguments.capacity / result.seconds, result.peak / 2**30
            print(f"| {SYSTEMS[system][0]} | {speed:,.0f} | {peak:.1f} |", flush=True)


if __name__ == "__main__":
    main()
