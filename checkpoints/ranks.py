"""Let the processes of a run act together: a failure on any rank is an error on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from checkpoints.errors import CheckpointError, LostRank, one_line

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Ranks:
    """The processes of the default process group; without a group, this process alone.

    Every method raises LostRank if another rank has ended or has not answered within the timeout of
    the group.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None

    @classmethod
    def join(cls, timeout: timedelta) -> Ranks:
        """Return the ranks of the run, joined by a new process group. Collective.

        A separate group lets a thread communicate beside the collectives of the run. The group uses
        gloo, for objects to travel through host memory; NCCL would send objects through the GPU of
        each rank.
        """
        if not dist.is_initialized():
            return cls(0, 1, None)
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=timeout))

    def agree(self, task: str, work: Callable[[], T]) -> T:
        """Run `work` on every rank and return the local result.

        Raises CheckpointError on all ranks if `work` fails on any rank: no rank waits for a failed
        rank.
        """
        try:
            result = work()
        except CheckpointError as error:
            self._failures(task, error)
            raise
        except Exception as error:
            failure = CheckpointError(f"{task} failed on rank {self.rank}: {type(error).__name__}: {one_line(error)}")
            self._failures(task, failure)
            raise failure from error
        for failure in self._failures(task, None):
            raise failure
        return result

    def lead(self, task: str, local: T, work: Callable[[list[T]], R]) -> R:
        """Run `work` on rank 0 and return the result on all ranks.

        `work` takes the `local` inputs of all ranks, in rank order.
        """
        return self._broadcast(task, self._on_first(task, local, work))

    def divide(self, task: str, local: T, work: Callable[[list[T]], list[R]]) -> R:
        """Run `work` on rank 0 and return item r of the result on rank r.

        `work` takes the `local` inputs of all ranks, in rank order.
        """
        return self._scatter(task, self._on_first(task, local, work))

    def _on_first(self, task: str, local: T, work: Callable[[list[T]], R]) -> R | None:
        inputs = self._gather(task, local)
        return self.agree(task, lambda: None if inputs is None else work(inputs))

    def _failures(self, task: str, local: CheckpointError | None) -> list[CheckpointError]:
        failures: list[CheckpointError | None] = [local] * self.size
        if self.group is not None:
            with _answered(task):
                dist.all_gather_object(failures, local, group=self.group)
        return [failure for failure in failures if failure is not None]

    def _gather(self, task: str, local: T) -> list[T] | None:
        inputs = [local] * self.size if self.rank == 0 else None
        if self.group is not None:
            with _answered(task):
                dist.gather_object(local, inputs, dst=0, group=self.group)
        return inputs

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
    except RuntimeError as error:  # Raised by gloo for a closed connection and for a timeout.
        raise LostRank(
            f"{task}: a rank has ended or does not answer, so this rank gives up ({str(error).split('. ')[0]})"
        ) from error
