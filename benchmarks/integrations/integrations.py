"""Feed other trainers by their own preparation and by ours, on the same conversations. Prints a
Markdown table.

    python benchmarks/integrations/integrations.py [--rows 20000] [--rounds 3] [--data DIRECTORY]

Needs `trl`. The steps of the trainers are replaced by steps that compute nothing, so that only the
data is measured. README.md describes the method.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "pipeline"))

from environment import ONE_THREAD, QUIET

os.environ |= ONE_THREAD | QUIET  # before importing the libraries: each reads its variables once

import msgspec
from corpus import Job, find_data, prepare

PACKAGES = ("torch", "tokenizers", "fastokens", "transformers", "accelerate", "trl", "datasets")
ACCUMULATED = 8
"""Packs of a step."""
COLUMNS = (
    "Trainer, prepared by",
    "to the first step, CPU s",
    "first epoch, conversations per CPU-second",
    "after the first step",
)


class Clock:
    """CPU times of the first and the last step since `start`."""

    def __init__(self) -> None:
        self.start = time.process_time()
        self.first = self.last = 0.0

    def step(self) -> None:
        self.last = time.process_time() - self.start
        self.first = self.first or self.last


def timed(trainer_class: Any, clock: Clock) -> Any:
    """Return a class of trainer whose steps only read the clock."""
    import torch

    class Timed(trainer_class):
        def training_step(self, *_: Any, **__: Any) -> torch.Tensor:
            clock.step()
            return torch.zeros(())

    return Timed


def settings(job: Job, **more: Any) -> dict[str, Any]:
    """Return the training arguments that all systems share."""
    return {
        "output_dir": f"{job.directory}/out",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": ACCUMULATED,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "activation_checkpointing": False,
        **more,
    }


def model_and_tokenizer(job: Job) -> tuple[Any, Any]:
    """Return a minimal model, and the tokenizer with the template that tags the assistant's
    turns."""
    from peers import tokenizer_of
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_of(job)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)), tokenizer


def rows_of(job: Job) -> Any:
    """Return the conversations as a dataset of `datasets`, read and cached for the run."""
    from datasets import load_dataset

    return load_dataset("json", data_files=str(job.rows), split="train")


def trl_itself(job: Job, clock: Clock) -> Any:
    """Return TRL's trainer with its own packing."""
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = model_and_tokenizer(job)
    packing = {"packing": True, "packing_strategy": "bfd", "max_length": job.capacity, "assistant_only_loss": True}
    config = SFTConfig(**settings(job, num_train_epochs=1, **packing))
    rows = rows_of(job)
    return timed(SFTTrainer, clock)(model, config, train_dataset=rows, processing_class=tokenizer)


def trl_with_ours(job: Job, clock: Clock) -> Any:
    """Return TRL's trainer, fed by a PackDataset."""
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = model_and_tokenizer(job)
    config = SFTConfig(**settings(job, max_steps=10**6, dataset_kwargs={"skip_prepare_dataset": True}))
    return timed(SFTTrainer, clock)(model, config, processing_class=tokenizer, **ours(job))


def transformers_itself(job: Job, clock: Clock) -> Any:
    """Return transformers' trainer with `map` and its collator without padding."""
    from peers import Templated
    from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

    model, tokenizer = model_and_tokenizer(job)
    templated = Templated(tokenizer)

    def labelled(row: dict[str, Any]) -> dict[str, Any]:
        encoded = templated(row)
        pairs = zip(encoded["input_ids"], encoded["mask"], strict=True)
        return {"input_ids": encoded["input_ids"], "labels": [token if bit else -100 for token, bit in pairs]}

    rows = rows_of(job)
    rows = rows.map(labelled, remove_columns=rows.column_names)
    each = max(1, job.capacity * job.conversations // job.tokens)  # as many conversations as a pack holds
    more = {"per_device_train_batch_size": each, "num_train_epochs": 1, "remove_unused_columns": False}
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    arguments = TrainingArguments(**settings(job, **more))
    return timed(Trainer, clock)(model, arguments, train_dataset=rows, data_collator=collator)


def transformers_with_ours(job: Job, clock: Clock) -> Any:
    """Return transformers' trainer, fed by a PackDataset."""
    from transformers import Trainer, TrainingArguments

    model, _ = model_and_tokenizer(job)
    arguments = settings(job, max_steps=10**6, accelerator_config={"dispatch_batches": False})
    return timed(Trainer, clock)(model, TrainingArguments(**arguments), **ours(job))


def ours(job: Job) -> dict[str, Any]:
    """Return the arguments of a trainer fed by a PackDataset."""
    from corpus import DAY

    from sftstream import DataConfig
    from sftstream.integrations import PackDataset
    from sftstream.integrations.transformers_trainer import PackCallback, one_pack

    table = {
        "sources": [{"path": str(job.rows)}],
        "tokenizer": {"path": job.tokenizer, "date": DAY},
        "capacity": job.capacity,
        "global_batch": ACCUMULATED,
        "streams": 1,
        "workers": 0,
        "epochs": 1,
    }
    dataset = PackDataset(msgspec.convert(table, DataConfig))
    return {"train_dataset": dataset, "data_collator": one_pack, "callbacks": [PackCallback()]}


SYSTEMS: dict[str, Callable[[Job, Clock], Any]] = {
    "TRL SFTTrainer, itself": trl_itself,
    "TRL SFTTrainer, sftstream": trl_with_ours,
    "transformers Trainer, `map`": transformers_itself,
    "transformers Trainer, sftstream": transformers_with_ours,
}


def measure(job: Job, name: str) -> dict[str, float]:
    """Train an epoch with one system. Return CPU seconds and conversations per CPU-second."""
    import datasets  # noqa: F401 - imported before the clock starts
    import trl.trainer.sft_trainer  # noqa: F401
    from transformers import Trainer  # noqa: F401

    import sftstream.public  # noqa: F401

    clock = Clock()
    SYSTEMS[name](job, clock).train()
    return {
        "first": clock.first,
        "epoch": job.conversations / clock.last,
        "after": job.conversations / (clock.last - clock.first),
    }


def in_a_process(job: Job, name: str) -> dict[str, float]:
    """Measure a system in a process of its own, with empty caches."""
    with tempfile.TemporaryDirectory(dir=job.directory) as cache:
        caches = {"HF_DATASETS_CACHE": f"{cache}/datasets", "SFTSTREAM_CACHE": f"{cache}/sftstream"}
        command = [sys.executable, __file__, "--system", name]
        request = msgspec.json.encode(job)
        done = subprocess.run(command, input=request, stdout=subprocess.PIPE, env=os.environ | caches, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--capacity", type=int, default=8192)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--system", help="measure one system; the job is read from stdin")
    options = parser.parse_args()
    if options.system:
        job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
        print(json.dumps(measure(job, options.system)))
        return
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    print(
        f"{date.today()}; {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}; {versions}."
    )
    with tempfile.TemporaryDirectory(prefix="sftstream-bench-") as directory:
        job, _ = prepare(find_data(options.data, options.capacity), options.rows, directory)
        print(f"\n{job.conversations:,} conversations, {job.tokens:,} tokens, packs of {job.capacity}.\n")
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
        for _ in range(options.rounds):
            for name, found in figures.items():
                found.append(in_a_process(job, name))
                print(name, found[-1], file=sys.stderr, flush=True)
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for name, found in figures.items():
            first, epoch, after = (statistics.median(one[key] for one in found) for key in ("first", "epoch", "after"))
            print(f"| {name} | {first:.1f} | {epoch:,.0f} | {after:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
