"""What a checkpoint of a run holds, and how a run goes on from it: exactly, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from checkpoints import RECIPE, About, CheckpointStore, Recipe
from sftstream import DataState, StreamState, differences
from trainer.config import TrainConfig
from trainer.distributed.mesh import Topology
from trainer.llama.config import LlamaConfig
from trainer.llama.model import Llama
from trainer.llama.recipe import MODEL
from trainer.training.optimizer import OptimizerConfig, ScheduleConfig

STREAM, RNG = "data/stream/", "rng/"

Save = Callable[[int, dict[str, Any], dict[str, Any], About | None], Any]
"""One of a store's ways to save: takes a step, tensors, values, what the manifest says about them."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a run is."""

    step: int = 0
    """Steps finished."""
    rows: int = 0
    """Conversations given or refused."""
    tokens: int = 0
    trained_tokens: int = 0
    loss: float | None = None
    """Of the last step."""
    finished: bool = False
    """The data has ended."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the numbers of a run depend on besides its data and its hardware."""

    seed: int
    model: LlamaConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    compute_dtype: str
    weights_dtype: str = "float32"
    compile: bool = False
    steps: int | None = None
    """The run's length where the schedule depends on it."""

    @classmethod
    def of(cls, config: TrainConfig, model: LlamaConfig, compute_dtype: torch.dtype) -> Settings:
        schedule = config.schedule
        fades = schedule.kind != "constant" and schedule.over == "steps" and schedule.steps is None
        return cls(
            seed=config.run.seed,
            model=model,
            optimizer=config.optimizer,
            schedule=schedule,
            compute_dtype=str(compute_dtype).removeprefix("torch."),
            weights_dtype=config.run.weights_dtype,
            compile=config.run.compile,
            steps=config.run.steps if fades else None,
        )


@dataclass(frozen=True)
class Restored:
    """A run as its newest checkpoint has it; a new run where there is none."""

    progress: Progress
    data: DataState | None
    reseeded: bool = False
    """The random generators start anew from seed, step and rank, since those saved belong to another topology."""


def capture(
    save: Save,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    data: DataState | None,
    settings: Settings,
    recipe: Recipe | None,
    topology: Topology,
    about: About | None,
) -> None:
    """Give the run after its `progress.step`-th step to `save`, a store's. `data` is None on ranks that do not read,
    `recipe` and `about` on all but the first."""
    values: dict[str, Any] = {f"{RNG}{dist.get_rank():05d}": _rng_state(topology)}
    if data is not None:
        # One value a logical stream: any other topology finds its own among them.
        values |= {f"{STREAM}{number:05d}": msgspec.msgpack.encode(stream) for number, stream in data.streams.items()}
    if topology.first:
        assert data is not None
        assert recipe is not None
        values[RECIPE] = recipe.builtins()
        values["data/run"] = msgspec.to_builtins(msgspec.structs.replace(data, streams={}))
        values["progress"] = msgspec.to_builtins(progress)
        values["settings"] = msgspec.to_builtins(settings)
    save(progress.step, _tensors(model, optimizer), values, about)


def restore(
    store: CheckpointStore,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    topology: Topology,
    step: int,
) -> Restored:
    """Set model, optimizer and random generators as they were after `step`; raises ValueError where that is not this run."""
    values = store.values(step)
    _require_same(msgspec.convert(values["settings"], Settings), settings, step)
    state = _tensors(model, optimizer)
    store.load(step, state)
    set_model_state_dict(model, state[MODEL])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    reseeded = store.manifest(step).about.mesh != topology.sizes or not _restore_rng(values, topology)
    if reseeded:
        torch.manual_seed(((settings.seed * 1_000_003 + step) * 65_537 + dist.get_rank()) % 2**63)
    streams = {
        int(key.removeprefix(STREAM)): msgspec.msgpack.decode(blob, type=StreamState)
        for key, blob in values.items()
        if key.startswith(STREAM)
    }
    data = DataState.parse({**values["data/run"], "streams": msgspec.to_builtins(streams, str_keys=True)})
    return Restored(msgspec.convert(values["progress"], Progress), data, reseeded)


def _tensors(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    # These also make the state of an optimizer that has not stepped yet, without which nothing of it would be loaded.
    return {MODEL: get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def _require_same(saved: Settings, now: Settings, step: int) -> None:
    changed = differences(msgspec.to_builtins(saved), msgspec.to_builtins(now), "settings")
    if not changed:
        return
    longer = any(field.startswith("settings.steps: ") for field in changed)
    also = ", or keep the schedule of a longer run by schedule.steps" if longer else ""
    raise ValueError(
        f"the checkpoint of step {step} was made with other settings, and going on with these would not be the same run: "
        f"{'; '.join(changed)}. Restore them, or give the run another name{also}"
    )


def _rng_state(topology: Topology) -> dict[str, bytes]:
    state = {"cpu": torch.get_rng_state()}
    if topology.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(topology.device)
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def _restore_rng(values: dict[str, Any], topology: Topology) -> bool:
    """Set this rank's generators as they were; false where they were those of another kind of device."""
    saved = values[f"{RNG}{dist.get_rank():05d}"]
    if (topology.device.type == "cuda") != ("cuda" in saved):
        return False
    torch.set_rng_state(torch.frombuffer(bytearray(saved["cpu"]), dtype=torch.uint8))
    if "cuda" in saved:
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(saved["cuda"]), dtype=torch.uint8), topology.device)
    return True
