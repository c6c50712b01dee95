"""Train a Llama on conversations: `torchrun -m trainer.main [run.toml] [section.key=value ...] [--plan[=GPUS]]`.

Killed at any moment and started again with the same words, it goes on where it was. Without a config it runs the demo.
With `--plan` it says what the run would take, on the processes there are or on so many GPUs, and ends.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from checkpoints import CheckpointError, Recipe
from sftstream import PackAssignment
from trainer.checkpointing.about import about
from trainer.checkpointing.saves import Saves
from trainer.checkpointing.snapshot import Progress, Restored, Settings, capture, restore
from trainer.config import TrainConfig, load_config
from trainer.distributed.determinism import determinism
from trainer.distributed.mesh import Topology, distributed, exit_process, named_dtype, print_error
from trainer.estimate import estimate, show
from trainer.llama.blocks import prepare_blocks
from trainer.llama.config import LlamaConfig
from trainer.llama.export import export, require_replaceable
from trainer.llama.hf_config import find_model, read_config
from trainer.llama.init import init_weights
from trainer.llama.model import Llama
from trainer.llama.parallel import build
from trainer.llama.recipe import recipe
from trainer.llama.weights import load_weights
from trainer.reporting.display import Display
from trainer.reporting.metrics import RunLog, StepMetrics
from trainer.training.evaluation import Question, evaluate, read_questions
from trainer.training.optimizer import build_optimizer, learning_rate
from trainer.training.step import StepResult, train_step
from trainer.training.step_reader import StepReader, StepTotals, gather_refusals, open_loader, reduce_totals
from trainer.training.stop import StopRequest
from trainer.training.validation import Validation

DEMO = Path(__file__).parents[1] / "examples" / "demo.toml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the config that the command line names; every error a user can cause is one line on stderr, and 1 is returned."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)  # noqa: T201
        return 0
    plans = [word for word in words if word.partition("=")[0] == "--plan"]
    words = [word for word in words if word not in plans]
    path = Path(words.pop(0)) if words and "=" not in words[0] else DEMO
    try:
        config = load_config(path, words)
        if plans:
            _plan(config, plans[-1])
            return 0
        with determinism(config.run.deterministic), distributed(config.run.device, config.parallel) as topology:
            run = Run(config, topology)
            with run.saves.store:
                run.train()
    except (ValueError, OSError, CheckpointError) as error:
        return print_error(error)
    return 0


class Run:
    """One process of a training run."""

    def __init__(self, config: TrainConfig, topology: Topology) -> None:
        self.config = config
        self.topology = topology
        self.stop = StopRequest()
        self.display = Display(quiet=not topology.first)
        torch.manual_seed(config.run.seed)
        self.saves = Saves(config, self.display)
        self.init_from = find_model(config.model.init_from) if config.model.init_from else None
        self.shape = _shape(config, self.init_from)
        self.compute_dtype = named_dtype(config.run.compute_dtype, topology.device)
        self.settings = Settings.of(config, self.shape, self.compute_dtype)
        self.exported = config.run.directory / "export"
        # Before any work is done, since these are the first and the last thing that can be wrong.
        self.latest = self.saves.latest()
        if topology.first:
            require_replaceable(self.exported)
        self.model = self._build_model()
        self.optimizer = build_optimizer(self.model, config.optimizer)
        restored = self._restore()
        self.reseeded = restored.reseeded
        self.progress = restored.progress
        self.loader = open_loader(config.data, topology, restored.data, self.shape.vocab_size)
        self.encoder = self.loader.encoder if self.loader else None
        self.questions = self._questions() if topology.first else []
        self.recipe = self._recipe() if topology.first else None
        self.total_rows = self._total_rows()
        assignment = PackAssignment(config.data.streams, config.data.global_batch, topology.dp)
        self.step_reader = StepReader(self.loader, assignment, config.data.capacity, topology.tp_group, ahead=True)
        self.validation = self._validation()

    def train(self) -> None:
        """Step until the run ends or is asked to stop, then export and evaluate what came out."""
        self._say_where()
        if not self.finished:
            with self.stop, self._open_log() as log, self.display:
                while not self.finished and not self._step(log):
                    pass
                if log:
                    self._tell_refused(log.refused_by_reason())
        self.step_reader.close()
        if not self.finished:
            self.display.say(f"stopped after step {self.progress.step}; the same command goes on from there")
            return
        self._export()

    def _tell_refused(self, refused: Counter[str]) -> None:
        listed = ", ".join(f"{reason}: {count:,}" for reason, count in refused.most_common())
        if refused:
            self.display.say(
                f"refused {refused.total():,} of {self.progress.rows:,} rows so far ({listed}); see refused.jsonl"
            )

    @property
    def finished(self) -> bool:
        """The data has ended, or the steps have."""
        steps = self.config.run.steps
        return self.progress.finished or (steps is not None and self.progress.step >= steps)

    def _step(self, log: RunLog | None) -> bool:
        """Take one step; true where the run was asked to stop."""
        config, began = self.config, time.perf_counter()
        packs = self.step_reader.packs(self.progress.step)
        waited = time.perf_counter() - began
        count = reduce_totals(
            self.progress.step, packs, self.step_reader, self.topology, stop=self.stop.asked or self.saves.failed()
        )
        if not count.stop and self.progress.step + 1 != config.run.steps:
            self.step_reader.read_ahead()
        rate = learning_rate(config.optimizer, config.schedule, self.progress.step, self.share or 0.0, config.run.steps)
        result = train_step(
            self.model,
            self.optimizer,
            packs,
            self.topology,
            trained_tokens=count.trained_tokens,
            learning_rate=rate,
            clip=config.optimizer.clip,
        )
        self._advance(count, result)
        refusals = gather_refusals(packs, self.step_reader, self.topology) if count.refused else []
        seconds = time.perf_counter() - began
        validation_loss = self.validation.after(self.progress.step, self.model) if self.validation else None
        if log:
            reasons = Counter(refusal.reason for refusal, _ in refusals)
            metrics = self._metrics(count, reasons, result, rate, waited, seconds, validation_loss)
            log.step(metrics)
            log.refused(self.progress.step, refusals)
            self.display.step(metrics, self.share, last=self.finished)
        last = count.stop > 0 or self.finished
        if last or self.progress.step % config.checkpoint.every == 0:
            self._save(log, validation_loss, last=last)
        return count.stop > 0

    def _advance(self, count: StepTotals, result: StepResult) -> None:
        step = self.progress.step + 1
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise ValueError(
                f"step {step}: the loss is {result.loss} and the gradient's norm {result.grad_norm}; lower "
                "optimizer.learning_rate, or look at the step's conversations: the same command repeats it"
            )
        self.progress = Progress(
            step=step,
            rows=self.progress.rows + count.rows,
            tokens=self.progress.tokens + count.tokens,
            trained_tokens=self.progress.trained_tokens + count.trained_tokens,
            loss=result.loss,
            finished=count.unexhausted_shards == 0,
        )

    @property
    def share(self) -> float | None:
        """How much of the run is done, in [0, 1]: of its conversations where their number is known, or of its steps."""
        if self.total_rows:
            return self.progress.rows / self.total_rows
        return min(1.0, self.progress.step / self.config.run.steps) if self.config.run.steps else None

    def _metrics(
        self,
        count: StepTotals,
        reasons: Counter[str],
        result: StepResult,
        rate: float,
        waited: float,
        seconds: float,
        validation_loss: float | None,
    ) -> StepMetrics:
        data = self.config.data
        return StepMetrics(
            step=self.progress.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            tokens=count.tokens,
            trained_tokens=count.trained_tokens,
            rows=self.progress.rows,
            refused=count.refused,
            refused_by_reason=dict(reasons),
            fill=count.tokens / (data.capacity * data.global_batch),
            tokens_per_second=count.tokens / seconds,
            data_wait=waited,
            seconds=seconds,
            batch_digest=count.digest,
            validation_loss=validation_loss,
        )

    def _save(self, log: RunLog | None, validation_loss: float | None, *, last: bool) -> None:
        state = self.step_reader.state
        held_out = self.validation.digest if self.validation else None
        run = partial(
            capture,
            model=self.model,
            optimizer=self.optimizer,
            progress=self.progress,
            data=state,
            settings=self.settings,
            recipe=self.recipe,
            topology=self.topology,
            about=about(self.config, self.topology, state, held_out, validation_loss) if state else None,
        )
        self.saves.save(run, log, last=last)

    def _build_model(self) -> Llama:
        config = self.config
        model = build(
            self.shape,
            self.topology.mesh,
            self.topology.device,
            capacity=config.data.capacity,
            compute_dtype=self.compute_dtype,
            weights_dtype=named_dtype(config.run.weights_dtype, self.topology.device),
            reshard_after_forward=config.parallel.reshard_after_forward,
        )
        prepare_blocks(model, recompute=config.run.recompute, compiled=config.run.compile)
        if self.latest is not None:
            return model
        if self.init_from:
            load_weights(model, self.init_from)
        else:
            init_weights(model, config.run.seed)
        return model

    def _restore(self) -> Restored:
        if self.latest is None:
            return Restored(Progress(), None)
        return restore(self.saves.store, self.model, self.optimizer, self.settings, self.topology, self.latest)

    def _validation(self) -> Validation | None:
        if self.config.validation is None or self.finished:
            return None
        validation = Validation(self.config, self.topology, self.encoder)
        if self.latest is not None and self.config.checkpoint.keep_best is not None:
            validation.require_comparable(self.saves.store.manifest(self.latest).about)
        return validation

    def _questions(self) -> list[Question]:
        """Read before the first step: what is wrong with them is not found after the last."""
        assert self.encoder is not None
        return read_questions(self.config.evaluation.path, self.encoder) if self.config.evaluation else []

    def _recipe(self) -> Recipe:
        assert self.encoder is not None
        words, stops = self.encoder.tokenizer.hf, self.encoder.stop_ids
        return recipe(self.shape, self.model.norm.weight.dtype, words, stops, self.init_from)

    def _total_rows(self) -> int | None:
        box = [self.loader.total_rows if self.loader else None]
        dist.broadcast_object_list(box)
        return box[0]

    def _open_log(self) -> AbstractContextManager[RunLog | None]:
        return RunLog(self.config.run.directory, self.progress.step) if self.topology.first else nullcontext()

    def _say_where(self) -> None:
        run, parameters = self.config.run, sum(p.numel() for p in self.model.parameters())
        rows = f" on {self.total_rows:,} conversations in all epochs" if self.total_rows else ""
        self.display.say(f"{run.directory}: a Llama of {parameters:,} parameters{rows}; {self.topology.describe()}")
        if self.validation:
            self.display.say(self.validation.describe())
        for step, reason in self.saves.store.rejected.items():
            self.display.say(f"checkpoint of step {step} is damaged and was passed over: {reason}")
        if self.saves.store.rejected and self.latest is None:
            self.display.say("no checkpoint is whole, so the run begins anew; the damaged ones are left aside")
        if self.finished:
            self.display.say(f"finished after step {self.progress.step}; give it another run.name to train again")
        elif self.progress.step:
            self.display.say(f"resuming after step {self.progress.step}, {self.progress.rows:,} conversations in")
        if self.reseeded:
            self.display.say(
                "the random generators start anew from seed, step and rank: the checkpoint is of another topology"
            )

    def _export(self) -> None:
        if not self.progress.trained_tokens:
            raise ValueError(f"nothing was trained: all {self.progress.rows:,} rows were refused; see refused.jsonl")
        export(
            self.model,
            self.shape,
            self.exported,
            self.encoder.tokenizer.hf if self.encoder and self.topology.first else None,
            stop_token_ids=self.encoder.stop_ids if self.encoder else (),
            init_from=self.init_from,
            dtype=named_dtype(self.config.run.export_dtype, self.topology.device),
        )
        self.display.say(f"exported to {self.exported}")
        if self.questions:
            self._evaluate()

    def _evaluate(self) -> None:
        """On the first rank. The others end meanwhile: NCCL would let them wait for ten minutes at most."""
        config = self.config.evaluation
        assert config is not None
        assert self.encoder is not None
        device = self.topology.device
        evaluation = evaluate(self.exported, self.questions, self.encoder.stop_ids, config.max_new_tokens, device)
        self.display.say(evaluation.describe(config.show))


def _plan(config: TrainConfig, word: str) -> None:
    gpus = word.partition("=")[2] or os.environ.get("WORLD_SIZE", "1")
    if not gpus.isdecimal() or not int(gpus):
        raise ValueError(f"{word}: give a number of GPUs, as in --plan=32")
    init_from = find_model(config.model.init_from) if config.model.init_from else None
    console = Console(quiet=os.environ.get("RANK", "0") != "0", highlight=False)
    show(estimate(config, _shape(config, init_from), int(gpus)), config, console)


def _shape(config: TrainConfig, init_from: Path | None) -> LlamaConfig:
    if init_from is not None:
        return read_config(init_from)
    assert config.model.shape is not None
    return config.model.shape


if __name__ == "__main__":
    level = os.environ.get("LOGLEVEL", "WARNING")  # torchrun's own variable
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    exit_process(main())
