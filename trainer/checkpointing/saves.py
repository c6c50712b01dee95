"""When a run's checkpoints are written, and what becomes of the run when one cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch.distributed as dist

from checkpoints import CheckpointError, CheckpointStore, CorruptCheckpoint, LostRank
from trainer.checkpointing.snapshot import Snapshot
from trainer.config import TrainConfig
from trainer.reporting.display import Display
from trainer.reporting.metrics import RunLog


class Saves:
    """A run's checkpoints, which no other run may touch from here on, under the config's policy. Collective."""

    def __init__(self, config: TrainConfig, display: Display) -> None:
        self.config = config.checkpoint
        self.display = display
        root = self.config.root or config.run.directory / "checkpoints"
        limits = self.config
        self.store = CheckpointStore(root, keep=limits.keep, keep_every=limits.keep_every, keep_best=limits.keep_best)
        self.store.claim()

    def latest(self) -> int | None:
        """The newest step that is whole; None where the run begins, for the first time or anew because the config says so.

        Steps that are damaged stay: the first save puts them aside under other names.
        """
        try:
            return self.store.latest()
        except CorruptCheckpoint as error:
            if not self.config.fresh_start:
                raise CheckpointError(
                    f"{error}, or here by checkpoint.fresh_start = true, which leaves them aside"
                ) from error
        return None

    def save(self, snapshot: Snapshot, log: RunLog | None, *, last: bool) -> None:
        """Force the log's lines to the disk, then commit `snapshot`.

        Waits for the save under way first, so that no more than one copy of a snapshot's tensors is held. `last`: the run
        ends after this save, so that its error is raised under any policy, and the save is not left to the background.
        """
        with self._tolerate_save_errors():
            self.store.wait()
        with nullcontext() if last else self._tolerate_save_errors():
            _sync(log)
            save = self.store.save if last or not self.config.background else self.store.save_later
            save(snapshot.step, snapshot.tensors, snapshot.values, snapshot.about)

    def failed(self) -> bool:
        """A save in the background has failed, as this rank knows, and the run must stop; its last save raises why."""
        if self.store.failed and self.config.on_save_error == "continue":
            with self._tolerate_save_errors():
                self.store.wait()
        return self.store.failed

    @contextmanager
    def _tolerate_save_errors(self) -> Iterator[None]:
        try:
            yield
        except LostRank:
            raise  # There is nobody to go on with.
        except CheckpointError as error:
            if self.config.on_save_error == "stop":
                raise
            self.display.say(f"going on without this checkpoint: {error}")


def _sync(log: RunLog | None) -> None:
    """Forces the log to the disk; an error of the rank that writes it is one of all ranks."""
    failure: list[str | None] = [None]
    try:
        if log:
            log.sync()
    except OSError as error:
        failure = [f"the metrics of the steps before this checkpoint cannot be written: {error}"]
    dist.broadcast_object_list(failure)
    if failure[0]:
        raise CheckpointError(failure[0])
