"""Offer the packs of a run as the dataset of another trainer."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import datasets
import torch.distributed as dist
import torch.utils.data

from sftstream.config import DataConfig
from sftstream.integrations.layouts import Batch, Layout, hugging_face
from sftstream.loader import LoaderPosition, PackLoader
from sftstream.records import Pack
from sftstream.state import DataState, state_dict_of
from sftstream.streaming.assignment import WHOLE, PackAssignment, Shard
from sftstream.streaming.packing import build_pack
from sftstream.streaming.refusals import RowCounts

STEPS_KEPT = 4
"""Ends of steps whose states a dataset keeps. Trainers request at most the first batch of the next
step before they save the state of a step."""


class StepEnd(NamedTuple):
    """The progress of a shard at the end of a step."""

    packs: int
    """Packs consumed by all shards."""
    position: LoaderPosition
    exhausted: bool
    """True if all streams of the shard are exhausted."""
    row_counts: tuple[RowCounts, ...]
    """Rows read by the shard's streams since the start of the run, by source."""


class PackDataset(datasets.IterableDataset, torch.utils.data.IterableDataset[Batch]):
    """The packs of a shard as batches, each a dict made by `layout`, one pack a batch.

    Opened lazily: the first batch, or the first `state_dict`, opens a PackLoader at the state given
    here or to `load_state_dict`. `workers` processes of this loader load packs ahead (default:
    `config.workers`), so a DataLoader around this dataset has `num_workers = 0`. Each iterator
    continues where the last batch of any iterator ended.

    `shard` is this process's data-parallel part of the run. Trainers on accelerate call the method
    `shard` themselves; in other trainers with several processes, pass `Shard(rank, processes)`. All
    shards get equally many batches, so `streams` and `global_batch` of the config must be multiples
    of the number of shards. A step of the run is `global_batch` packs: each process accumulates the
    gradients of `global_batch / shards` batches.

    A single shard ends with the data. One of several shards never ends: after its streams are
    exhausted it returns empty packs, without trained tokens, until the trainer stops at the step at
    which all shards are exhausted (see `Shards.finished`). If nobody asks for this step, it raises
    RuntimeError after some steps.

    It is a dataset of `datasets` as well, since accelerate and TRL treat only these as sharded by
    themselves. Methods such as `map` and `shuffle` are refused: the config decides the packs.

    Raises ValueError from the first batch if the topology does not fit the config, if the state has
    other data or settings, or inside a worker of a DataLoader.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        shard: Shard | None = None,
        workers: int | None = None,
        state: Mapping[str, Any] | DataState | None = None,
        layout: Layout = hugging_face,
    ) -> None:
        # The base classes are not initialized: datasets' constructor reads a source of examples.
        self._info, self._split = datasets.DatasetInfo(), None
        self.config = config
        self.own_shard = shard
        self.workers = workers
        self.layout = layout
        self._given = None if state is None else DataState.parse(state)
        self._start = self._given
        self._loader: PackLoader | None = None
        self._at: LoaderPosition | None = None
        self._ends: deque[StepEnd] = deque(maxlen=STEPS_KEPT)
        self._unasked = 0
        """Steps of empty packs since the end of a step was last asked for."""

    def __iter__(self) -> Iterator[Batch]:
        if torch.utils.data.get_worker_info() is not None:
            raise ValueError(
                "a PackDataset loads ahead with processes of its own, and cannot be read by workers of a DataLoader; "
                "set num_workers = 0 (in transformers dataloader_num_workers = 0), and data.workers instead"
            )
        for number, pack in enumerate(self._packs()):
            if number == 1:  # TRL looks at the first batch before accelerate divides the dataset
                self._require_shard()
            yield self.layout(pack)

    def state_dict(self, packs: int | None = None) -> dict[str, Any]:
        """Return the state of this shard after the last batch that an iterator returned.

        `packs` asks for the state at the end of one of the last steps instead, for trainers that
        request batches ahead: after step 10 with a global batch of 64, `packs` is 640. The state
        dicts of all shards, combined by `sftstream.merge`, are a state of any topology.

        Raises ValueError if the state after `packs` packs is not kept.
        """
        at = self._position if packs is None else self.step_end(packs).position
        return state_dict_of(*at)

    def load_state_dict(self, state: Mapping[str, Any] | DataState) -> None:
        """Continue from `state`, which may be of another topology, with the next batch.

        Raises ValueError if the state was edited. Differences to the config are found when the
        loader is opened.
        """
        self._go_to(DataState.parse(state))

    def restart(self) -> None:
        """Go back to the state given at construction, or to the beginning of the data."""
        self._go_to(self._given)

    def step_end(self, packs: int | None = None) -> StepEnd:
        """Return the progress at the end of the step with which all shards had consumed `packs`
        packs; by default those of the batches returned so far.

        Raises ValueError if this is not the end of a step, or if the end is not kept any more.
        """
        packs = self._position.header.packs if packs is None else packs
        for end in self._ends:
            if end.packs == packs:
                self._unasked = 0
                return end
        kept = ", ".join(str(end.packs) for end in self._ends) or "none yet"
        raise ValueError(
            f"the state after {packs} packs is not kept, only those after {kept}; ask for the state at the end of a "
            f"step, before {STEPS_KEPT} further steps of packs are requested"
        )

    @property
    def loader(self) -> PackLoader:
        """The loader, opened by the first use. Its position is after the last requested batch."""
        if self._loader is None:
            self._loader = self._opened()
            self._at = self._loader.position()
            self._keep_end(self._loader)
        return self._loader

    @property
    def micro_batches(self) -> int:
        """Number of batches of this shard in each step, the steps of gradient accumulation."""
        return self.config.global_batch // (self.own_shard or WHOLE).count

    @property
    def column_names(self) -> list[str]:
        """Names in a batch, which TRL reads to know that the dataset is tokenized."""
        return list(self.layout(build_pack((), (), self.config.capacity, 0)))

    @property
    def num_shards(self) -> int:
        """The largest number of shards, without a limit: accelerate then calls `shard` for any
        number of processes."""
        return sys.maxsize

    def shard(self, num_shards: int, index: int) -> PackDataset:
        """Return a dataset of shard `index` of `num_shards`, from the state given at construction.

        Raises ValueError if this dataset is a shard already.
        """
        if self.own_shard is not None:
            raise ValueError(
                f"this dataset is already shard {self.own_shard.index} of {self.own_shard.count}, and would be divided "
                "again; leave out `shard` of PackDataset in a trainer that divides datasets, such as accelerate's"
            )
        shard = Shard(index, num_shards)
        return PackDataset(self.config, shard=shard, workers=self.workers, state=self._given, layout=self.layout)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the number of epochs and their orders are settings of the config."""

    def close(self) -> None:
        """Stop the loader's workers. The position remains; the next batch starts them again."""
        if self._loader is not None:
            self._loader.close()

    def __repr__(self) -> str:
        return f"PackDataset(shard={self.own_shard}, workers={self.workers}, global_batch={self.config.global_batch})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PackDataset holds open files and processes and cannot be pickled; pickle its state_dict()")

    @property
    def _ex_iterable(self) -> NoReturn:
        raise TypeError(
            "a PackDataset cannot be mapped, filtered, shuffled or divided by datasets' methods, since its state would "
            "no longer be exact; change the config instead"
        )

    @property
    def _position(self) -> LoaderPosition:
        _ = self.loader
        assert self._at is not None
        return self._at

    def _go_to(self, state: DataState | None) -> None:
        self.close()
        self._loader, self._at, self._start = None, None, state
        self._ends.clear()

    def _opened(self) -> PackLoader:
        shard = self.own_shard or WHOLE
        loader = PackLoader(self.config, shard=shard, workers=self.workers, state=self._start)
        streams, batch = loader.config.stream_count, loader.config.global_batch
        if not PackAssignment(streams, batch, shard.count).even:
            raise ValueError(
                f"{shard.count} processes cannot share {streams} streams and a global batch of {batch} packs evenly; "
                "choose a number of processes that divides both, or set data.streams and data.global_batch to "
                f"multiples of {shard.count}"
            )
        return loader

    def _packs(self) -> Iterator[Pack]:
        """Yield the packs of the shard; after its last pack, empty packs if there are other
        shards."""
        while True:
            loader = self.loader
            if loader.exhausted and loader.packs % loader.config.global_batch == 0:
                if loader.shard.count == 1:
                    loader.close()
                    return
                self._require_agreement(loader)
                *before, pack = loader.next_step()
                yield from before  # the position moves with the last pack: other shards are inside the step
            else:
                pack = next(loader)
            self._at = loader.position()
            self._keep_end(loader)
            yield pack

    def _keep_end(self, loader: PackLoader) -> None:
        assert self._at is not None
        packs = self._at.header.packs
        if packs % loader.config.global_batch == 0 and (not self._ends or self._ends[-1].packs != packs):
            self._ends.append(StepEnd(packs, self._at, loader.exhausted, loader.row_counts))

    def _require_agreement(self, loader: PackLoader) -> None:
        """Raise RuntimeError if the processes do not agree on the end, and would never stop."""
        self._unasked += 1
        if self._unasked > STEPS_KEPT:
            raise RuntimeError(
                f"shard {loader.shard.index} of {loader.shard.count} has no packs left, and cannot know whether other "
                "shards have; call Shards(dataset).finished() on all processes after each step, and stop when it is "
                "True. For an evaluation, pass list(PackDataset(config)) instead of the dataset"
            )

    def _require_shard(self) -> None:
        """Raise ValueError if each of several processes reads all packs, without having said so."""
        if self.own_shard is None and dist.is_initialized() and dist.get_world_size() > 1:
            size = dist.get_world_size()
            raise ValueError(
                f"each of {size} processes would read the packs of all; pass shard=Shard(rank, {size}) to PackDataset, "
                "or Shard(0, 1) if all processes need all packs. With accelerate, set dispatch_batches=False and "
                "split_batches=False, so that it divides the dataset"
            )
