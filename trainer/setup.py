"""Prepare a run for the first step: build the model, restore a checkpoint, open the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from checkpoints import About, Recipe
from sftstream import ChatEncoder, PackAssignment, PackLoader
from trainer.checkpointing.about import about
from trainer.checkpointing.saves import Saves
from trainer.checkpointing.snapshot import Restored, RunDescription, Settings, restore
from trainer.config import TrainConfig
from trainer.distributed.mesh import Topology, named_dtype
from trainer.llama.export import require_replaceable
from trainer.llama.model import Llama
from trainer.llama.recipe import recipe
from trainer.reporting.display import Display
from trainer.reporting.messages import damage_messages, model_message, progress_messages
from trainer.training.evaluation import Question, read_questions
from trainer.training.model import ModelSource, build_model, find_source
from trainer.training.optimizer import build_optimizer
from trainer.training.progress import Progress
from trainer.training.step_reader import StepReader, open_loader
from trainer.training.validation import Validation


@dataclass(frozen=True)
class Run:
    """The parts of a run on one rank, fixed from the first step to the last."""

    config: TrainConfig
    topology: Topology
    source: ModelSource
    model: Llama
    optimizer: torch.optim.AdamW
    step_reader: StepReader
    total_rows: int | None
    """Rows of all epochs, equal on all ranks; None if the run has no epochs or a source is
    streamed."""
    validation: Validation | None
    """None without a `[validation]` table, and in a run complete at the start."""
    questions: list[Question]
    """Questions for the finished model; empty on all ranks but the first."""
    description: RunDescription
    saves: Saves
    display: Display

    @property
    def encoder(self) -> ChatEncoder | None:
        """The template and tokenizer; None on ranks without a loader."""
        return self.step_reader.loader.encoder if self.step_reader.loader else None

    def is_complete(self, progress: Progress) -> bool:
        """Return True if the data is exhausted or `run.steps` are taken."""
        return progress.is_complete(self.config.run.steps)

    def share(self, progress: Progress) -> float | None:
        """Return the finished part of the run in [0, 1], or None if its length is not known."""
        return progress.share(self.total_rows, self.config.run.steps)


def prepare_run(config: TrainConfig, topology: Topology, saves: Saves, display: Display) -> tuple[Run, Restored]:
    """Build the parts of a run and restore the newest checkpoint into them. Collective.

    Also reads the evaluation's questions and checks the export directory, so that errors appear
    before the first step. Raises ValueError, OSError or CheckpointError.
    """
    source = find_source(config.model)
    settings = Settings.of(config, source.shape, named_dtype(config.run.compute_dtype, topology.device))
    latest = saves.latest()
    if topology.first:
        require_replaceable(config.run.export_directory)
    model = build_model(config, source, topology, initialize=latest is None)
    optimizer = build_optimizer(model, config.optimizer)
    restored = Restored(Progress())
    if latest is not None:
        restored = restore(saves.store, model, optimizer, settings, topology, latest)
    loader = open_loader(config.data, topology, restored.data, source.shape.vocab_size)
    questions = _read_questions(config, loader) if topology.first else []
    validation = _open_validation(config, topology, saves, restored, loader)
    export_recipe = _recipe(source, model, loader) if topology.first else None
    description = RunDescription(settings, topology, export_recipe, _about(config, topology, loader, validation))
    run = Run(
        config=config,
        topology=topology,
        source=source,
        model=model,
        optimizer=optimizer,
        step_reader=_open_step_reader(config, topology, loader),
        total_rows=_total_rows(loader),
        validation=validation,
        questions=questions,
        description=description,
        saves=saves,
        display=display,
    )
    return run, restored


def say_start(run: Run, restored: Restored) -> None:
    """Print the model, the data, damaged checkpoints and the step of a resume."""
    directory, rejected = run.config.run.directory, run.saves.store.rejected
    run.display.say(model_message(directory, run.model, run.total_rows, run.topology))
    for line in run.step_reader.loader.unread_columns() if run.topology.first and run.step_reader.loader else ():
        run.display.say(line)
    if run.validation:
        run.display.say(run.validation.describe())
    for line in damage_messages(rejected, restarted=not restored.resumed):
        run.display.say(line)
    for line in progress_messages(restored.progress, complete=run.is_complete(restored.progress)):
        run.display.say(line)
    if restored.reseeded:
        run.display.say(
            "the random generators are seeded from seed, step and rank, since the checkpoint has another topology"
        )


def _open_step_reader(config: TrainConfig, topology: Topology, loader: PackLoader | None) -> StepReader:
    assignment = PackAssignment(config.data.streams, config.data.global_batch, topology.dp)
    return StepReader(loader, assignment, config.data.capacity, topology.tp_group, ahead=True)


def _read_questions(config: TrainConfig, loader: PackLoader | None) -> list[Question]:
    assert loader is not None
    return read_questions(config.evaluation.path, loader.encoder) if config.evaluation else []


def _recipe(source: ModelSource, model: Llama, loader: PackLoader | None) -> Recipe:
    assert loader is not None
    tokenizer, stop_ids = loader.encoder.tokenizer.hf, loader.encoder.stop_ids
    return recipe(source.shape, model.norm.weight.dtype, tokenizer, stop_ids, source.init_from)


def _total_rows(loader: PackLoader | None) -> int | None:
    box = [loader.total_rows if loader else None]
    dist.broadcast_object_list(box)
    return box[0]


def _open_validation(
    config: TrainConfig, topology: Topology, saves: Saves, restored: Restored, loader: PackLoader | None
) -> Validation | None:
    if config.validation is None or restored.progress.is_complete(config.run.steps):
        return None
    validation = Validation(config, topology, loader.encoder if loader else None)
    if restored.resumed and config.checkpoint.keep_best is not None:
        validation.require_comparable(saves.store.manifest(restored.progress.step).about)
    return validation


def _about(
    config: TrainConfig, topology: Topology, loader: PackLoader | None, validation: Validation | None
) -> About | None:
    if loader is None:
        return None
    return about(config, topology, loader.position().run, validation.digest if validation else None)
