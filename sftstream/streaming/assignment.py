"""The assignment of packs to shards and workers: arithmetic alone, without effect on any pack."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """One data-parallel coordinate: number `index` of `count`."""

    index: int
    count: int


WHOLE = Shard(0, 1)


@dataclass(frozen=True)
class PackAssignment:
    """The division of a run's packs over `shards`, each with `workers` processes.

    Pack `g` comes from stream `g % streams`. Worker `s // shards % workers` of shard
    `s % shards` reads stream `s`: always a single worker, also if the numbers do not divide evenly.

    With 4 streams, a global batch of 4, 2 shards and 1 worker, step 0 consists of the packs
    0, 1, 2, 3 of the streams 0, 1, 2, 3; shard 0 reads packs 0 and 2, shard 1 packs 1 and 3.

    Raises ValueError for fewer streams than shards.
    """

    streams: int
    global_batch: int
    shards: int
    workers: int = 1
    resumed: bool = False
    """The number of streams is a state's, and a new number divides the rows to come anew."""

    def __post_init__(self) -> None:
        if self.shards > self.streams:
            remedy = (
                f'set data.streams = {self.shards} and data.accept_changed = ["data.streams"] to rebase the state'
                if self.resumed
                else f"raise data.streams to {self.shards} or more"
            )
            raise ValueError(
                f"streams = {self.streams} cannot be shared by {self.shards} shards, of which each needs one; {remedy}"
            )

    def shard(self, pack: int) -> int:
        """Return the shard of a pack."""
        return pack % self.streams % self.shards

    def streams_of(self, shard: int) -> range:
        """Return the streams read by a shard."""
        return range(shard, self.streams, self.shards)

    def worker(self, stream: int) -> int:
        """Return the number of a stream's worker within the shard."""
        return stream // self.shards % self.workers

    def step(self, number: int) -> list[int]:
        """Return the shard of each pack of a step, in the order of the run."""
        first = number * self.global_batch
        return [self.shard(pack) for pack in range(first, first + self.global_batch)]

    def micro_batches(self, number: int) -> int:
        """Return the number of packs run by every shard in a step, empty packs of an uneven step
        included."""
        return max(Counter(self.step(number)).values())

    @property
    def most_micro_batches(self) -> int:
        """The micro-batches of the fullest step."""
        steps_until_repeated = self.streams // math.gcd(self.streams, self.global_batch)
        return max(self.micro_batches(number) for number in range(steps_until_repeated))

    def next_pack(self, shard: int, at: int) -> int:
        """Return the number of a shard's first pack from pack `at` on."""
        return next(pack for pack in range(at, at + self.streams) if self.shard(pack) == shard)

    @property
    def even(self) -> bool:
        """True if all shards get the same number of packs in every step."""
        return self.streams % self.shards == 0 and self.global_batch % self.shards == 0
