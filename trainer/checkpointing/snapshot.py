"""Take a snapshot of a run for a checkpoint, and restore a run from a checkpoint.

A checkpoint holds these keys beside the tensors `model.*` and `optimizer.*`. Weights that are not
trained, the model under adapters, are not saved: `settings` has the digests of their files.

    data/stream/00000   StreamState of logical stream 0 (MessagePack), one key per stream
    data/run            DataState without streams: identity, packs, history
    rng/rank00000       states of the random generators of rank 0, one key per rank
    progress            Progress
    settings            Settings, compared on a resume
    export              Recipe of the model's export
    run_token           token of the run, equal to the token in its directory

After a change in the number of ranks each rank loads the streams it now owns.
"""

from __future__ import annotations

from collections.abc import Sequence
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

from checkpoints import ORIGIN, RECIPE, About, CheckpointStore, Origin, Recipe
from sftstream import DataState, LoaderPosition
from trainer.checkpointing.settings import Settings, carry_over
from trainer.distributed.mesh import Topology
from trainer.llama.model import Llama
from trainer.llama.recipe import MODEL
from trainer.training.adamw8bit import AdamW8bit, misplaced
from trainer.training.optimizer import Optimizer, reconfigure
from trainer.training.progress import Progress

HEAD = "head.weight"
STREAM, RNG, TOKEN = "data/stream/", "rng/", "run_token"
STATE = "optimizer.state."
"""Prefix of the names of an optimizer's tensors."""


@dataclass(frozen=True)
class RunDescription:
    """The part of a snapshot that is equal in all snapshots of a run."""

    settings: Settings
    topology: Topology
    recipe: Recipe | None
    """Recipe of the model's export; None on all ranks but the first."""
    token: str | None
    """Token of the run; None on all ranks but the first."""
    about: About | None
    """Entry in the manifest, without a validation loss; None on ranks without a loader."""
    origin: Origin | None = None
    """Command and base model of the run, for the card of an export; None on all ranks but the
    first."""


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
    settings: Settings
    """Settings of the run, with the record of accepted changes."""
    data: DataState | None = None
    reseeded: bool = False
    """True if the random generators were seeded from seed, step and rank, since the topology
    changed."""

    extended: bool = False
    """True if the data was exhausted at the checkpoint and has further rows now."""

    @property
    def accepted_now(self) -> tuple[str, ...]:
        """Changes of settings accepted by this resume."""
        changes = self.settings.accepted or ()
        return tuple(line for change in changes if change.step == self.progress.step for line in change.differences)

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
    """Return the run after `progress.step` steps, with references to tensors, not copies.
    Collective.

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
        values[TOKEN] = run.token
        values |= {ORIGIN: run.origin.builtins()} if run.origin else {}
        values["data/run"] = msgspec.to_builtins(position.header)
        values["progress"] = msgspec.to_builtins(progress)
        values["settings"] = msgspec.to_builtins(run.settings)
    about = run.about and msgspec.structs.replace(run.about, validation_loss=validation_loss)
    return Snapshot(progress.step, _tensors(model, optimizer), values, about)


def restore(
    store: CheckpointStore,
    model: Llama,
    optimizer: Optimizer,
    settings: Settings,
    topology: Topology,
    step: int,
    accept: Sequence[str] = (),
) -> Restored:
    """Load the checkpoint of `step` into model, optimizer and random generators. Collective.

    On a changed topology the generators are seeded from seed, step and rank. `accept` names the
    differences of settings to accept. Raises ValueError if further settings differ from the
    checkpoint's, CheckpointError if the checkpoint is damaged or does
    not fit the model.
    """
    values = store.values(step)
    saved = saved_settings(store, step)
    settings = carry_over(saved, settings, step, accept)
    # Version 0.1.0 saved the head also of a model with tied embeddings.
    tied = model.config.tie_word_embeddings and f"{MODEL}.{HEAD}" in store.manifest(step).tensors
    state = _tensors(model, optimizer, with_head=tied)
    if isinstance(optimizer, AdamW8bit):
        _require_equal_blocks(store, step, state, topology)
    store.load(step, state)
    set_model_state_dict(model, get_model_state_dict(model) | state[MODEL])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    reconfigure(optimizer, settings.optimizer)
    reseeded = store.manifest(step).about.mesh != topology.sizes or not _restore_rng(values, topology)
    if reseeded:
        torch.manual_seed(((settings.seed * 1_000_003 + step) * 65_537 + dist.get_rank()) % 2**63)
    streams = {int(key.removeprefix(STREAM)): blob for key, blob in values.items() if key.startswith(STREAM)}
    data = DataState.from_parts(values["data/run"], streams)
    return Restored(msgspec.convert(values["progress"], Progress), settings, data, reseeded)


def _require_equal_blocks(store: CheckpointStore, step: int, state: dict[str, Any], topology: Topology) -> None:
    """Raise ValueError if the checkpoint's means have other blocks than those of this topology."""
    manifest = store.manifest(step)
    shapes = {name.removeprefix(STATE): tuple(spec.shape) for name, spec in manifest.tensors.items()}
    if found := misplaced(state["optimizer"]["state"], shapes):
        before, now = (
            "not quantized" if size is None else f"quantized in blocks of {size} numbers"
            for size in (found.before, found.now)
        )
        raise ValueError(
            f"the checkpoint's optimizer state of {found.weight} is {before}, and on this topology {now}, since "
            f"parallel.tp = {topology.tp} cuts its rows in other parts; set parallel.tp = {manifest.about.mesh['tp']} as the "
            "checkpoint, with any number of data-parallel ranks"
        )


def saved_settings(store: CheckpointStore, step: int) -> Settings:
    """Return the settings in the checkpoint of `step`."""
    return msgspec.convert(store.values(step, "settings")["settings"], Settings)


def _tensors(model: Llama, optimizer: torch.optim.Optimizer, *, with_head: bool = False) -> dict[str, Any]:
    """Return the trained tensors by name; `with_head` adds the head that shares the embedding's."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names |= {HEAD} if with_head else set()
    weights = {name: tensor for name, tensor in get_model_state_dict(model).items() if name in names}
    # get_optimizer_state_dict creates the state of a new optimizer, for a checkpoint to load into.
    return {MODEL: weights, "optimizer": get_optimizer_state_dict(model, optimizer)}


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
