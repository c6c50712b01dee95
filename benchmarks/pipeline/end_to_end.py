"""Run all systems in turns on equal rows, each in separate processes; first check every system's
ids."""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from apart import Measured, check, measure
from child import Failed
from corpus import Job, Truth
from peers import PEERS
from systems import OURS, RAW, TOKENIZERS, System

COLUMNS = (
    "",
    "million tokens/s",
    "x `encode_batch`",
    "first pack, s",
    "all rows once, s",
    "memory, MB (imports)",
    "masks unlike ours",
    "resumes",
)


class Once(NamedTuple):
    """Result of reading all rows once."""

    seconds: float | None = None
    other_masks: int | None = None


def compared(job: Job, truth: Truth, rounds: int, *, with_peers: bool) -> Iterator[Sequence[str]]:
    """Yield the rows of the table. Raises AssertionError if a system's ids differ from ours."""
    systems = [*TOKENIZERS, *OURS, *(PEERS if with_peers else ())]
    once = {system.name: read_once(system, job, truth) for system in systems if system.present}
    measurements: dict[str, list[Measured]] = {name: [] for name, found in once.items() if found}
    for _ in range(rounds):
        for system in systems:
            if system.name in measurements:
                measurements[system.name].append(measure(system, job))
    raw = median(measurements[RAW.name], -1)
    for system in systems:
        if not system.present:
            yield system.name, "absent", *[""] * (len(COLUMNS) - 2)
        elif found := once[system.name]:
            yield from cells(system, measurements[system.name], found, raw)
        else:
            yield system.name, "failed", *[""] * (len(COLUMNS) - 2)


def read_once(system: System, job: Job, truth: Truth) -> Once | None:
    """Read all rows by the system; None if a peer fails, so that the comparison continues without
    the peer."""
    if not system.sequences:
        return Once()
    try:
        found = check(system, job)
    except Failed as failed:
        if system in OURS:
            raise
        print(f"{system.name} failed: {failed}", file=sys.stderr)
        return None
    given = Counter(found.digests)
    missing = Counter(ids for ids, _ in truth.digests.elements()) - Counter(ids for ids, _ in given.elements())
    assert given.total() == truth.digests.total(), f"{system.name} gave {given.total()} of {truth.digests.total()} rows"
    assert not set(missing) - truth.typed, f"{system.name} gave other ids for {missing.total()} conversations"
    other = (truth.digests - given).total()
    assert system not in OURS or not other, f"{system.name} has other masks for {other} conversations"
    return Once(found.seconds, other)


def cells(system: System, measurements: list[Measured], once: Once, raw: float) -> Iterator[Sequence[str]]:
    """Yield one row, or two (first and second pass) for an endless system in one process."""
    passes: tuple[tuple[str, int], ...] = (("", -1),)
    if system.endless and not system.workers:
        passes = ((", new rows", 0), (", second pass", -1))
    first = statistics.median(one.first for one in measurements)
    peak, imported = (
        statistics.median(values) / 1e6 for values in zip(*[(m.peak, m.imported) for m in measurements], strict=True)
    )
    for name, number in passes:
        rate = median(measurements, number)
        yield (
            f"{system.name}{name}",
            f"{rate / 1e6:.2f}",
            f"{rate / raw:.2f}",
            f"{first:.2f}" if system.sequences else "",
            "" if once.seconds is None else f"{once.seconds:.1f}",
            f"{peak:.0f} ({imported:.0f})",
            "" if once.other_masks is None else str(once.other_masks),
            system.resumes,
        )


def median(measurements: list[Measured], number: int) -> float:
    """Return the median tokens per second of a pass."""
    return statistics.median(one.rates[number] for one in measurements)
