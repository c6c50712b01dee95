"""Measure how long the real trainer waits for its data, by default on one GPU with two workers.

    python benchmarks/gpu/data_wait.py [--rows FILES] [--tokenizer DIR] [--layers 4 8 16]
        [--steps 60] [--workers 2] [--dp 1] [--tp 1]

Models of several depths consume data at several speeds, in `--dp` times `--tp` processes each.
Prints tokens per second and the share of time spent waiting for packs, for the median step and over
all steps. The first 20 steps do not count: kernels are chosen and fastokens is loaded meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trained import metrics, sources

from trainer.reporting.metrics import StepMetrics

WARM_UP = 20
"""Steps before the measurement."""


CONFIG = """
[run]
name = "run"
steps = {steps}
device = "{device}"

[data]
sources = [{sources}]
tokenizer = {{ path = "{tokenizer}" }}
capacity = {capacity}
global_batch = {packs}
workers = {workers}

[model]
vocab_size = {vocabulary}
hidden_size = {hidden}
intermediate_size = {inner}
num_hidden_layers = {layers}
num_attention_heads = 16
num_key_value_heads = 8
tie_word_embeddings = true

[parallel]
tp = {tp}

[checkpoint]
every = 1000000000
"""
PACKS = 8
"""Packs of a step per data-parallel rank."""


def run(arguments: argparse.Namespace, layers: int) -> list[StepMetrics]:
    """Run the trainer in new processes; return the metrics of the steps after the warm-up."""
    config = CONFIG.format(
        steps=WARM_UP + arguments.steps,
        device=arguments.device,
        sources=sources(arguments.rows),
        tokenizer=Path(arguments.tokenizer).resolve(),
        capacity=arguments.capacity,
        packs=PACKS * arguments.dp,
        workers=arguments.workers,
        vocabulary=arguments.vocabulary,
        hidden=arguments.hidden,
        inner=4 * arguments.hidden,
        layers=layers,
        tp=arguments.tp,
    )
    with tempfile.TemporaryDirectory(prefix="data-wait-") as directory:
        path = Path(directory) / "run.toml"
        path.write_text(config)
        ranks = ["--standalone", "--nproc-per-node", str(arguments.dp * arguments.tp)]
        command = [sys.executable, "-m", "torch.distributed.run", *ranks, "-m", "trainer.main", str(path)]
        subprocess.run(command, cwd=directory, check=True, stdout=subprocess.DEVNULL)
        return metrics(Path(directory))[WARM_UP:]


def row(layers: int, steps: Sequence[StepMetrics]) -> str:
    """Return a line of the table."""
    seconds, waited = sum(step.seconds for step in steps), sum(step.data_wait for step in steps)
    median = statistics.median(step.data_wait / step.seconds for step in steps)
    pack = statistics.median(step.data_wait for step in steps) / PACKS
    speed = sum(step.tokens for step in steps) / seconds
    return f"| {layers} | {speed:,.0f} | {median:.2%} | {waited / seconds:.2%} | {pack * 1e3:.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = Path(__file__).resolve().parents[2] / "examples" / "demo"
    parser.add_argument("--rows", nargs="+", default=[str(demo / "data" / "messages.jsonl")])
    parser.add_argument("--tokenizer", default=str(demo / "tokenizer"))
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--capacity", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    print("| layers | tokens/s | waiting, median | waiting, all | ms a pack |\n|---|---|---|---|---|")
    for layers in arguments.layers:
        print(row(layers, run(arguments, layers)), flush=True)


if __name__ == "__main__":
    main()
