"""The training loop: take steps, save checkpoints, then export and evaluate the model."""

from __future__ import annotations

import gc
import time
from collections import Counter
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist

from sftstream import Pack, Session, __version__, exceeded_limits, require_few_refused
from trainer.checkpointing.directory import RunDirectory, ends_restarted_worker, locked
from trainer.checkpointing.full_disk import full_disk_explained
from trainer.checkpointing.saves import Saves
from trainer.checkpointing.snapshot import Restored, take_snapshot
from trainer.choices import KernelChoice
from trainer.config import TrainConfig
from trainer.distributed.determinism import determinism
from trainer.distributed.mesh import distributed
from trainer.distributed.watch import Watch
from trainer.finish import finish
from trainer.llama.blocks import start_compiler
from trainer.llama.flops import model_flops, peak_flops
from trainer.out_of_memory import explained
from trainer.report.writer import ReportWriter
from trainer.reporting.display import Display
from trainer.reporting.environment import environment
from trainer.reporting.events import COMPLETE, MOST_SOURCES, STOPPED
from trainer.reporting.fill import FillWatch
from trainer.reporting.ledger import gather_streams
from trainer.reporting.losses import LossReport
from trainer.reporting.messages import early_end_message, refusals_message
from trainer.reporting.metrics import RunLog, StepMetrics, perplexity
from trainer.reporting.shares import SourceShares
from trainer.reporting.trace import Trace
from trainer.setup import Run, prepare_run, say_start
from trainer.track.config import require_installed
from trainer.track.content import About, settings_of
from trainer.track.followers import Followers
from trainer.training.adamw8bit import require_torchao
from trainer.training.answers import AnswerScores
from trainer.training.nonfinite import MOST_IN_A_ROW, broken_weights, find_cause
from trainer.training.progress import Progress
from trainer.training.scorer import require_allowed
from trainer.training.step import StepResult, train_step
from trainer.training.step_reader import LocatedRefusal, StepTotals, gather_refusals, reduce_totals
from trainer.training.stop import StopRequest
from trainer.training.validation import HeldOutLoss


class GlobalBatch(NamedTuple):
    """The packs of a step on one rank."""

    packs: list[Pack]
    """Packs of the rank, a pack per micro-batch."""
    totals: StepTotals
    """Counts over all ranks."""
    waited: float
    """Seconds spent waiting for the packs."""


class FinishedStep(NamedTuple):
    """A step after the update, with results."""

    progress: Progress
    """Progress of the run, the step included."""
    batch: GlobalBatch
    result: StepResult
    learning_rate: float
    refusals: list[LocatedRefusal]
    """Rows refused for the step on all ranks; empty on all ranks but the first."""
    seconds: float
    """Time from the wait for packs to the update, without validation."""
    held_out: HeldOutLoss | None
    """Losses of the held-out packs; None after a step without validation."""
    answers: AnswerScores | None
    """Scores of the answers to held-out questions; None after a step without evaluation."""
    judged: float | None
    """Number that `checkpoint.keep_best` and `validation.patience` compare; None without."""

    @property
    def stopped(self) -> bool:
        """True if any rank was asked to stop after the step."""
        return self.batch.totals.stop > 0


def run(
    config: TrainConfig, command: str = "the same command", *, as_json: bool = False, allow_code: bool = False
) -> bool:
    """Train, export and evaluate the model of `config` on all ranks. Collective.

    `command` is the command line that goes on after a stop. `as_json` prints JSON lines.
    `allow_code` calls the function `evaluation.scorer`.

    Returns False if the run was asked to stop before its end. Raises ValueError, OSError or
    CheckpointError, with a message for the user.
    """
    require_installed(config.trackers)
    require_allowed(config.evaluation.scorer if config.evaluation else None, allow_code=allow_code)
    if config.optimizer.kind == "adamw8bit":
        require_torchao()
    stop, directory = StopRequest(config.run.stop_seconds), RunDirectory(config)
    if ends_restarted_worker(directory):
        return False
    with (
        determinism(config.run.deterministic),
        closing(KernelChoice(config)) as attention,
        distributed(config.run.device, config.parallel) as topology,
    ):
        if config.run.compile is not False and topology.device.type == "cuda":
            start_compiler()
        display = Display(quiet=not topology.first, as_json=as_json)
        torch.manual_seed(config.run.seed)
        saves = Saves(config, display)
        with saves.store, locked(directory), full_disk_explained(directory.path):
            prepared = prepare_run(config, topology, attention, saves, directory, display, command)
            gc.enable()  # disabled since the start of the command
            return _train_and_finish(prepared, stop, command)


def _train_and_finish(prepared: tuple[Run, Restored], stop: StopRequest, command: str) -> bool:
    run, restored = prepared
    say_start(run, restored)
    progress = restored.progress
    with Watch(run.config.parallel.timeout_seconds) as watch, _open_trackers(run):
        if not run.is_complete(progress):
            with explained(run.config, run.source.shape, run.topology.device):
                progress = _train(run, progress, stop, watch)
        run.data.reader.close()
        if run.is_complete(progress):
            finish(run, progress, watch)
            return True
        saved = "and saved its checkpoint" if progress.trained_tokens else "before anything was trained"
        run.display.say(f"stopped after step {progress.step} {saved}; go on with: {command}")
        # torchrun kills the other ranks when a rank ends with the exit code of a stopped run.
        with watch.waiting_for(progress.step, "the last line of the first rank"):
            dist.all_reduce(torch.zeros(1))
    return False


def _train(run: Run, progress: Progress, stopping: StopRequest, watch: Watch) -> Progress:
    """Take steps until the run is complete or asked to stop; return the final progress."""
    done = False
    fill = FillWatch(run.config.data, run.data.reader.assignment.streams)
    with (
        stopping as stop,
        _open_report(run) as report,
        _open_log(run, progress) as log,
        run.display,
        _open_trace(run) as trace,
    ):
        report.update()
        loader = run.data.loader
        losses = LossReport(loader, log, run.display) if log and loader else None
        shares = SourceShares(run.config.data, run.data.sizes, log, progress.step) if log else None
        while not done:
            trace.before(progress.step + 1)
            step = _take_step(run, progress, stop, watch, log)
            progress = step.progress
            trace.after(progress.step)
            if log and losses and shares:
                _report(run, step, log, losses, shares)
                if message := fill.after(step.batch.totals, last=run.is_complete(progress)):
                    run.display.say(message)
            done = step.stopped or run.is_complete(progress)
            if done and not run.is_complete(progress):
                run.directory.mark_stopped()
            # A step without a trained token leaves the optimizer without a state to save.
            if progress.trained_tokens and (done or progress.step % run.config.checkpoint.every == 0):
                with watch.waiting_for(progress.step, "the checkpoint of all ranks"):
                    _save(run, step, log, last=done)
                report.after_checkpoint()
            report.after_step()
        if log:
            log.events.end(COMPLETE if run.is_complete(progress) else STOPPED)
        if progress.ends_early(run.config.patience):
            run.display.say(early_end_message(progress, run.config))
        if log and (refused := log.refused_by_reason()):
            run.display.say(refusals_message(refused, progress.rows))
    return progress


def _open_trace(run: Run) -> Trace:
    return Trace(run.config.run.profile if run.topology.first else None, run.config.run.directory, run.display)


def _open_report(run: Run) -> ReportWriter:
    return ReportWriter(run.config.run.directory, run.config.run.report_seconds if run.topology.first else 0)


def _open_log(run: Run, progress: Progress) -> AbstractContextManager[RunLog | None]:
    loader = run.data.loader
    if not run.topology.first or loader is None:
        return nullcontext()
    log = RunLog(run.config.run.directory, progress.step)
    log.ledger.begin(Session.of(loader, run.topology.sizes, progress.step, __version__))
    config = msgspec.to_builtins(msgspec.structs.replace(run.config, data=loader.config))
    log.events.launch(run.topology.sizes, environment(run.topology.device, loader.workers), config, run.data.total_rows)
    return log


def _open_trackers(run: Run) -> AbstractContextManager[Followers | None]:
    loader, token = run.data.loader, run.description.token
    if not run.topology.first or loader is None or token is None:
        return nullcontext()
    about = run.description.about
    settings, texts = settings_of(msgspec.structs.replace(run.config, data=loader.config, trackers=()))
    facts = About(
        token=token,
        name=run.config.run.name,
        trackers=run.config.trackers,
        settings=settings,
        texts=texts,
        digests=about.digests if about else {},
    )
    return Followers(run.config.run.directory, facts, run.display.say)


def _take_step(run: Run, progress: Progress, stop: StopRequest, watch: Watch, log: RunLog | None) -> FinishedStep:
    """Read the packs, train on them, and validate after every `validation.every`-th step."""
    config, began = run.config, time.perf_counter()
    number = progress.step + 1
    with watch.waiting_for(number, "the packs and counts of all ranks"):
        batch = _next_batch(run, progress, stop)
        if log:
            log.ledger.add(number, batch.totals.segments)  # before the step, for a step that ends the run by an error
        _require_few_refused(run, batch)
    rate = run.learning_rate(progress)
    with watch.waiting_for(number, "the loss and gradients of all ranks"):
        result = train_step(
            run.model,
            run.optimizer,
            batch.packs,
            run.topology,
            trained_tokens=batch.totals.trained_tokens,
            learning_rate=rate,
            clip=config.optimizer.clip,
            z_loss=config.optimizer.z_loss,
            skip_nonfinite=config.run.on_nonfinite == "skip",
        )
    progress = progress.after(batch.totals, result)
    if not result.is_finite:
        with watch.waiting_for(number, "the cause of a loss or gradient that is not finite"):
            _leave_out(run, progress, batch, result, log)
    with watch.waiting_for(number, "the refused rows of all ranks"):
        refusals = gather_refusals(batch.packs, run.data.reader, run.topology) if batch.totals.refused else []
    seconds = time.perf_counter() - began
    with watch.waiting_for(number, "the validation loss of all ranks"):
        held_out = run.validation.after(progress.step, run.model) if run.validation else None
    questions = run.evaluator.during
    answers = questions.after(progress.step, run.model, watch) if questions else None
    judged = held_out.judged if held_out else None
    if config.validation and config.validation.best_by == "answers":
        judged = answers.judged if answers else None
    if config.validation and judged is not None:
        progress = progress.validated(judged, config.validation)
    return FinishedStep(progress, batch, result, rate, refusals, seconds, held_out, answers, judged)


def _leave_out(run: Run, progress: Progress, batch: GlobalBatch, result: StepResult, log: RunLog | None) -> None:
    """Record and show a step whose loss or gradient is not finite. Collective.

    Raises ValueError, with conversations and parameters, unless the run skips the update.
    """
    segments = batch.totals.segments
    cause = find_cause(progress.step, result, run.model, run.data.reader, segments, run.topology)
    if run.config.run.on_nonfinite == "stop":
        raise ValueError(
            f"{cause.text}; lower optimizer.learning_rate, and once there is a checkpoint, set run.accept_changed = "
            '["optimizer"] as well, or set run.on_nonfinite = "skip"'
        )
    if progress.unapplied_in_a_row > MOST_IN_A_ROW:
        raise ValueError(
            f"{cause.text}; the updates of the {MOST_IN_A_ROW} steps before were skipped too; lower "
            'optimizer.learning_rate and set run.accept_changed = ["optimizer"]'
        )
    run.display.say(f"no update: {cause.text}")
    if log:
        log.ledger.add_unapplied(cause.record)
        log.events.unapplied(progress.step, cause.text)


def _next_batch(run: Run, progress: Progress, stop: StopRequest) -> GlobalBatch:
    """Read the next step's packs, agree on the totals, and begin to read the step after."""
    began = time.perf_counter()
    packs = run.data.reader.packs(progress.step)
    waited = time.perf_counter() - began
    stop_here = stop.asked or run.saves.failed()
    totals = reduce_totals(progress.step, packs, run.data.reader, run.topology, stop=stop_here)
    if not totals.stop and progress.step + 1 != run.config.run.steps:
        run.data.reader.read_ahead()
    return GlobalBatch(packs, totals, waited)


def _require_few_refused(run: Run, batch: GlobalBatch) -> None:
    """Raise ValueError on all ranks if too many rows of a source are refused. Collective."""
    counts = batch.totals.row_counts
    if exceeded_limits(run.config.data, run.data.sizes, counts):
        located = gather_refusals(batch.packs, run.data.reader, run.topology)
        require_few_refused(run.config.data, run.data.sizes, counts, located)


def _report(run: Run, step: FinishedStep, log: RunLog, losses: LossReport, shares: SourceShares) -> None:
    """Write the step's line and its refused rows, and show the step to the user."""
    metrics = msgspec.structs.replace(_metrics(run, step), **shares.after(step.batch.totals.segments))
    log.step(metrics)
    log.refused(metrics.step, step.refusals)
    losses.check(step.batch.totals.row_counts)
    run.display.step(metrics, run.share(step.progress), last=run.is_complete(step.progress))


def _metrics(run: Run, step: FinishedStep) -> StepMetrics:
    totals, config, device = step.batch.totals, run.config, run.topology.device
    data = config.data
    mfu = peak = None
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        flops = peak_flops(torch.cuda.get_device_name(device))
        needed = model_flops(run.source.shape, totals.tokens, totals.trained_tokens, totals.squares, config.lora)
        mfu = needed / (step.seconds * dist.get_world_size() * flops) if flops else None
    return StepMetrics(
        step=step.progress.step,
        loss=step.result.loss,
        grad_norm=step.result.grad_norm,
        learning_rate=step.learning_rate,
        tokens=totals.tokens,
        trained_tokens=totals.trained_tokens,
        rows=step.progress.rows,
        refused=totals.refused,
        refused_by_reason=dict(Counter(refusal.reason for refusal, _ in step.refusals)),
        fill=totals.tokens / (data.capacity * data.global_batch),
        tokens_per_second=totals.tokens / step.seconds,
        gpu_tokens_per_second=totals.tokens / step.seconds / dist.get_world_size(),
        time=time.time(),
        mfu=mfu,
        peak_memory=peak,
        data_wait=step.batch.waited,
        seconds=step.seconds,
        batch_digest=totals.digest,
        unapplied=not step.result.is_finite,
        perplexity=perplexity(step.result.loss),
        z_loss=step.result.z_loss,
        **(_held_out(step.held_out) if step.held_out else {}),
        **(step.answers._asdict() if step.answers else {}),
    )


def _held_out(losses: HeldOutLoss) -> dict[str, Any]:
    """Return the fields of `StepMetrics` for a validation."""
    fields = {"validation_loss": losses.loss, "validation_perplexity": perplexity(losses.loss)}
    if not 1 < len(losses.by_source) <= MOST_SOURCES:
        return fields
    return fields | {
        "validation_loss_by_source": losses.by_source,
        "validation_perplexity_by_source": tuple(
            None if loss is None else perplexity(loss) for loss in losses.by_source
        ),
    }


def _save(run: Run, step: FinishedStep, log: RunLog | None, *, last: bool) -> None:
    """Save a checkpoint. Raises ValueError, and saves nothing, if a weight is not finite."""
    began = time.perf_counter()
    if broken := broken_weights(run.model):
        raise ValueError(
            f"step {step.progress.step}: after the update {broken[0]} and {len(broken) - 1} other parameters hold numbers "
            "that are not finite, and nothing is saved; lower optimizer.learning_rate, and once there is a checkpoint, set "
            'run.accept_changed = ["optimizer"] as well'
        )
    position = run.data.reader.position
    streams = gather_streams(position, run.topology)
    if log and position:
        log.ledger.keep_state(position.header, streams)
    snapshot = take_snapshot(run.model, run.optimizer, step.progress, position, run.description, step.judged)
    run.saves.save(snapshot, log, last=last)
    if log:
        log.events.saved(time.perf_counter() - began)
