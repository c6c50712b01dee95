"""Compare the losses of training runs that differ by number format or optimizer.

    python benchmarks/gpu/curves.py --rows FILES --held-out FILE [--tokenizer DIR] [--steps 200]
        [--variants bf16 float8 ...] [--seeds 0 1] [--trained-on FILES] [--trained-steps 1500]

Each variant is run by the real trainer, once for each seed of weights and data, all runs at a time.
The weights are random, or those of a run of the first variant on other files, `--trained-on`, which
are then fine-tuned with a tenth of that run's learning rate. Prints for each run the loss on the
held-out file after the last step, the mean training loss of the last 20 steps, and the held-out
loss minus that of the first variant with the same seed. "not-compiled" differs from "bf16" by
rounding alone, so its differences are the noise. The model has 12 layers of width 768, and a step
has 16,384 tokens.
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
optimizer.learning_rate = {rate}
schedule.warmup = 20
checkpoint.every = 1000000000
{variant}

[data]
sources = [{rows}]
tokenizer = {{ path = "{tokenizer}" }}
capacity = {capacity}
global_batch = 2
workers = 1
"""

MODEL = """
[model]
vocab_size = {vocabulary}
hidden_size = {hidden}
intermediate_size = {inner}
num_hidden_layers = {layers}
num_attention_heads = 12
num_key_value_heads = 4
tie_word_embeddings = true
"""

TRAINED_MODEL = """
[model]
init_from = "{directory}"
"""

VALIDATION = """
[validation]
sources = [{held_out}]
every = {steps}
"""

RATE = 5e-4
"""Learning rate of random weights."""


class Curve(NamedTuple):
    """Losses of a run in nats for each token."""

    held_out: float
    """After the last step."""
    training: float
    """Mean of the last `LAST` steps."""


def start(directory: Path, tables: str) -> subprocess.Popen[bytes]:
    """Start a run in `directory`."""
    directory.mkdir()
    (directory / "run.toml").write_text(tables)
    command = [sys.executable, "-m", "trainer.main", "run.toml"]
    with (directory / "output").open("wb") as output:
        return subprocess.Popen(command, cwd=directory, stdout=output, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes], directory: Path) -> None:
    """Wait for a run; end with its output if it failed."""
    if process.wait():
        sys.exit((directory / "output").read_text()[-2000:])


def trained_weights(arguments: argparse.Namespace, directory: Path) -> str:
    """Run the first variant on `arguments.trained_on`; return the table of the trained model."""
    rows, steps = arguments.trained_on, arguments.trained_steps
    tables = config(arguments, arguments.variants[0], arguments.seeds[0], rows, steps, RATE)
    finish(start(directory, tables + new_model(arguments)), directory)
    return TRAINED_MODEL.format(directory=directory / "runs" / "run" / "export")


def config(arguments: argparse.Namespace, variant: str, seed: int, rows: list[str], steps: int, rate: float) -> str:
    """Return the tables of a run without model and validation."""
    return CONFIG.format(
        steps=steps,
        seed=seed,
        variant=VARIANTS[variant],
        rate=rate,
        rows=sources(rows),
        tokenizer=Path(arguments.tokenizer).resolve(),
        capacity=512 if arguments.tiny else 8192,
    )


def new_model(arguments: argparse.Namespace) -> str:
    """Return the table of a model with random weights."""
    small = arguments.tiny
    hidden, inner, layers = (192, 256, 2) if small else (768, 2048, 12)
    return MODEL.format(vocabulary=arguments.vocabulary, hidden=hidden, inner=inner, layers=layers)


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
    parser.add_argument("--trained-on", nargs="+", help="files of a run whose weights are fine-tuned")
    parser.add_argument("--trained-steps", type=int, default=1500)
    parser.add_argument("--tiny", action="store_true", help="a model for tests")
    arguments = parser.parse_args()
    print("| variant | seed | held-out loss | training loss | held-out loss, minus the first variant's |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="curves-") as temporary:
        directory, rate, model = Path(temporary), RATE, new_model(arguments)
        if arguments.trained_on:
            rate, model = RATE / 10, trained_weights(arguments, directory / "trained")
        rest = model + VALIDATION.format(held_out=sources([arguments.held_out]), steps=arguments.steps)
        runs = {
            (variant, seed): config(arguments, variant, seed, arguments.rows, arguments.steps, rate) + rest
            for variant in arguments.variants
            for seed in arguments.seeds
        }
        places = {which: directory / f"{which[0]}-{which[1]}" for which in runs}
        processes = {which: start(places[which], tables) for which, tables in runs.items()}
        for which, process in processes.items():
            finish(process, places[which])
        for (variant, seed), place in places.items():
            found, first = read(place), read(places[arguments.variants[0], seed])
            change = f"{found.held_out - first.held_out:+.4f}"
            print(f"| {variant} | {seed} | {found.held_out:.4f} | {found.training:.4f} | {change} |")


if __name__ == "__main__":
    main()
