"""Train a Llama on conversations: `torchrun -m trainer.main [run.toml] [section.key=value ...]`.

Killed at any moment and started again with the same words, it goes on where it was. Without a config it runs the demo.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from checkpoints import CheckpointError, CheckpointStore
from sftstream import Deal, PackLoader
from trainer.config import TrainConfig, load_config
from trainer.display import Display
from trainer.evaluate import evaluate
from trainer.feed import Feed, Tally, gather_refusals, tally
from trainer.mesh import Topology, distributed
from trainer.metrics import RunLog, StepMetrics
from trainer.model import Llama, LlamaConfig, init_weights
from trainer.optimizer import build_optimizer, learning_rate
from trainer.parallel import parallelize
from trainer.resume import Progress, Restored, Settings, capture, restore
from trainer.step import StepResult, train_step
from trainer.weights import export, load_weights, read_config

logger = logging.getLogger(__name__)

DEMO = Path(__file__).parents[1] / "examples" / "demo.toml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the config that the command line names; every error a user can cause is one line on stderr, and 1 is returned."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)  # noqa: T201
        return 0
    path = Path(words.pop(0)) if words and "=" not in words[0] else DEMO
    try:
        config = load_config(path, words)
        with distributed(config) as topology:
            Run(config, topology).train()
    except (ValueError, CheckpointError) as error:
        return _tell(error)
    return 0


class StopRequest:
    """While it is entered, SIGINT and SIGTERM ask the run to save and end after the step at hand.

    All of them: a Ctrl-C reaches a rank more than once, from the terminal and from torchrun.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


class Run:
    """One process of a training run."""

    def __init__(self, config: TrainConfig, topology: Topology) -> None:
        self.config = config
        self.topology = topology
        self.stop = StopRequest()
        self.display = Display(quiet=not topology.first)
        _set_determinism(config.run.deterministic)
        torch.manual_seed(config.run.seed)
        self.store = CheckpointStore(config.run.directory / "checkpoints", keep=config.checkpoint.keep)
        self.shape = _shape(config)
        self.settings = Settings.of(config, self.shape, self._compute_dtype())
        # Found before any work is done, since it is the first thing that can be wrong.
        self.latest = self.store.latest()
        self.model = self._build_model()
        self.optimizer = build_optimizer(self.model, config.optimizer)
        restored = self._restore()
        self.progress = restored.progress
        self.loader = self._open_loader(restored)
        self.total_rows = self._total_rows()
        deal = Deal(config.data.streams, config.data.global_batch, topology.dp)
        self.feed = Feed(self.loader, topology, deal, config.data.capacity)

    def train(self) -> None:
        """Step until the run ends or is asked to stop, then export and evaluate what came out."""
        self._say_where()
        if not self.finished:
            with self.stop, self._open_log() as log, self.display:
                while not self.finished and not self._step(log):
                    pass
                if log:
                    self._tell_refused(log.refused_by_reason())
        if self.loader:
            self.loader.close()
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
        packs = self.feed.packs(self.progress.step)
        waited = time.perf_counter() - began
        count = tally(self.progress.step, packs, self.feed, self.topology, stop=self.stop.asked)
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
        refusals = gather_refusals(packs, self.feed, self.topology) if count.refused else []
        if log:
            reasons = Counter(refusal.reason for refusal, _ in refusals)
            metrics = self._metrics(count, reasons, result, rate, waited, time.perf_counter() - began)
            log.step(metrics)
            log.refused(self.progress.step, refusals)
            self.display.step(metrics, self.share, last=self.finished)
        if count.stop or self.finished or self.progress.step % config.checkpoint.every == 0:
            self._save(log)
        return count.stop > 0

    def _advance(self, count: Tally, result: StepResult) -> None:
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
            finished=count.live == 0,
        )

    @property
    def share(self) -> float | None:
        """How much of the run is done, in [0, 1]: of its conversations where their number is known, or of its steps."""
        if self.total_rows:
            return self.progress.rows / self.total_rows
        return min(1.0, self.progress.step / self.config.run.steps) if self.config.run.steps else None

    def _metrics(
        self, count: Tally, reasons: Counter[str], result: StepResult, rate: float, waited: float, seconds: float
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
        )

    def _save(self, log: RunLog | None) -> None:
        if log:
            log.sync()
        state = self.loader.state if self.loader else None
        capture(self.store, self.model, self.optimizer, self.progress, state, self.settings, self.topology)

    def _build_model(self) -> Llama:
        config, device = self.config, self.topology.device
        with torch.device("meta"):
            model = Llama(self.shape)
        parallelize(model, self.topology.mesh, capacity=config.data.capacity, compute_dtype=self._compute_dtype())
        model.to_empty(device=device)
        model.tie()
        if self.latest is not None:
            return model
        if config.model.init_from:
            load_weights(model, Path(config.model.init_from))
        else:
            init_weights(model, config.run.seed)
        return model

    def _compute_dtype(self) -> torch.dtype:
        named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        auto = torch.bfloat16 if self.topology.device.type == "cuda" else torch.float32
        return named.get(self.config.run.compute_dtype, auto)

    def _restore(self) -> Restored:
        if self.latest is None:
            return Restored(Progress(), None)
        return restore(self.store, self.model, self.optimizer, self.settings, self.topology, self.latest)

    def _open_loader(self, restored: Restored) -> PackLoader | None:
        if not self.topology.leads:
            return None
        loader = PackLoader(self.config.data, shard=self.topology.shard, state=restored.data)
        words, rows = len(loader.encoder.tokenizer.hf), self.shape.vocab_size
        if words > rows:
            raise ValueError(
                f"the tokenizer has {words} tokens, model.vocab_size is {rows}; raise it to {words} or more"
            )
        return loader

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
        for step, reason in self.store.rejected.items():
            self.display.say(f"checkpoint of step {step} is damaged and was passed over: {reason}")
        if self.finished:
            self.display.say(f"finished after step {self.progress.step}; give it another run.name to train again")
        elif self.progress.step:
            self.display.say(f"resuming after step {self.progress.step}, {self.progress.rows:,} conversations in")

    def _export(self) -> None:
        if not self.progress.trained_tokens:
            raise ValueError(f"nothing was trained: all {self.progress.rows:,} rows were refused; see refused.jsonl")
        directory = self.config.run.directory / "export"
        encoder = self.loader.encoder if self.loader else None
        export(
            self.model,
            self.shape,
            directory,
            encoder.tokenizer.hf if encoder else None,
            stop_token_ids=encoder.stop_ids if encoder else (),
        )
        self.display.say(f"exported to {directory}")
        if self.config.evaluation and self.topology.first and self.loader:
            self._evaluate(directory)
        dist.barrier()

    def _evaluate(self, directory: Path) -> None:
        config = self.config.evaluation
        assert config is not None
        assert self.loader is not None
        evaluation = evaluate(directory, self.loader.encoder, config, self.topology.device)
        for answer in evaluation.answers[: config.show]:
            self.display.say(
                f"\n{answer.prompt}\n  -> {answer.given}" + ("" if answer.right else f"  (expected {answer.expected})")
            )
        count = len(evaluation.answers)
        self.display.say(f"\n{evaluation.accuracy:.1%} of {count} held-out questions answered exactly")


def _shape(config: TrainConfig) -> LlamaConfig:
    if config.model.init_from:
        return read_config(Path(config.model.init_from))
    assert config.model.shape is not None
    return config.model.shape


def _set_determinism(deterministic: bool) -> None:
    # Read by cuBLAS when it starts; without it deterministic mode refuses matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _tell(error: Exception) -> int:
    """One line, once: what all ranks run into, the first tells, and torchrun then ends the others."""
    if int(os.environ.get("RANK", "0")):
        time.sleep(3)
    print(f"error: {error}", file=sys.stderr)  # noqa: T201
    logger.debug("where it was raised", exc_info=error)  # LOGLEVEL=DEBUG shows it
    return 1


if __name__ == "__main__":
    level = os.environ.get("LOGLEVEL", "WARNING")  # torchrun's own variable
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads outlive their group, and one that lets go of a Python object while the interpreter shuts down aborts
    # the process: about one finished run in fifteen would be reported as failed.
    os._exit(code)
