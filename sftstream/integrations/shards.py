"""Let the processes of another trainer agree on the end of the data, the state and refused rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from sftstream.integrations.dataset import PackDataset
from sftstream.integrations.layouts import Batch
from sftstream.records import Refusal
from sftstream.state import merge
from sftstream.streaming.assignment import WHOLE
from sftstream.streaming.refusals import RowCounts, exceeded_limits, require_few_refused


def require_whole_step(processes: int, accumulated: int, batch: int, setting: str) -> None:
    """Raise ValueError unless a step of a trainer is `batch` packs, the global batch of the data.

    `accumulated` is the value of the trainer's `setting`: batches of each process in a step.
    """
    if processes * accumulated == batch:
        return
    remedy = (
        f"set {setting}={batch // processes}"
        if batch % processes == 0
        else f"choose a number of processes that divides {batch}, or another data.global_batch"
    )
    raise ValueError(
        f"a step would be {processes} processes x {setting} = {accumulated}, together {processes * accumulated} packs, "
        f"but data.global_batch = {batch}; {remedy}"
    )


class Shards:
    """The shards of a run, one PackDataset in each process. All methods are collective.

    The processes exchange a few numbers between CPUs, over a process group of their own, so that no
    GPU is waited for. Processes with the same shard, such as tensor-parallel ranks, count once.
    Without torch.distributed, `dataset` is the only shard. The constructor is collective too.
    """

    def __init__(self, dataset: PackDataset) -> None:
        self._dataset = dataset
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() and dist.get_world_size() > 1 else None

    def finished(self, packs: int | None = None) -> bool:
        """Return True on all processes if the data ends with the step that ends after `packs`
        packs; by default the step of the last batch.

        Raises ValueError on all processes if too many rows of a source are refused, or if the
        processes have fewer shards than the run.
        """
        end = self._dataset.step_end(packs)
        if self._group is None:
            return end.exhausted  # a loader of the whole run counts refused rows itself
        shard = self._dataset.own_shard or WHOLE
        row = torch.zeros(shard.count, 1 + 3 * len(end.row_counts), dtype=torch.int64)
        row[shard.index] = torch.tensor([int(end.exhausted), *(n for count in end.row_counts for n in count)])
        # The largest value of each shard: processes with the same shard have the same row.
        dist.all_reduce(row, dist.ReduceOp.MAX, group=self._group)
        exhausted, *numbers = row.sum(0).tolist()
        self._require_few_refused([RowCounts(*numbers[i : i + 3]) for i in range(0, len(numbers), 3)])
        return bool(exhausted == shard.count)

    def state_dict(self, packs: int | None = None) -> dict[str, Any]:
        """Return on all processes the state of the whole run: see `PackDataset.state_dict`.

        The state can be loaded by any number of shards. Without `packs`, all processes must have
        taken the same number of batches.
        """
        state = self._dataset.state_dict(packs)
        if self._group is None:
            return state
        shard = self._dataset.own_shard or WHOLE
        gathered: list[tuple[int, Mapping[str, Any]]] = [(0, {})] * dist.get_world_size(self._group)
        dist.all_gather_object(gathered, (shard.index, state), group=self._group)
        states = dict(gathered)
        return merge([states[index] for index in sorted(states)])

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of this process up to the end of the data, for trainers that stop when
        their data stops.

        All processes must request the same number of batches: after each step they agree whether
        the data has ended, and all end together.
        """
        for number, batch in enumerate(self._dataset, 1):
            yield batch
            if number % self._dataset.micro_batches == 0 and self.finished():
                return

    def total(self, number: int) -> int:
        """Return the sum of a number over all shards."""
        if self._group is None:
            return number
        shard = self._dataset.own_shard or WHOLE
        row = torch.zeros(shard.count, dtype=torch.int64)
        row[shard.index] = number
        dist.all_reduce(row, dist.ReduceOp.MAX, group=self._group)  # ranks of one shard count once
        return int(row.sum())

    def _require_few_refused(self, counts: list[RowCounts]) -> None:
        loader = self._dataset.loader
        if not exceeded_limits(loader.config, loader.corpus.sizes, counts):
            return
        gathered: list[list[tuple[Refusal, str]]] = [[]] * dist.get_world_size(self._group)
        dist.all_gather_object(gathered, loader.refused_examples, group=self._group)
        located = [example for examples in gathered for example in examples]
        require_few_refused(loader.config, loader.corpus.sizes, counts, located)
