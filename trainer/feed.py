"""The packs of a step on every rank: one rank of a data-parallel coordinate reads, the others get the same bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sftstream import DataConfig, DataState, Deal, Pack, PackLoader, Refusal, batch_digest
from trainer.mesh import Topology


def open_loader(config: DataConfig, topology: Topology, state: DataState | None, vocabulary: int) -> PackLoader | None:
    """The run's packs as this rank reads them, None where another reads for it; ValueError for a vocabulary too small."""
    if not topology.leads:
        return None
    loader = PackLoader(config, shard=topology.shard, state=state)
    words = len(loader.encoder.tokenizer.hf)
    if words > vocabulary:
        raise ValueError(
            f"the tokenizer has {words} tokens, model.vocab_size is {vocabulary}; raise it to {words} or more, or where the "
            "model is that of model.init_from take its own tokenizer"
        )
    return loader


class Feed:
    """Steps of packs from `loader`, which is None on ranks that do not read."""

    def __init__(self, loader: PackLoader | None, topology: Topology, deal: Deal, capacity: int) -> None:
        self.loader = loader
        self.deal = deal
        self._group = topology.mesh["tp"].get_group() if topology.tp > 1 else None
        self._capacity = capacity

    def packs(self, step: int) -> list[Pack]:
        """This data-parallel coordinate's packs of a step, counted from 0; the loader must stand there."""
        if self._group is None:
            assert self.loader is not None
            return self.loader.next_step()
        packs = self.loader.next_step() if self.loader else [None] * self.deal.micro_batches(step)
        return [self._share(pack) for pack in packs]

    def _share(self, pack: Pack | None) -> Pack:
        size = 4 * self._capacity + 3
        sent = torch.empty(size, dtype=torch.int32) if pack is None else _encode(pack, size)
        dist.broadcast(sent, group=self._group, group_src=0)
        return _decode(sent, self._capacity) if pack is None else pack


def _encode(pack: Pack, size: int) -> Tensor:
    """`[borders, max_seqlen, input_ids, labels, position_ids, cu_seqlens, unused]`: the same size for every pack."""
    head = torch.tensor([pack.cu_seqlens.numel(), pack.max_seqlen])
    sent = torch.zeros(size, dtype=torch.int32)
    parts = torch.cat([head, pack.input_ids, pack.labels, pack.position_ids, pack.cu_seqlens]).int()
    sent[: parts.numel()] = parts
    return sent


def _decode(sent: Tensor, capacity: int) -> Pack:
    borders, max_seqlen = sent[:2].tolist()
    input_ids, labels, position_ids, cu_seqlens = sent[2 : 2 + 3 * capacity + borders].split([capacity] * 3 + [borders])
    return Pack(input_ids.long(), labels.long(), position_ids.long(), cu_seqlens.clone(), max_seqlen, segments=())


class Tally(NamedTuple):
    """A step's packs counted over all ranks, the same on each."""

    trained_tokens: int
    tokens: int
    rows: int
    """Conversations given and refused."""
    refused: int
    live: int
    """Shards with something left to read."""
    stop: int
    """Ranks that were asked to stop."""
    digest: str
    """Hash of the packs of all shards in the order of the run."""


@dataclass(frozen=True)
class Count:
    """What one rank brings to the tally; ranks that do not read bring nothing but their wish to stop."""

    numbers: list[int]
    digests: list[int]


def tally(step: int, packs: list[Pack], feed: Feed, topology: Topology, *, stop: bool) -> Tally:
    """One small collective between CPUs, so that every decision about a step is the same on every rank."""
    mine = _count(packs, feed.loader, stop)
    row = torch.tensor(mine.numbers + mine.digests)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    table = torch.stack(rows).reshape(topology.dp, topology.tp, -1)
    numbers = table[..., : len(mine.numbers)].sum((0, 1)).tolist()
    digests = table[:, 0, len(mine.numbers) :].reshape(topology.dp, len(packs), 4)
    taken = Counter[int]()
    in_order = []
    for shard in feed.deal.step(step):
        in_order.append(digests[shard, taken[shard]])
        taken[shard] += 1
    trained_tokens, tokens, conversations, refused, live, stopping = numbers
    digest = batch_digest(_hex(words) for words in in_order)
    return Tally(trained_tokens, tokens, conversations, refused, live, stopping, digest)


def _count(packs: list[Pack], loader: PackLoader | None, stop: bool) -> Count:
    if loader is None:
        return Count([0, 0, 0, 0, 0, int(stop)], [0] * 4 * len(packs))
    refused = sum(len(pack.refused) for pack in packs)
    numbers = [
        sum(pack.trained_tokens for pack in packs),
        sum(pack.tokens for pack in packs),
        sum(pack.conversations for pack in packs) + refused,
        refused,
        int(not loader.exhausted),
        int(stop),
    ]
    return Count(numbers, [word for pack in packs for word in _words(pack.digest())])


def _words(digest: str) -> list[int]:
    """A SHA-256 as four signed 64-bit integers."""
    return [int.from_bytes(bytes.fromhex(digest)[i : i + 8], "big", signed=True) for i in range(0, 32, 8)]


def _hex(words: Tensor) -> str:
    return b"".join(word.to_bytes(8, "big", signed=True) for word in words.tolist()).hex()


class PlacedRefusal(NamedTuple):
    """A refusal and where an editor finds its row."""

    refusal: Refusal
    place: str


def gather_refusals(packs: list[Pack], feed: Feed, topology: Topology) -> list[PlacedRefusal]:
    """The rows that any rank refused for this step, in the order of shards, on the first rank (elsewhere nothing)."""
    loader = feed.loader
    mine = [PlacedRefusal(r, loader.place(r)) for pack in packs for r in pack.refused] if loader else []
    everyone: list[list[PlacedRefusal]] | None = [[]] * dist.get_world_size() if topology.first else None
    dist.gather_object(mine, everyone)
    return [refusal for refusals in everyone or () for refusal in refusals]
