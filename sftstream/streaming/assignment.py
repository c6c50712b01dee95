"""Who reads which of a run's packs. Arithmetic alone: neither shards nor workers enter what a pack holds."""

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
    """How the packs of a run are dealt to `shards`, each with `workers` processes.

    Pack `g` comes from stream `g % streams`; stream `s` is read by shard `s % shards`, there by worker
    `s // shards % workers`. So a stream is read in one place, also where the numbers do not divide each other.

    Raises ValueError where there are fewer streams than shards.
    """

    streams: int
    global_batch: int
    shards: int
    workers: int = 1

    def __post_init__(self) -> None:
        if self.shards > self.streams:
            raise ValueError(
                f"streams = {self.streams} cannot be shared by {self.shards} shards, of which each needs one; raise data.streams"
            )

    def shard(self, pack: int) -> int:
        """The shard that takes a pack."""
        return pack % self.streams % self.shards

    def streams_of(self, shard: int) -> range:
        """The streams that a shard reads."""
        return range(shard, self.streams, self.shards)

    def worker(self, stream: int) -> int:
        """The worker, of its shard, that reads a stream."""
        return stream // self.shards % self.workers

    def step(self, number: int) -> list[int]:
        """The shard of each pack of a step, in the order of the run."""
        first = number * self.global_batch
        return [self.shard(pack) for pack in range(first, first + self.global_batch)]

    def micro_batches(self, number: int) -> int:
        """Packs that every shard runs in a step; some of them empty where the step cannot be shared evenly."""
        return max(Counter(self.step(number)).values())

    @property
    def most_micro_batches(self) -> int:
        """Those of the fullest step."""
        steps_until_repeated = self.streams // math.gcd(self.streams, self.global_batch)
        return max(self.micro_batches(number) for number in range(steps_until_repeated))

    def next_pack(self, shard: int, at: int) -> int:
        """A shard's first pack from number `at` on."""
        return next(pack for pack in range(at, at + self.streams) if self.shard(pack) == shard)

    @property
    def even(self) -> bool:
        """Every shard has taken as many packs as any other whenever each has taken equally many turns."""
        return self.streams % self.shards == 0 and self.global_batch % self.shards == 0
