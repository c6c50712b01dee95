"""Take a snapshot of a run for a checkpoint, and restore a run from a checkpoint.

A checkpoint holds these keys beside the tensors `model.*` and `optimizer.*`:

    data/stream/00000   StreamState of logical stream 0 (MessagePack), one key per stream
    data/run            DataState without streams: identity, packs, history
    rng/rank00000       states of the random generators of rank 0, one key per rank
    progress            Progress
    settings            Settings, compared on a resume
    export              Recipe of the model's export

A resume on other numbers of ranks reads the streams of its own shards from the keys.
"""

from __future__ import annotations

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
from sftstream import DataState, LoaderPosition, StreamState, differences
from trainer.config import TrainConfig
from trainer.distributed.mesh import Topology
from trainer.llama.config import LlamaConfig
from trainer.llama.model import Llama
from trainer.llama.recipe import MODEL
from trainer.training.optimizer import OptimizerConfig, ScheduleConfig
from trainer.training.progress import Progress

STREAM, RNG = "data/stream/", "rng/"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that decide the numbers of a run; a resume needs equal settings."""

    seed: int
    model: LlamaConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    compute_dtype: str
    weights_dtype: str = "float32"
    compile: bool = False
    steps: int | None = None
    """The run's length if the schedule decays to the run's end, else None."""

    @classmethod
    def of(cls, config: TrainConfig, model: LlamaConfig, compute_dtype: torch.dtype) -> Settings:
        """Collect the settings of a run; `compute_dtype` is the dtype that "auto" stands for."""
        return cls(
            seed=config.run.seed,
            model=model,
            optimizer=config.optimizer,
            schedule=config.schedule,
            compute_dtype=str(compute_dtype).removeprefix("torch."),
            weights_dtype=config.run.weights_dtype,
            compile=config.run.compile,
            steps=config.run.steps if config.schedule.decays_to_run_end else None,
        )


@dataclass(frozen=True)
class RunDescription:
    """The part of a snapshot that is equal in all snapshots of a run."""

    settings: Settings
    topology: Topology
    recipe: Recipe | None
    """Recipe of the model's export; None on all ranks but the first."""
    about: About | None
    """Entry in the manifest, without a validation loss; None on ranks without a loader."""


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a run after a step, in the form that `CheckpointStore.save` takes.

    `tensors` refers to the live parameters and optimizer state: save it before the next step.
    """

    step: int
    tensors: dict[str, Any]
    values: dict[str, Any]
    about: About | None


@dataclass(frozen=True)
class Restored:
    """The state of a run in the newest checkpoint, or of a new run."""

    progress: Progress
    data: DataState | None = None
    reseeded: bool = False
    """True if the random generators were seeded from seed, step and rank, since the topology
    changed."""

    @property
    def resumed(self) -> bool:
        """True if there was a checkpoint."""
        return self.data is not None


def take_snapshot(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    position: LoaderPosition | None,
    run: RunDescription,
    validation_loss: float | None,
) -> Snapshot:
    """Return the run after `progress.step` steps, without a copy of a tensor. Collective.

    `position` is None on ranks without a loader.
    """
    values: dict[str, Any] = {f"{RNG}{dist.get_rank():05d}": _rng_state(run.topology)}
    if position is not None:
        # One value per logical stream, since a rank of another topology needs other streams.
        values |= {f"{STREAM}{number:05d}": state for number, state in position.encoded_streams.items()}
    if run.topology.first:
        assert position is not None
        assert run.recipe is not None
        values[RECIPE] = run.recipe.builtins()
        values["data/run"] = msgspec.to_builtins(position.run)
        values["progress"] = msgspec.to_builtins(progress)
        values["settings"] = msgspec.to_builtins(run.settings)
    about = run.about and msgspec.structs.replace(run.about, validation_loss=validation_loss)
    return Snapshot(progress.step, _tensors(model, optimizer), values, about)


def restore(
    store: CheckpointStore,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    topology: Topology,
    step: int,
) -> Restored:
    """Load the checkpoint of `step` into model, optimizer and random generators. Collective.

    On a changed topology the generators are seeded from seed, step and rank. Raises ValueError if
    the settings differ from the checkpoint's, CheckpointError if the checkpoint is damaged or does
    not fit the model.
    """
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
    # get_optimizer_state_dict creates the state of a new optimizer, for a checkpoint to load into.
    return {MODEL: get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def _require_same(saved: Settings, now: Settings, step: int) -> None:
    changed = differences(msgspec.to_builtins(saved), msgspec.to_builtins(now), "settings")
    if not changed:
        return
    longer = any(field.startswith("settings.steps: ") for field in changed)
    reason = "; a decay to the last step fixes run.steps, unless schedule.steps is set from the start" if longer else ""
    raise ValueError(
        f"the checkpoint of step {step} was made with other settings (checkpoint -> now): {'; '.join(changed)}. "
        f"Restore the settings, or give the run another name{reason}"
    )


def _rng_state(topology: Topology) -> dict[str, bytes]:
    state = {"cpu": torch.get_rng_state()}
    if topology.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(topology.device)
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def _restore_rng(values: dict[str, Any], topology: Topology) -> bool:
    """Restore this rank's generators; return False for states of another kind of device."""
    saved = values[f"{RNG}{dist.get_rank():05d}"]
    if (topology.device.type == "cuda") != ("cuda" in saved):
        return False
    torch.set_rng_state(torch.frombuffer(bytearray(saved["cpu"]), dtype=torch.uint8))
    if "cuda" in saved:
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(saved["cuda"]), dtype=torch.uint8), topology.device)
    return True
