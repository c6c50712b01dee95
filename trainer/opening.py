"""Compose the first lines of a run: model, data, place, time, and choices by default."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from sftstream import DataConfig, Forecast, pages
from trainer.config import TrainConfig
from trainer.distributed.mesh import Topology, named_dtype
from trainer.estimate import UTILISATION, step_seconds
from trainer.llama.config import LlamaConfig
from trainer.llama.flops import peak_flops
from trainer.llama.lora.nf4 import count_weights
from trainer.training.model import ModelSource

NAMED_SOURCES = 3
"""Number of sources that are named in the first lines."""


def model_line(model: nn.Module, config: TrainConfig, source: ModelSource) -> str:
    """Return the line about the model: its first weights and its numbers of parameters."""
    parameters = count_weights(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    start = "random weights" if source.init_from is None else str(config.model.init_from)
    adapters = "" if config.lora is None else f", adapters of rank {config.lora.rank}"
    part = "all trained" if trained == parameters else f"{trained:,} of them trained"
    return f"model    a Llama of {parameters:,} parameters from {start}{adapters}, {part}"


def data_line(config: DataConfig, total_rows: int | None) -> str:
    """Return the line about the data: sources, conversations in all epochs, trained roles."""
    paths = [source.path for source in config.sources[:NAMED_SOURCES]]
    more = len(config.sources) - len(paths)
    named = ", ".join(paths) + (f" and {more} more" if more else "")
    sources = "1 source" if len(config.sources) == 1 else f"{len(config.sources)} sources"
    rows = f"{total_rows:,} conversations in all epochs of " if total_rows else "conversations of "
    return f"data     {rows}{sources} ({named}); trained roles: {', '.join(config.train_on)}"


def place_line(config: TrainConfig, topology: Topology) -> str:
    """Return the line about the machine and the places of checkpoints and result."""
    root = config.checkpoint.place or str(config.run.directory / "checkpoints")
    out = config.run.export_directory if config.lora is None else config.run.adapter_directory
    return f"place    {topology.describe()}; checkpoints every {config.checkpoint.every:,} steps in {root}, result in {out}"


def compile_line(config: TrainConfig) -> str:
    """Return the line before the compilation of the layers, which takes seconds."""
    return f"compile  the layers, for packs of {config.data.capacity:,} tokens; later starts reuse the compiled code"


def steps_left(config: TrainConfig, forecast: Forecast, done: int) -> int | None:
    """Return the steps until the run ends, estimated; None for data of unknown size."""
    ends = [end for end in (config.run.steps, forecast.steps) if end is not None]
    return max(0, min(ends) - done) if ends else None


def peak_of(topology: Topology) -> float | None:
    """Return the peak of the run's GPUs in operations per second; None on CPUs and unknown GPUs."""
    return peak_flops(torch.cuda.get_device_name(topology.device)) if topology.device.type == "cuda" else None


def time_line(config: TrainConfig, shape: LlamaConfig, left: int | None, ranks: int, peak: float | None) -> str:
    """Return the line about the duration of the `left` steps, None for an unknown number.

    By the steps that the run took before, or on GPUs of a known `peak` by the operations of a step;
    with `peak` None the display measures the first steps.
    """
    if left is None:
        return "time     the end is not known in advance, since a source is streamed and run.steps is not set"
    counted = "1 step" if left == 1 else f"{left:,} steps"
    if before := _seconds_before(config.run.directory / "metrics.jsonl"):
        time = pages.figures.duration(left * before)
        return f"time     about {time} for {counted}, at {before:.3g} s a step as before the resume"
    if peak is None:
        return f"time     {counted}, each timed as the run goes; the time left is printed from step 5 on"
    seconds = step_seconds(config, shape, ranks, peak)
    at = f"at {UTILISATION:.0%} of {peak / 1e12:.0f} TFLOP/s on each GPU"
    time = pages.figures.duration(left * seconds)
    return f"time     about {time} for {counted}, {at}, compilation and validation not counted"


def _seconds_before(path: Path, steps: int = 20) -> float | None:
    """Return the median duration of the last steps in `metrics.jsonl`; None without two steps."""
    try:
        lines = path.read_bytes().splitlines()[-steps:]
        seconds = sorted(float(json.loads(line)["seconds"]) for line in lines)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return seconds[len(seconds) // 2] if len(seconds) > 1 else None


def chosen_line(given: TrainConfig, chosen: TrainConfig, data: DataConfig, device: torch.device) -> str | None:
    """Return the line with the value of each setting that was left to "auto"; None if none was.

    `given` is the config as written, `chosen` the config of the run, `data` the loader's config.
    """
    values = dict(_automatic(msgspec.to_builtins(given), msgspec.to_builtins(chosen), ""))
    values |= {"data.streams": data.streams} if given.data.streams == "auto" else {}
    if given.run.compute_dtype == "auto":
        values["run.compute_dtype"] = str(named_dtype("auto", device)).removeprefix("torch.")
    if given.run.device == "auto":
        values["run.device"] = device.type
    known = {name: value for name, value in values.items() if value != "auto"}
    listed = ", ".join(f"{name} = {json.dumps(value)}" for name, value in sorted(known.items()))
    return f'chosen   {listed} (left to "auto")' if listed else None


def _automatic(given: Any, chosen: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, chosen value) of each setting that is "auto" in `given`."""
    if isinstance(given, dict):
        for name, value in given.items():
            yield from _automatic(value, chosen[name], f"{path}.{name}".strip("."))
    elif given == "auto":
        yield path, chosen
