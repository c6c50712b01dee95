"""How the processes of a run act as one: a failure on any rank is an error on all of them, never a hang."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch.distributed as dist

from checkpoints.errors import CheckpointError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Ranks:
    """The processes of the default process group, or this process alone where there is none."""

    rank: int
    size: int
    group: dist.ProcessGroup | None

    @classmethod
    def current(cls) -> Ranks:
        """Collective at its first call on a group without a CPU backend, where it makes a gloo group beside it."""
        if not dist.is_initialized():
            return cls(0, 1, None)
        return cls(dist.get_rank(), dist.get_world_size(), _host_group(dist.group.WORLD))

    def agree(self, task: str, work: Callable[[], T]) -> T:
        """Runs `work` on every rank and returns this rank's result; raises on all ranks if it failed on any."""
        try:
            result = work()
        except CheckpointError as error:
            self._failures(error)
            raise
        except Exception as error:
            failure = CheckpointError(f"{task} failed on rank {self.rank}: {type(error).__name__}: {error}")
            self._failures(failure)
            raise failure from error
        for failure in self._failures(None):
            raise failure
        return result

    def lead(self, task: str, mine: T, work: Callable[[list[T]], R]) -> R:
        """Rank 0 runs `work` on what all ranks brought, in their order, and all ranks get its result."""
        return self._broadcast(self._on_first(task, mine, work))

    def divide(self, task: str, mine: T, work: Callable[[list[T]], list[R]]) -> R:
        """Rank 0 runs `work` on what all ranks brought, in their order, and each rank gets its item of the result."""
        return self._scatter(self._on_first(task, mine, work))

    def _on_first(self, task: str, mine: T, work: Callable[[list[T]], R]) -> R | None:
        everyone = self._gather(mine)
        return self.agree(task, lambda: None if everyone is None else work(everyone))

    def _failures(self, mine: CheckpointError | None) -> list[CheckpointError]:
        everyone: list[CheckpointError | None] = [mine] * self.size
        if self.group is not None:
            dist.all_gather_object(everyone, mine, group=self.group)
        return [failure for failure in everyone if failure is not None]

    def _gather(self, mine: T) -> list[T] | None:
        everyone = [mine] * self.size if self.rank == 0 else None
        if self.group is not None:
            dist.gather_object(mine, everyone, dst=0, group=self.group)
        return everyone

    def _broadcast(self, result: R | None) -> R:
        box: list[Any] = [result]
        if self.group is not None:
            dist.broadcast_object_list(box, src=0, group=self.group)
        return cast(R, box[0])

    def _scatter(self, results: list[R] | None) -> R:
        box: list[Any] = results[:1] if results else [None]
        if self.group is not None:
            dist.scatter_object_list(box, results, src=0, group=self.group)
        return cast(R, box[0])


@lru_cache(maxsize=1)  # of the run's one default group; asked again after a new init_process_group
def _host_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group whose objects travel through host memory; NCCL alone would send them through each rank's GPU."""
    return world if "cpu:" in dist.get_backend_config(world) else dist.new_group(backend="gloo")
