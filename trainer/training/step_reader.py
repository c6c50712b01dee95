"""The packs of a step on every rank: one rank of a data-parallel coordinate reads, the others get the same bytes."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sftstream import DataConfig, DataState, LoaderPosition, Pack, PackAssignment, PackLoader, Refusal, batch_digest
from trainer.distributed.mesh import Topology


def open_loader(config: DataConfig, topology: Topology, state: DataState | None, vocabulary: int) -> PackLoader | None:
    """The run's packs as this rank reads them, None where another reads for it; ValueError for a vocabulary too small."""
    if not topology.leads:
        return None
    loader = PackLoader(config, shard=topology.shard, state=state)
    words = len(loader.encoder.tokenizer)
    if words > vocabulary:
        raise ValueError(
            f"the tokenizer has {words} tokens, model.vocab_size is {vocabulary}; raise it to {words} or more, or where the "
            "model is that of model.init_from take its own tokenizer"
        )
    return loader


class LocalStep(NamedTuple):
    """A step as one rank's loader gives it."""

    packs: list[Pack]
    numbers: list[int]
    """Trained tokens, tokens, rows, refused rows, and 1 where there is more to read."""
    digests: list[int]
    """Four words a pack."""
    position: LoaderPosition
    """The loader's place behind it."""


class StepReader:
    """Steps of packs from `loader`, which is None on ranks that do not read but are given them by the first of their `group`.

    `ahead`: where there are workers, `read_ahead` has a thread take the next step's packs from them while this one is computed;
    `state` is that of the step that was given all the same.
    """

    def __init__(
        self,
        loader: PackLoader | None,
        assignment: PackAssignment,
        capacity: int,
        group: dist.ProcessGroup | None = None,
        *,
        ahead: bool = False,
    ) -> None:
        self.loader = loader
        self.assignment = assignment
        self.step: LocalStep | None = None
        """What `packs` gave last; None on ranks that do not read."""
        self._group = group
        self._capacity = capacity
        self._thread = ThreadPoolExecutor(1, "feed") if ahead and loader and loader.workers else None
        self._next: Future[LocalStep] | None = None

    def packs(self, step: int) -> list[Pack]:
        """This data-parallel coordinate's packs of a step, counted from 0; the loader must stand there."""
        if self.loader:
            self.step = self._next.result() if self._next else _read(self.loader)
            self._next = None
        if self._group is None:
            assert self.step is not None
            return self.step.packs
        # All packs at once: for each by itself the ranks would have to meet again.
        shape = self.assignment.micro_batches(step), 3 * self._capacity + 2
        sent = _encode(self.step.packs, shape) if self.step else torch.empty(shape, dtype=torch.int32)
        dist.broadcast(sent, group=self._group, group_src=0)
        return self.step.packs if self.step else [_decode(row, self._capacity) for row in sent]

    def read_ahead(self) -> None:
        """Begin to read the next step: once all ranks have this one, since the thread takes the interpreter from its rank."""
        assert self._next is None, "a step that was read ahead is given before the next is read"
        if self._thread and self.loader and not self.loader.exhausted:
            self._next = self._thread.submit(_read, self.loader)

    @property
    def position(self) -> LoaderPosition | None:
        """Position after the last step given by `packs`; None on ranks that do not read."""
        return self.step.position if self.step else None

    def close(self) -> None:
        """Stop reading."""
        if self._thread:
            self._thread.shutdown()
        if self.loader:
            self.loader.close()


def _read(loader: PackLoader) -> LocalStep:
    packs = loader.next_step()
    refused = sum(len(pack.refused) for pack in packs)
    numbers = [
        sum(pack.trained_tokens for pack in packs),
        sum(pack.tokens for pack in packs),
        sum(pack.conversations for pack in packs) + refused,
        refused,
        int(not loader.exhausted),
    ]
    return LocalStep(packs, numbers, [word for pack in packs for word in _words(pack.digest())], loader.position())


def _encode(packs: list[Pack], shape: tuple[int, int]) -> Tensor:
    """A row a pack, `[number of borders, ids, trained, borders, unused]`: of one size for every pack."""
    sent = np.zeros(shape, np.int32)
    for row, pack in zip(sent, packs, strict=True):
        parts = np.concatenate([[len(pack.borders)], pack.ids, pack.trained, pack.borders])
        row[: len(parts)] = parts
    return torch.from_numpy(sent)


def _decode(row: Tensor, capacity: int) -> Pack:
    used = row[1 : 1 + 2 * capacity + int(row[0])].numpy()
    ids, trained, borders = np.split(used, [capacity, 2 * capacity])
    return Pack(ids.copy(), trained.astype(bool), borders.copy())


class StepTotals(NamedTuple):
    """A step's packs counted over all ranks, the same on each."""

    trained_tokens: int
    tokens: int
    rows: int
    """Conversations given and refused."""
    refused: int
    unexhausted_shards: int
    """Shards with something left to read."""
    stop: int
    """Ranks that were asked to stop."""
    digest: str
    """Hash of the packs of all shards in the order of the run."""


def reduce_totals(
    step: int, packs: list[Pack], step_reader: StepReader, topology: Topology, *, stop: bool
) -> StepTotals:
    """One small collective between CPUs, so that every decision about a step is the same on every rank."""
    numbers, digests = (
        (step_reader.step.numbers, step_reader.step.digests) if step_reader.step else ([0] * 5, [0] * 4 * len(packs))
    )
    row = torch.tensor([*numbers, int(stop), *digests])
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    table = torch.stack(rows).reshape(topology.dp, topology.tp, -1)
    totals = table[..., : len(numbers) + 1].sum((0, 1)).tolist()
    words = table[:, 0, len(numbers) + 1 :].reshape(topology.dp, len(packs), 4)
    taken = Counter[int]()
    in_order = []
    for shard in step_reader.assignment.step(step):
        in_order.append(words[shard, taken[shard]])
        taken[shard] += 1
    trained_tokens, tokens, conversations, refused, unexhausted_shards, stopping = totals
    digest = batch_digest(map(_hex, in_order))
    return StepTotals(trained_tokens, tokens, conversations, refused, unexhausted_shards, stopping, digest)


def _words(digest: str) -> list[int]:
    """A SHA-256 as four signed 64-bit integers."""
    return [int.from_bytes(bytes.fromhex(digest)[i : i + 8], "big", signed=True) for i in range(0, 32, 8)]


def _hex(words: Tensor) -> str:
    return b"".join(word.to_bytes(8, "big", signed=True) for word in words.tolist()).hex()


class LocatedRefusal(NamedTuple):
    """A refusal and where an editor finds its row."""

    refusal: Refusal
    location: str


def gather_refusals(packs: list[Pack], step_reader: StepReader, topology: Topology) -> list[LocatedRefusal]:
    """The rows that any rank refused for this step, in the order of shards, on the first rank (elsewhere nothing)."""
    loader = step_reader.loader
    mine = [LocatedRefusal(r, loader.locate_row(r)) for pack in packs for r in pack.refused] if loader else []
    everyone: list[list[LocatedRefusal]] | None = [[]] * dist.get_world_size() if topology.first else None
    dist.gather_object(mine, everyone)
    return [refusal for refusals in everyone or () for refusal in refusals]
