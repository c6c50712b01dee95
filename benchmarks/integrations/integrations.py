"""Feed other trainers by their own preparation and by ours, on the same conversations. Prints a
Markdown table.

    python benchmarks/integrations/integrations.py [--rows 20000] [--rounds 3] [--data DIRECTORY]

Measures the trainers that are installed. Their steps compute nothing, so that only the data is
measured. README.md describes the method.
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
from collections.abc import Callable
from datetime import date
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1] / "pipeline"))

from environment import ONE_THREAD, QUIET

os.environ |= ONE_THREAD | QUIET  # before importing the libraries: each reads its variables once

import msgspec
from clock import Clock
from corpus import Job, find_data, prepare
from loaders import automodel_itself, automodel_with_ours, single_exchanges, titan_itself, titan_with_ours
from trainers import (
    lightning_itself,
    lightning_with_ours,
    transformers_itself,
    transformers_with_ours,
    trl_itself,
    trl_with_ours,
)

PACKAGES = ("torch", "tokenizers", "fastokens", "transformers", "accelerate", "datasets")
COLUMNS = (
    "Trainer, prepared by",
    "to the first step, CPU s",
    "first epoch, conversations per CPU-second",
    "after the first step",
)


class System(NamedTuple):
    """A trainer and the preparation of its data."""

    run: Callable[[Job, Clock], None]
    package: str
    imports: tuple[str, ...]
    """Modules that are imported before the clock starts."""


TRL = ("trl", ("trl.trainer.sft_trainer",))
LIGHTNING = ("lightning", ("lightning.pytorch", "transformers"))
TITAN = ("torchtitan", ("torchtitan.components.tokenizer", "torchtitan.hf_datasets.text_datasets"))
AUTOMODEL = (
    "nemo_automodel",
    ("nemo_automodel.components.datasets.llm.chat_dataset", "nemo_automodel.recipes.llm.train_ft", "transformers"),
)

TRAINERS = {
    "TRL SFTTrainer, itself": System(trl_itself, *TRL),
    "TRL SFTTrainer, sftstream": System(trl_with_ours, *TRL),
    "transformers Trainer, `map`": System(transformers_itself, "transformers", ("transformers.trainer",)),
    "transformers Trainer, sftstream": System(transformers_with_ours, "transformers", ("transformers.trainer",)),
    "Lightning Trainer, `map`": System(lightning_itself, *LIGHTNING),
    "Lightning Trainer, sftstream": System(lightning_with_ours, *LIGHTNING),
}
SINGLE = {
    "torchtitan, itself": System(titan_itself, *TITAN),
    "torchtitan, sftstream": System(titan_with_ours, *TITAN),
    "Automodel, itself": System(automodel_itself, *AUTOMODEL),
    "Automodel, sftstream": System(automodel_with_ours, *AUTOMODEL),
}
"""Loaders alone. torchtitan's refuses conversations of more than one exchange, Automodel's refuses
results of tools without an id."""
SYSTEMS = TRAINERS | SINGLE


def measure(job: Job, name: str) -> dict[str, float]:
    """Train an epoch with one system. Return CPU seconds and conversations per CPU-second."""
    system = SYSTEMS[name]
    for module in ("datasets", "sftstream.public", *system.imports):
        import_module(module)
    clock = Clock()
    system.run(job, clock)
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


def table(job: Job, systems: dict[str, System], rounds: int) -> None:
    """Measure the systems by turns, and print the medians."""
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, found in figures.items():
            found.append(in_a_process(job, name))
            print(name, found[-1], file=sys.stderr, flush=True)
    print(f"\n{job.conversations:,} conversations, {job.tokens:,} tokens, packs of {job.capacity}.\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name, found in figures.items():
        first, epoch, after = (statistics.median(one[key] for one in found) for key in ("first", "epoch", "after"))
        print(f"| {name} | {first:.1f} | {epoch:,.0f} | {after:,.0f} |", flush=True)


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
    installed = {name: system for name, system in SYSTEMS.items() if find_spec(system.package)}
    missing = sorted({system.package for system in SYSTEMS.values() if not find_spec(system.package)})
    packages = dict.fromkeys([*PACKAGES, *(system.package for system in installed.values())])
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    print(
        f"{date.today()}; {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}; {versions}."
        + (f" Not installed: {', '.join(missing)}." if missing else "")
    )
    with tempfile.TemporaryDirectory(prefix="sftstream-bench-") as directory:
        job, _ = prepare(find_data(options.data, options.capacity), options.rows, directory)
        table(job, {name: system for name, system in installed.items() if name in TRAINERS}, options.rounds)
        if single := {name: system for name, system in installed.items() if name in SINGLE}:
            table(single_exchanges(job), single, options.rounds)


if __name__ == "__main__":
    main()
