"""Assign packs to shards and workers by arithmetic. The assignment does not change any pack."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """A data-parallel part of the run: number `index`, counted from 0, of `count` shards."""

    index: int
    count: int


WHOLE = Shard(0, 1)


@dataclass(frozen=True)
class PackAssignment:
    """The division of a run's packs among `shards`, each with `workers` processes.

    Pack `g` comes from stream `g % streams`. Shard `s % shards` reads stream `s`, in its worker
    `s // shards % workers`. So a single worker reads all packs of a stream, even if the numbers do
    not divide evenly.

    Example: 4 streams, a global batch of 4, 2 shards and 1 worker. Step 0 has the packs 0, 1, 2, 3
    from the streams 0, 1, 2, 3. Shard 0 reads the packs 0 and 2, shard 1 reads the packs 1 and 3.

    Raises ValueError if there are fewer streams than shards.
    """

    streams: int
    global_batch: int
    shards: int
    workers: int = 1
    resumed: bool = False
    """True if `streams` comes from a saved state: another number of streams then needs a rebase.
    The flag changes only the remedy in the error message."""

    def __post_init__(self) -> None:
        if self.shards > self.streams:
            remedy = (
                f'set data.streams = {self.shards} and data.accept_changed = ["data.streams"] to rebase the state'
                if self.resumed
                else f"raise data.streams to {self.shards} or more"
            )
            raise ValueError(
                f"streams = {self.streams} is too low for {self.shards} shards, which need a stream each; {remedy}"
            )

    def shard(self, pack: int) -> int:
        """Return the shard that reads a pack."""
        return pack % self.streams % self.shards

    def streams_of(self, shard: int) -> range:
        """Return the streams that a shard reads."""
        return range(shard, self.streams, self.shards)

    def worker(self, stream: int) -> int:
        """Return the number, inside the shard, of the worker that reads a stream."""
        return stream // self.shards % self.workers

    def shards_of_step(self, number: int) -> list[int]:
        """Return the shard of each pack in step `number`: `[0, 1, 0, 1]` for 4 packs on 2
        shards."""
        first = number * self.global_batch
        return [self.shard(pack) for pack in range(first, first + self.global_batch)]

    def micro_batches(self, number: int) -> int:
        """Return the number of packs that each shard runs in step `number`, empty packs included.

        All shards run as many packs as the shard with the most packs in the step.
        """
        return max(Counter(self.shards_of_step(number)).values())

    @property
    def most_micro_batches(self) -> int:
        """The largest number of micro-batches in any step."""
        steps_until_repeated = self.streams // math.gcd(self.streams, self.global_batch)
        return max(self.micro_batches(number) for number in range(steps_until_repeated))

    def next_pack(self, shard: int, at: int) -> int:
        """Return the number of the first pack at or after `at` that `shard` reads."""
        return next(pack for pack in range(at, at + self.streams) if self.shard(pack) == shard)

    @property
    def even(self) -> bool:
        """True if all shards get the same number of packs in every step."""
        return self.streams % self.shards == 0 and self.global_batch % self.shards == 0
