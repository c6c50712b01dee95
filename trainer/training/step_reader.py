"""Give every rank its packs of a step, and add up the step's counts over all ranks.

One rank of each data-parallel coordinate reads packs and broadcasts them to the tensor-parallel
ranks of the coordinate. Example: 4 ranks with tp = 2, 64 streams and 8 packs in a global batch:
rank 0 reads packs 0, 2, 4, 6 for ranks 0 and 1; rank 2 reads packs 1, 3, 5, 7 for ranks 2 and 3.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sftstream import (
    NO_SEGMENTS,
    DataConfig,
    DataState,
    LoaderPosition,
    Pack,
    PackAssignment,
    PackLoader,
    Refusal,
    RowCounts,
    Segments,
    batch_digest,
    segments_of,
)
from sftstream import in_order as ordered_by_pack
from trainer.distributed.mesh import Topology
from trainer.llama.flops import squared_lengths
from trainer.training.segment_gather import SegmentGather


def open_loader(config: DataConfig, topology: Topology, state: DataState | None, vocabulary: int) -> PackLoader | None:
    """Open the loader of this rank's shard at `state`, or return None on ranks without a loader.

    Collective: without a date in `config` or `state`, all ranks take the first rank's day in UTC.
    `vocabulary` is the model's number of tokens. Raises ValueError if the tokenizer has more, or if
    `state` does not belong to the data of `config`.
    """
    config = _with_date(config, state)
    if not topology.leads:
        return None
    loader = PackLoader(config, shard=topology.shard, state=state)
    tokens = len(loader.encoder.tokenizer)
    if tokens > vocabulary:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, but model.vocab_size is {vocabulary}; set model.vocab_size = {tokens} or more, "
            "or with model.init_from use the tokenizer of that model, or set model.resize_vocabulary = true"
        )
    return loader


def assign_packs(loader: PackLoader | None, data: DataConfig, topology: Topology) -> PackAssignment:
    """Return the assignment of the packs of `data` to shards. Collective.

    All ranks take the number of streams from the first rank's loader.
    """
    streams = [loader.config.stream_count if loader else 0]
    dist.broadcast_object_list(streams, src=0)
    return PackAssignment(streams[0], data.global_batch, topology.dp)


def _with_date(config: DataConfig, state: DataState | None) -> DataConfig:
    """Return `config` with a date for the template, equal on all ranks. Collective."""
    days = [datetime.now(UTC).date().isoformat()]
    if dist.is_initialized():
        dist.broadcast_object_list(days, src=0)
    if config.tokenizer.date or (state and state.identity.date):
        return config
    return msgspec.structs.replace(config, tokenizer=msgspec.structs.replace(config.tokenizer, date=days[0]))


NUMBERS = 8
"""Length of `LocalStep.numbers`, in the order of the first fields of `StepTotals`."""


class LocalStep(NamedTuple):
    """One rank's packs of a step, with counts and the position after the step."""

    packs: list[Pack]
    numbers: list[int]
    """Trained tokens, tokens, squared lengths, rows, refused rows, packs with conversations,
    skipped tokens, and 1 if the shard is not exhausted, else 0."""
    counts: list[int]
    """Rows accepted, too long and refused otherwise since the run's start, for one source after the
    other, of the shard's streams."""
    digests: list[int]
    """SHA-256 of each pack as four signed 64-bit integers, one pack after the other."""
    position: LoaderPosition
    """Position of the loader after the step."""
    segments: Segments
    """Segments of the packs, numbered by the place of their pack in the step."""


class StepReader:
    """Packs step by step, read by `loader` or received from the first rank of `group`.

    `loader` is None on ranks without a loader; `group` is None if every rank reads; `sources` is
    the number of sources. `ahead` allows `read_ahead` to take the next step's packs from the
    loader's workers in a thread; `position` stays at the step that `packs` returned.
    """

    def __init__(
        self,
        loader: PackLoader | None,
        assignment: PackAssignment,
        capacity: int,
        group: dist.ProcessGroup | None = None,
        *,
        sources: int = 1,
        ahead: bool = False,
    ) -> None:
        self.loader = loader
        self.sources = sources
        self.assignment = assignment
        self.step: LocalStep | None = None
        """The last step returned by `packs`; None on ranks without a loader."""
        self.gather = SegmentGather()
        self._group = group
        self._capacity = capacity
        self._thread = ThreadPoolExecutor(1, "step_reader") if ahead and loader and loader.workers else None
        self._next: Future[LocalStep] | None = None

    def packs(self, step: int) -> list[Pack]:
        """Return this coordinate's packs of `step`, the loader's next step, counted from 0.

        Collective in `group`. Raises ValueError if the packs cannot be read.
        """
        if self.loader:
            self.step = self._next.result() if self._next else _read(self.loader, self.assignment)
            self._next = None
        if self._group is None:
            assert self.step is not None
            return self.step.packs
        # One broadcast for all packs: each broadcast costs a wait for the slowest rank.
        shape = self.assignment.micro_batches(step), 3 * self._capacity + 2
        rows = _encode(self.step.packs, shape) if self.step else torch.empty(shape, dtype=torch.int32)
        dist.broadcast(rows, group=self._group, group_src=0)
        return self.step.packs if self.step else [_decode(row, self._capacity) for row in rows]

    def read_ahead(self) -> None:
        """Begin to read the next step in a thread, if the loader has workers.

        Call after all ranks have the present step: the thread slows this rank's broadcast, since
        both need the interpreter's lock.
        """
        assert self._next is None, "call packs() for the step that was read ahead before the next read_ahead()"
        if self._thread and self.loader and not self.loader.exhausted:
            self._next = self._thread.submit(_read, self.loader, self.assignment)

    @property
    def position(self) -> LoaderPosition | None:
        """Position after the last step given by `packs`; None on ranks without a loader."""
        return self.step.position if self.step else None

    def close(self) -> None:
        """Stop the thread and the loader's workers."""
        if self._thread:
            self._thread.shutdown()
        if self.loader:
            self.loader.close()


def _read(loader: PackLoader, assignment: PackAssignment) -> LocalStep:
    shards = assignment.shards_of_step(loader.packs // assignment.global_batch)
    places = [place for place, shard in enumerate(shards) if shard == loader.shard.index]
    packs = loader.next_step()
    numbers = [
        sum(pack.trained_tokens for pack in packs),
        sum(pack.tokens for pack in packs),
        sum(squared_lengths(pack) for pack in packs),
        sum(pack.rows for pack in packs),
        sum(len(pack.refused) for pack in packs),
        sum(bool(pack.segments or pack.skipped) for pack in packs),
        sum(segment.length for pack in packs for segment in pack.skipped),
        int(not loader.exhausted),
    ]
    counts = [number for source in loader.row_counts for number in source]
    digests = [word for pack in packs for word in _words(pack.digest())]
    return LocalStep(packs, numbers, counts, digests, loader.position(), segments_of(packs, places))


def _encode(packs: list[Pack], shape: tuple[int, int]) -> Tensor:
    """Return an int32 tensor of `shape` `(packs, 3 * capacity + 2)`, one row per pack.

    A row is `[number of borders, ids, trained, borders, zeros]`. Example for capacity 3, ids [7, 8,
    0], trained [0, 1, 0] and borders [0, 2, 3]: `[3, 7, 8, 0, 0, 1, 0, 0, 2, 3, 0]`.
    """
    rows = np.zeros(shape, np.int32)
    for row, pack in zip(rows, packs, strict=True):
        parts = np.concatenate([[len(pack.borders)], pack.ids, pack.trained, pack.borders])
        row[: len(parts)] = parts
    return torch.from_numpy(rows)


def _decode(row: Tensor, capacity: int) -> Pack:
    used = row[1 : 1 + 2 * capacity + int(row[0])].numpy()
    ids, trained, borders = np.split(used, [capacity, 2 * capacity])
    return Pack(ids.copy(), trained.astype(bool), borders.copy())


class StepTotals(NamedTuple):
    """Counts of a global batch over all ranks, equal on every rank."""

    trained_tokens: int
    """Tokens in the loss."""
    tokens: int
    """Tokens of conversations, padding excluded."""
    squares: int
    """Sum of the conversations' squared lengths, which the cost of attention follows."""
    rows: int
    """Conversations in the packs, refused rows and skipped rows."""
    refused: int
    """Rows refused on the way to the packs."""
    filled_packs: int
    """Packs with conversations, trained or skipped."""
    skipped_tokens: int
    """Tokens of the conversations that `run.skip` left out of the packs."""
    unexhausted_shards: int
    """Shards with rows left to read; 0 after the last step of the data."""
    stop: int
    """Number of ranks with a request to stop."""
    digest: str
    """Hash of the packs of all shards, in the order of the run."""
    row_counts: tuple[RowCounts, ...]
    """Rows read from each source since the start of the run."""
    segments: Segments
    """Segments of the packs of all shards, in the order of the run; empty on all ranks but the
    first."""


def reduce_totals(
    step: int, packs: list[Pack], step_reader: StepReader, topology: Topology, *, stop: bool
) -> StepTotals:
    """Add up the counts of `packs` over all ranks, between CPUs. Collective.

    All ranks then decide alike about the step. `stop` is True if this rank was asked to stop.
    """
    mine = step_reader.step
    numbers, counts = (mine.numbers, mine.counts) if mine else ([0] * NUMBERS, [0] * 3 * step_reader.sources)
    shards = step_reader.assignment.shards_of_step(step)
    segments = mine.segments if mine else NO_SEGMENTS
    sums = [*numbers, int(stop), *counts]
    fixed = torch.tensor([*sums, *(mine.digests if mine else [0] * 4 * len(packs))])
    row = torch.cat([fixed, step_reader.gather.row(segments)])
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    gathered = torch.stack(rows)
    segments = step_reader.gather.gathered(gathered[:, len(fixed) :], segments, first=topology.first)
    table = gathered[:, : len(fixed)].reshape(topology.dp, topology.tp, -1)
    totals = table[..., : len(sums)].sum((0, 1)).tolist()
    words = table[:, 0, len(sums) :].reshape(topology.dp, len(packs), 4)
    taken = Counter[int]()  # packs of each shard that stand in in_order
    in_order = []
    for shard in shards:
        in_order.append(words[shard, taken[shard]])
        taken[shard] += 1
    row_counts = tuple(RowCounts(*totals[i : i + 3]) for i in range(NUMBERS + 1, len(totals), 3))
    fields = dict(zip(StepTotals._fields, totals[: NUMBERS + 1], strict=False))
    digest = batch_digest(map(_hex, in_order))
    if topology.dp > 1:  # the segments of a shard are in order
        segments = ordered_by_pack(segments)
    return StepTotals(**fields, digest=digest, row_counts=row_counts, segments=segments)


def _words(digest: str) -> list[int]:
    """Return a SHA-256 in hex as four signed 64-bit integers, the inverse of `_hex`."""
    return [int.from_bytes(bytes.fromhex(digest)[i : i + 8], "big", signed=True) for i in range(0, 32, 8)]


def _hex(words: Tensor) -> str:
    return b"".join(word.to_bytes(8, "big", signed=True) for word in words.tolist()).hex()


class LocatedRefusal(NamedTuple):
    """A refused row and its location."""

    refusal: Refusal
    location: str
    """File and line for an editor, such as `rows.jsonl:61`."""


def gather_refusals(packs: list[Pack], step_reader: StepReader, topology: Topology) -> list[LocatedRefusal]:
    """Return the rows that all ranks refused for a step on rank 0, and [] elsewhere. Collective."""
    loader = step_reader.loader
    local = [LocatedRefusal(r, loader.locate_row(r)) for pack in packs for r in pack.refused] if loader else []
    everyone: list[list[LocatedRefusal]] | None = [[]] * dist.get_world_size() if topology.first else None
    dist.gather_object(local, everyone)
    return [refusal for refusals in everyone or () for refusal in refusals]
