"""Prepare a run for the first step: build the model, restore a checkpoint, open the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec
import torch
import torch.distributed as dist

from checkpoints import About, Origin, Recipe, hub_name, weight_digests
from sftstream import ChatEncoder, DataState, Forecast, PackLoader, rows_in_all_epochs
from trainer.checkpointing.about import about
from trainer.checkpointing.directory import RunDirectory
from trainer.checkpointing.saves import Saves
from trainer.checkpointing.settings import Settings, carry_over_rows
from trainer.checkpointing.snapshot import TOKEN, Restored, RunDescription, restore, saved_settings
from trainer.choices import ChosenKernel, KernelChoice, choices_line, choose
from trainer.config import TrainConfig
from trainer.distributed.mesh import Topology, named_dtype, on_first_rank
from trainer.llama.blocks import use_kernel
from trainer.llama.export import require_replaceable
from trainer.llama.model import Llama
from trainer.llama.recipe import Base, adapter_recipe, recipe
from trainer.llama.weights import weight_files
from trainer.opening import chosen_line, compile_line, data_line, model_line, peak_of, place_line, steps_left, time_line
from trainer.out_of_memory import explained
from trainer.reporting.display import Display
from trainer.reporting.messages import (
    change_messages,
    damage_messages,
    extension_message,
    progress_message,
)
from trainer.training.answers import HeldOutQuestions
from trainer.training.evaluation import Question, read_questions
from trainer.training.model import ModelSource, build_model, find_source
from trainer.training.optimizer import Optimizer, build_optimizer
from trainer.training.progress import Progress
from trainer.training.schedule import learning_rate
from trainer.training.scorer import Scorer, load_scorer
from trainer.training.step_reader import StepReader, assign_packs, open_loader
from trainer.training.validation import Validation
from trainer.training.warm_up import warm_up


class RunData(NamedTuple):
    """The data of a run on one rank."""

    reader: StepReader
    total_rows: int | None
    """Rows of all epochs, equal on all ranks; None if the run has no epochs or a source is
    streamed."""
    sizes: tuple[int | None, ...]
    """Rows of each source, equal on all ranks; None for a streamed source."""

    @property
    def loader(self) -> PackLoader | None:
        """The loader of this rank's packs; None on ranks that receive their packs."""
        return self.reader.loader


class Evaluator(NamedTuple):
    """Questions to the model, and the function that scores its answers."""

    questions: list[Question]
    """Questions for the finished model; empty on all ranks but the first."""
    scorer: Scorer | None
    """Function of the user that scores answers; None without, and on all ranks but the first."""
    during: HeldOutQuestions | None
    """The questions with which the model is evaluated during the training; None without."""


@dataclass(frozen=True)
class Run:
    """The parts of a run on one rank, fixed from the first step to the last."""

    given: TrainConfig
    """The config as written, with "auto" settings."""
    config: TrainConfig
    """The config with a value in place of each "auto"."""
    topology: Topology
    source: ModelSource
    model: Llama
    optimizer: Optimizer
    data: RunData
    forecast: Forecast | None
    """Estimate of the packs of the run; None on all ranks but the first."""
    validation: Validation | None
    """None without a `[validation]` table, and in a run complete at the start."""
    evaluator: Evaluator
    description: RunDescription
    saves: Saves
    directory: RunDirectory
    display: Display

    @property
    def encoder(self) -> ChatEncoder | None:
        """The template and tokenizer; None on ranks without a loader."""
        return self.data.loader.encoder if self.data.loader else None

    def is_complete(self, progress: Progress) -> bool:
        """Return True if the data is exhausted, `run.steps` are taken, or patience is used up."""
        return progress.is_complete(self.config.run.steps, self.config.patience)

    def share(self, progress: Progress) -> float | None:
        """Return the finished part of the run in [0, 1], or None if its length is not known."""
        return progress.share(self.data.total_rows, self.config.run.steps)

    def learning_rate(self, progress: Progress) -> float:
        """Return the rate of the step after `progress`."""
        config = self.config
        share = progress.share(self.data.total_rows, None) or 0.0
        return learning_rate(config.optimizer, config.schedule, progress.step, share, config.run.steps)


def prepare_run(
    config: TrainConfig,
    topology: Topology,
    attention: KernelChoice,
    saves: Saves,
    directory: RunDirectory,
    display: Display,
    command: str,
) -> tuple[Run, Restored]:
    """Build the parts of a run and restore the newest checkpoint into them. Collective.

    `command` is the command line of the run, for the checkpoints. The attention kernel is set last:
    its compilation may take as long as all the rest.

    Also reads the evaluation's questions and checks the export directory, so that errors appear
    before the first step. Raises ValueError, OSError or CheckpointError.
    """
    given = config
    display.say(place_line(config, topology))  # first: a model may be downloaded, and layers compiled
    source = find_source(config.model, config.data.tokenizer.path, config.lora)
    latest = saves.latest()
    saved = None if latest is None else saved_settings(saves.store, latest)
    mesh = None if latest is None else saves.store.manifest(latest).about.mesh
    choices = choose(config, source.shape, topology, saved, mesh)
    if choices.crowded:
        attention.wait()
    config, topology = choices.config, replace(topology, parallel=choices.config.parallel)
    base = _base(config, source, topology)
    compute_dtype = named_dtype(config.run.compute_dtype, topology.device)
    settings = Settings.of(config, source, compute_dtype, base.digests if base else None)
    if topology.first:
        _require_replaceable_exports(config)
    token = _own(directory, saves, latest)
    model, optimizer, restored = _build_and_restore(config, source, topology, saves, latest, settings)
    data = _open_data(config, topology, restored.data, source.shape.vocab_size)
    restored = _follow_data(config, restored, data)
    evaluator = _open_evaluator(config, topology, data.loader)
    validation = _open_validation(config, topology, saves, restored, data, evaluator)
    complete = restored.progress.is_complete(config.run.steps, config.patience)
    if data.loader and not complete:
        data.loader.start(foresees=topology.first)
    if config.run.compile and not complete:  # after the data, whose errors need not wait for it
        _compile(config, source, model, topology, display, evaluates=bool(validation or evaluator.during))
    with explained(config, source.shape, topology.device):
        kernel = attention.of(config, source.shape, topology, saved)
    display.say(f"compute  {choices_line(choices, kernel, topology, saved)}")
    config, restored = _with_attention(config, restored, model, kernel)
    description = RunDescription(
        restored.settings,
        topology,
        _recipe(config, source, model, data.loader, base) if topology.first else None,
        token,
        _about(config, topology, data.loader, validation),
        _origin(config, source, command) if topology.first else None,
    )
    run = Run(
        given=given,
        config=config,
        topology=topology,
        source=source,
        model=model,
        optimizer=optimizer,
        data=data,
        forecast=data.loader.forecast() if data.loader and topology.first else None,
        validation=validation,
        evaluator=evaluator,
        description=description,
        saves=saves,
        directory=directory,
        display=display,
    )
    return run, restored


def _build_and_restore(
    config: TrainConfig,
    source: ModelSource,
    topology: Topology,
    saves: Saves,
    latest: int | None,
    settings: Settings,
) -> tuple[Llama, Optimizer, Restored]:
    """Return the model and the optimizer, restored from the checkpoint `latest` if it is a step.

    An error for lack of memory names the settings to change.
    """
    with explained(config, source.shape, topology.device):
        model = build_model(config, source, topology, initialize=latest is None)
        optimizer = build_optimizer(model, config.optimizer)
        if latest is None:
            return model, optimizer, Restored(Progress(), settings)
        accepted = config.run.accept_changed
        return model, optimizer, restore(saves.store, model, optimizer, settings, topology, latest, accepted)


def _require_replaceable_exports(config: TrainConfig) -> None:
    """Raise ValueError if the run could not replace a directory that it exports to."""
    require_replaceable(config.run.export_directory)
    require_replaceable(config.run.adapter_directory)


def _with_attention(
    config: TrainConfig, restored: Restored, model: Llama, chosen: ChosenKernel
) -> tuple[TrainConfig, Restored]:
    """Set the attention kernel of the model; return config and settings with its name."""
    kernel = chosen.kernel
    kernel.load()  # the import of a package would count as time of the first step
    use_kernel(model, kernel)
    config = msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, attention=kernel.name))
    return config, replace(restored, settings=msgspec.structs.replace(restored.settings, attention=kernel.name))


def _compile(
    config: TrainConfig, source: ModelSource, model: Llama, topology: Topology, display: Display, *, evaluates: bool
) -> None:
    """Compile the layers. Collective.

    `evaluates` compiles them for validation and answers too. An error for lack of memory names the
    settings to change.
    """
    display.say(compile_line(config))
    with explained(config, source.shape, topology.device):
        warm_up(model, config.data.capacity, topology, evaluates=evaluates)


def _open_data(config: TrainConfig, topology: Topology, state: DataState | None, vocabulary: int) -> RunData:
    """Open the data at `state`, for a model of `vocabulary` tokens. Collective."""
    loader = open_loader(config.data, topology, state, vocabulary)
    known = [(loader.total_rows, loader.corpus.sizes) if loader else (None, ())]
    dist.broadcast_object_list(known)
    assignment, table = assign_packs(loader, config.data, topology), config.data
    reader = StepReader(loader, assignment, table.capacity, topology.tp_group, sources=len(table.sources), ahead=True)
    return RunData(reader, *known[0])


def say_start(run: Run, restored: Restored) -> None:
    """Print the model, the data, the time, the choices, damaged checkpoints and the step of a
    resume."""
    run.display.say(model_line(run.model, run.config, run.source))
    if run.forecast and run.data.loader:
        _say_data(run, restored.progress, run.data.loader, run.forecast)
    if run.validation:
        run.display.say(f"held out {run.validation.describe()}")
    for line in damage_messages(run.saves.store.rejected, restarted=not restored.resumed):
        run.display.say(line)
    run.display.say(progress_message(restored.progress, run.config))
    rate = run.learning_rate(restored.progress)
    if restored.extended:
        run.display.say(extension_message(restored.progress, rate))
    for line in change_messages(restored.accepted_now, restored.progress.step + 1, rate):
        run.display.say(line)
    if restored.reseeded:
        run.display.say(
            "the random generators are seeded from seed, step and rank, since the checkpoint has another topology"
        )


def _say_data(run: Run, progress: Progress, loader: PackLoader, forecast: Forecast) -> None:
    """Print the lines of the first rank: data, packs, time, choices and unread columns."""
    config, ranks = run.config, dist.get_world_size()
    left = steps_left(config, forecast, progress.step)
    lines = [
        data_line(config.data, run.data.total_rows),
        f"packs    {forecast.describe(config.run.steps)}",
        *([] if left == 0 else [time_line(config, run.source.shape, left, ranks, peak_of(run.topology))]),
        chosen_line(run.given, config, loader.config, run.topology.device),
        *loader.unread_columns(),
    ]
    for line in filter(None, lines):
        run.display.say(line)


def _own(directory: RunDirectory, saves: Saves, latest: int | None) -> str | None:
    """Make this run the owner of its directory, and return the token on rank 0. Collective."""
    tokens: list[str] = []

    def own() -> None:
        saved = None if latest is None else saves.store.values(latest, TOKEN).get(TOKEN)
        tokens.append(directory.own(saved, resumes=latest is not None or bool(saves.store.rejected)))
        directory.forget_stop()

    on_first_rank(own)
    return tokens[0] if tokens else None


def _follow_data(config: TrainConfig, restored: Restored, data: RunData) -> Restored:
    """Return `restored` with settings and progress for data that may have grown. Collective.

    Raises ValueError if the rates of the steps done depend on the number of rows, and the number
    has changed.
    """
    settings, progress = restored.settings, restored.progress
    if restored.data is not None:
        before = rows_in_all_epochs(restored.data)
        settings = carry_over_rows(settings, before, data.total_rows, progress.step, config.run.accept_changed)
    unread = torch.tensor(int(data.loader is not None and not data.loader.exhausted))
    dist.all_reduce(unread)
    extended = progress.exhausted and bool(unread.item())
    if extended:
        progress = msgspec.structs.replace(progress, exhausted=False)
    return replace(restored, settings=settings, progress=progress, extended=extended)


def _origin(config: TrainConfig, source: ModelSource, command: str) -> Origin:
    base = hub_name(config.model.init_from if source.name is None else source.name)
    return Origin(command, base, adapter=config.lora is not None)


def _open_evaluator(config: TrainConfig, topology: Topology, loader: PackLoader | None) -> Evaluator:
    """Read the questions and the user's scorer on the first rank. Collective."""
    table = config.evaluation
    if table is None:
        return Evaluator([], None, None)
    questions: list[Question] = []
    scorer = None
    if topology.first:
        assert loader is not None
        questions = read_questions(table.path, loader.encoder)
        scorer = None if table.scorer is None else load_scorer(table.scorer)
    if table.every is None:
        return Evaluator(questions, scorer, None)
    encoder = loader.encoder if loader else None
    capacity, directory = config.data.capacity, config.run.directory
    during = HeldOutQuestions(table, topology, capacity, questions, encoder, scorer, directory)
    return Evaluator(questions, scorer, during)


def _base(config: TrainConfig, source: ModelSource, topology: Topology) -> Base | None:
    """Return the model under adapters, None without adapters. Rank 0 reads all files. Collective.

    Raises CheckpointError on all ranks if a file cannot be read.
    """
    if config.lora is None:
        return None
    assert source.init_from is not None
    assert source.name is not None
    box: list[dict[str, str]] = [{}]
    directory = source.init_from
    on_first_rank(lambda: box[0].update(weight_digests(weight_files(directory))))
    dist.broadcast_object_list(box)
    return Base(source.name, directory, box[0], named_dtype(config.run.weights_dtype, topology.device))


def _recipe(
    config: TrainConfig, source: ModelSource, model: Llama, loader: PackLoader | None, base: Base | None
) -> Recipe:
    assert loader is not None
    encoder = loader.encoder
    tokenizer = encoder.saved_tokenizer()
    weight = model.norm.weight
    export_dtype = named_dtype(config.run.export_dtype, weight.device)
    if config.lora is not None and base is not None:
        return adapter_recipe(source.shape, config.lora, base, export_dtype, tokenizer, encoder.stop_ids)
    return recipe(source.shape, weight.dtype, export_dtype, tokenizer, encoder.stop_ids, source.init_from)


def _open_validation(
    config: TrainConfig,
    topology: Topology,
    saves: Saves,
    restored: Restored,
    data: RunData,
    evaluator: Evaluator,
) -> Validation | None:
    if config.validation is None or restored.progress.is_complete(config.run.steps, config.patience):
        return None
    encoder, questions = data.loader.encoder if data.loader else None, evaluator.during
    streams = data.reader.assignment.streams
    validation = Validation(config, topology, encoder, streams, questions.digest if questions else None)
    compares = config.checkpoint.keep_best is not None or config.patience is not None
    if restored.data is not None and compares:
        changes = data.loader.position().header.history[len(restored.data.history) :] if data.loader else ()
        accepted = [difference for change in changes for difference in change.differences]
        validation.require_comparable(saves.store.manifest(restored.progress.step).about, accepted)
    return validation


def _about(
    config: TrainConfig, topology: Topology, loader: PackLoader | None, validation: Validation | None
) -> About | None:
    if loader is None:
        return None
    return about(config, topology, loader.position().header, validation.digests if validation else {})
