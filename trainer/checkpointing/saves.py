"""Write a run's checkpoints, and stop or continue the run after a failed write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

from checkpoints import CheckpointError, CheckpointStore, CorruptCheckpoint, LostRank
from sftstream import one_line
from trainer.checkpointing.snapshot import Snapshot
from trainer.config import TrainConfig
from trainer.distributed.mesh import on_first_rank
from trainer.reporting.display import Display
from trainer.reporting.metrics import RunLog


class Saves:
    """The checkpoints of a run, under the policy of the `[checkpoint]` table. Collective.

    Raises CheckpointError if another run uses the directory.
    """

    def __init__(self, config: TrainConfig, display: Display) -> None:
        self.config = config.checkpoint
        self.display = display
        root = self.config.place or config.run.directory / "checkpoints"
        timeout = timedelta(seconds=config.parallel.timeout_seconds)
        self.store = CheckpointStore(root, self.config.retention, timeout=timeout)
        self.store.claim()

    def latest(self) -> int | None:
        """Return the newest undamaged step, or None for a run that starts from step 0.

        Raises CheckpointError if all steps are damaged, unless `checkpoint.fresh_start` is set; the
        first save then renames the damaged steps.
        """
        try:
            return self.store.latest()
        except CorruptCheckpoint as error:
            if not self.config.fresh_start:
                raise CheckpointError(
                    f"{error}, or set checkpoint.fresh_start = true to start from step 0 and keep the damaged ones aside"
                ) from error
        return None

    def save(self, snapshot: Snapshot, log: RunLog | None, *, last: bool) -> None:
        """Force the log's lines to the disk, then save `snapshot`. Collective.

        Waits for an earlier save first, so that host memory holds the tensors of one snapshot at
        most. `last` marks the final save of a run: the call returns after the commit, and raises
        CheckpointError under any policy.
        """
        with self._tolerate_save_errors():
            self.store.wait()
        with nullcontext() if last else self._tolerate_save_errors():
            on_first_rank(lambda: _sync(log) if log else None)
            save = self.store.save if last or not self.config.background else self.store.save_later
            save(snapshot.step, snapshot.tensors, snapshot.values, snapshot.about)

    def failed(self) -> bool:
        """Return True if a background save has failed on this rank and the run must stop.

        The next call of `save` raises the error. Under `on_save_error = "continue"` the error is
        printed instead.
        """
        if self.store.failed and self.config.on_save_error == "continue":
            with self._tolerate_save_errors():
                self.store.wait()
        return self.store.failed

    @contextmanager
    def _tolerate_save_errors(self) -> Iterator[None]:
        try:
            yield
        except LostRank:
            raise  # no run can continue without the lost rank
        except CheckpointError as error:
            if self.config.on_save_error == "stop":
                raise
            self.display.say(f"going on without this checkpoint: {error}")


def _sync(log: RunLog) -> None:
    try:
        log.sync()
    except OSError as error:
        raise CheckpointError(
            f"the metrics of the steps before this checkpoint cannot be written: {one_line(error)}; free the disk"
        ) from error
