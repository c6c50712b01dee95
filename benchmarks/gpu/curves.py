"""Compare the losses of training runs that differ by number format or optimizer.

    python benchmarks/gpu/curves.py --rows FILES --held-out FILE [--tokenizer DIR] [--steps 200]
        [--variants bf16 float8 ...] [--seeds 0 1]

Each variant is run by the real trainer from random weights, once for each seed of weights and data,
all runs at a time. Prints for each run the loss on the held-out file after the last step, the mean
training loss of the last 20 steps, and the held-out loss minus that of the first variant with the
same seed. "not-compiled" differs from "bf16" by rounding alone, so its differences are the noise.
The model has 12 layers of width 768, and a step has 16,384 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from trained import metrics, sources

LAST = 20
"""Steps of the mean training loss."""

VARIANTS = {
    "bf16": "",
    "not-compiled": "run.compile = false",
    "float8": "run.float8 = true",
    "bf16-weights": 'run.weights_dtype = "bfloat16"',
    "adamw8bit": 'optimizer.kind = "adamw8bit"',
    "muon": 'optimizer.kind = "muon"',
}
"""Lines of each variant in the run's file; "bf16" has float32 weights, as by default."""

CONFIG = """
run.name = "run"
run.steps = {steps}
run.seed = {seed}
run.report_seconds = 0
optimizer.learning_rate = 5e-4
schedule.warmup = 20
checkpoint.every = 1000000000
{variant}

[data]
sources = [{rows}]
tokenizer = {{ path = "{tokenizer}" }}
capacity = {capacity}
global_batch = 2
workers = 1

[model]
vocab_size = {vocabulary}
hidden_size = {hidden}
intermediate_size = {inner}
num_hidden_layers = {layers}
num_attention_heads = 12
num_key_value_heads = 4
tie_word_embeddings = true

[validation]
sources = [{held_out}]
every = {steps}
"""


class Curve(NamedTuple):
    """Losses of a run in nats for each token."""

    held_out: float
    """After the last step."""
    training: float
    """Mean of the last `LAST` steps."""


def start(arguments: argparse.Namespace, variant: str, seed: int, directory: Path) -> subprocess.Popen[bytes]:
    """Start a run in `directory`."""
    directory.mkdir()
    small = arguments.tiny
    config = CONFIG.format(
        steps=arguments.steps,
        seed=seed,
        variant=VARIANTS[variant],
        rows=sources(arguments.rows),
        held_out=sources([arguments.held_out]),
        tokenizer=Path(arguments.tokenizer).resolve(),
        capacity=512 if small else 8192,
        vocabulary=arguments.vocabulary,
        hidden=192 if small else 768,
        inner=256 if small else 2048,
        layers=2 if small else 12,
    )
    (directory / "run.toml").write_text(config)
    command = [sys.executable, "-m", "trainer.main", "run.toml"]
    with (directory / "output").open("wb") as output:
        return subprocess.Popen(command, cwd=directory, stdout=output, stderr=subprocess.STDOUT)


def read(directory: Path) -> Curve:
    """Return the losses of a finished run."""
    steps = metrics(directory)
    held_out = steps[-1].validation_loss
    assert held_out is not None
    return Curve(held_out, statistics.mean(step.loss for step in steps[-LAST:]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = Path(__file__).resolve().parents[2] / "examples" / "demo"
    parser.add_argument("--rows", nargs="+", default=[str(demo / "data" / "messages.jsonl")])
    parser.add_argument("--held-out", default=str(demo / "data" / "messages.jsonl"))
    parser.add_argument("--tokenizer", default=str(demo / "tokenizer"))
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--tiny", action="store_true", help="a model for tests")
    arguments = parser.parse_args()
    print("| variant | seed | held-out loss | training loss | held-out loss, minus the first variant's |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="curves-") as directory:
        places = {(v, seed): Path(directory) / f"{v}-{seed}" for v in arguments.variants for seed in arguments.seeds}
        for place, process in [(p, start(arguments, *which, p)) for which, p in places.items()]:
            if process.wait():
                sys.exit((place / "output").read_text()[-2000:])
        for (variant, seed), place in places.items():
            found, first = read(place), read(places[arguments.variants[0], seed])
            change = f"{found.held_out - first.held_out:+.4f}"
            print(f"| {variant} | {seed} | {found.held_out:.4f} | {found.training:.4f} | {change} |")


if __name__ == "__main__":
    main()
