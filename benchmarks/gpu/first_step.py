"""Measure the time from the launch of torchrun to the end of the first step, twice.

    python benchmarks/gpu/first_step.py [--rows FILES] [--tokenizer DIR] [--shape 1b]
        [--capacity 16384]

The model is stored before in the Hugging Face layout, with random weights in bfloat16. The first
start has empty caches of compiled code, the second start those of the first. Prints the seconds at
which each line of the run's output appears, as Markdown, and the end of the first three steps.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from step_job import SIZES, sizes
from step_peers import public_model
from trained import sources

STEPS = 3
"""Steps of a run, which is killed after the last."""

CONFIG = """
run.name = "{name}"
run.steps = {steps}
model.init_from = "model"
optimizer.learning_rate = 1e-5
checkpoint.every = 1000000000

[data]
sources = [{rows}]
tokenizer = {{ path = "{tokenizer}" }}
capacity = {capacity}
global_batch = 4
workers = 2
"""


def store_model(shape: str, directory: Path) -> None:
    """Write a Llama of random weights as transformers does."""
    from transformers import LlamaConfig

    config = LlamaConfig(**sizes(shape), max_position_embeddings=131072)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    public_model(config, device, torch.bfloat16).cpu().save_pretrained(directory)


def timeline(name: str, directory: Path) -> list[tuple[float, str]]:
    """Run the trainer; return the seconds since the launch of each line and of each step's end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "-m", "trainer.main", f"{name}.toml"]
    caches = {f"{tool}_CACHE_DIR": str(directory / tool) for tool in ("TORCHINDUCTOR", "TRITON")}
    caches |= {"XDG_CACHE_HOME": str(directory / "cache"), "SFTSTREAM_CACHE": str(directory / "templates")}
    began = time.monotonic()
    run = subprocess.Popen(
        command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | caches
    )
    found: list[tuple[float, str]] = []
    watch = threading.Thread(target=_watch, args=(directory / "runs" / name / "metrics.jsonl", began, found, run))
    watch.start()
    assert run.stdout is not None
    found += [(time.monotonic() - began, line.strip()) for line in run.stdout]
    run.wait()
    watch.join()
    return sorted(found)


def _watch(metrics: Path, began: float, found: list[tuple[float, str]], run: subprocess.Popen[str]) -> None:
    steps = 0
    while run.poll() is None:
        if metrics.exists() and (now := metrics.read_bytes().count(b"\n")) > steps:
            found.append((time.monotonic() - began, f"**end of step {now}**"))
            steps = now
        if steps == STEPS:  # the export is not measured
            _kill(run.pid)
            return
        time.sleep(0.01)


def _kill(process: int) -> None:
    """Kill a process and its descendants, if they still run."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            _kill(int(child))
        os.kill(process, signal.SIGKILL)


def main() -> None:
    """Print both timelines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = Path(__file__).resolve().parents[2] / "examples" / "demo"
    parser.add_argument("--rows", nargs="+", default=[str(demo / "data" / "messages.jsonl")])
    parser.add_argument("--tokenizer", default=str(demo / "tokenizer"))
    parser.add_argument("--shape", choices=list(SIZES), default="1b")
    parser.add_argument("--capacity", type=int, default=16384)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="first-step-") as temporary:
        directory = Path(temporary)
        store_model(arguments.shape, directory / "model")
        rows = sources(arguments.rows)
        for name in ("first", "second"):
            tokenizer = Path(arguments.tokenizer).resolve()
            text = CONFIG.format(name=name, steps=STEPS, rows=rows, tokenizer=tokenizer, capacity=arguments.capacity)
            (directory / f"{name}.toml").write_text(text)
            print(f"\n{name} start\n\n| seconds | |\n|---|---|")
            for seconds, line in timeline(name, directory):
                if line:
                    print(f"| {seconds:.1f} | {line.replace('|', ' ')[:110]} |", flush=True)


if __name__ == "__main__":
    main()
