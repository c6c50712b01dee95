"""How the processes of a run act as one: a failure on any rank is an error on all of them, never a hang."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from checkpoints.errors import CheckpointError, LostRank

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Ranks:
    """The processes of the default process group, or this process alone where there is none.

    Every method raises `LostRank` where another rank has ended or has not answered within the group's time.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None

    @classmethod
    def join(cls, timeout: timedelta) -> Ranks:
        """Collective. Makes a group of its own, so that it can be used in a thread beside the run's collectives.

        It is of gloo, whose objects travel through host memory; NCCL would send them through each rank's GPU.
        """
        if not dist.is_initialized():
            return cls(0, 1, None)
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=timeout))

    def agree(self, task: str, work: Callable[[], T]) -> T:
        """Runs `work` on every rank and returns this rank's result; raises on all ranks if it failed on any."""
        try:
            result = work()
        except CheckpointError as error:
            self._failures(task, error)
            raise
        except Exception as error:
            failure = CheckpointError(f"{task} failed on rank {self.rank}: {type(error).__name__}: {error}")
            self._failures(task, failure)
            raise failure from error
        for failure in self._failures(task, None):
            raise failure
        return result

    def lead(self, task: str, mine: T, work: Callable[[list[T]], R]) -> R:
        """Rank 0 runs `work` on what all ranks brought, in their order, and all ranks get its result."""
        return self._broadcast(task, self._on_first(task, mine, work))

    def divide(self, task: str, mine: T, work: Callable[[list[T]], list[R]]) -> R:
        """Rank 0 runs `work` on what all ranks brought, in their order, and each rank gets its item of the result."""
        return self._scatter(task, self._on_first(task, mine, work))

    def _on_first(self, task: str, mine: T, work: Callable[[list[T]], R]) -> R | None:
        everyone = self._gather(task, mine)
        return self.agree(task, lambda: None if everyone is None else work(everyone))

    def _failures(self, task: str, mine: CheckpointError | None) -> list[CheckpointError]:
        everyone: list[CheckpointError | None] = [mine] * self.size
        if self.group is not None:
            with _answered(task):
                dist.all_gather_object(everyone, mine, group=self.group)
        return [failure for failure in everyone if failure is not None]

    def _gather(self, task: str, mine: T) -> list[T] | None:
        everyone = [mine] * self.size if self.rank == 0 else None
        if self.group is not None:
            with _answered(task):
                dist.gather_object(mine, everyone, dst=0, group=self.group)
        return everyone

    def _broadcast(self, task: str, result: R | None) -> R:
        box: list[Any] = [result]
        if self.group is not None:
            with _answered(task):
                dist.broadcast_object_list(box, src=0, group=self.group)
        return cast(R, box[0])

    def _scatter(self, task: str, results: list[R] | None) -> R:
        box: list[Any] = results[:1] if results else [None]
        if self.group is not None:
            with _answered(task):
                dist.scatter_object_list(box, results, src=0, group=self.group)
        return cast(R, box[0])


@contextmanager
def _answered(task: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # The only type that gloo raises, for a closed connection and for a time-out.
        raise LostRank(
            f"{task}: a rank has ended or does not answer, so this one gives up ({str(error).split('. ')[0]})"
        ) from error
