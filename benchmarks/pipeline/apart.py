"""Measure one system in a separate process, without caches or memory of another system."""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import msgspec
from child import ask, high_water, workers_private
from corpus import Job, digest
from peers import PEERS
from systems import OURS, TOKENIZERS, System

SYSTEMS = {system.name: system for system in (*TOKENIZERS, *OURS, *PEERS)}
X = TypeVar("X")


class Request(msgspec.Struct, frozen=True):
    """A measurement for a process to make."""

    system: str
    job: Job
    check: bool
    """Read all rows once and return digests instead of rates."""


class Measured(msgspec.Struct, frozen=True):
    """Figures of one process."""

    first: float
    """Seconds to the first pack, from everything imported and nothing opened."""
    rates: list[float]
    """Tokens per second of each pass: of CPU time without workers, of wall time with workers."""
    peak: int
    """Peak bytes of the process, plus the private memory of its workers."""
    imported: int
    """Peak bytes before anything was opened."""


class Checked(msgspec.Struct, frozen=True):
    """Digests of all rows as packed by one system."""

    seconds: float
    """Wall time from nothing opened to the last pack."""
    digests: list[tuple[bytes, bytes]]


def measure(system: System, job: Job) -> Measured:
    """Measure the system in a new process."""
    return _ask(system, job, Measured)


def check(system: System, job: Job) -> Checked:
    """Read all rows by the system in a new process."""
    return _ask(system, job, Checked)


def _ask(system: System, job: Job, answer: type[X]) -> X:
    """Ask a new process, with an empty cache directory that is deleted afterwards."""
    request = Request(system.name, job, check=answer is Checked)
    with tempfile.TemporaryDirectory(prefix="cache-", dir=job.directory) as cache:
        return ask("apart", request, answer, cache, cpus=None if system.workers else 1, here=job.here)


def respond(encoded: bytes) -> Checked | Measured:
    """Answer an encoded `Request` in the new process."""
    request = msgspec.json.decode(encoded, type=Request)
    system = SYSTEMS[request.system]
    for module in system.imports:
        importlib.import_module(module)
    job = msgspec.structs.replace(request.job, workers=system.workers, backend=system.backend, once=request.check)
    return check_here(system, job) if request.check else measure_here(system, job)


@dataclass
class PackReader:
    """The packs of one system, with its workers' memory sampled now and then."""

    system: System
    packs: Iterator[Any]
    taken: int = 0
    private: int = 0
    """Largest private memory of the workers seen so far, bytes."""

    def tokens(self, at_least: int | None = None, until: float = 0.0) -> int:
        """Take packs until `at_least` tokens and the time `until` (perf_counter) are reached, or
        all; return the tokens."""
        tokens = 0
        for pack in self.packs:
            tokens += self.system.tokens(pack)
            self.taken += 1
            if self.taken.bit_count() == 1:  # after 1, 2, 4, 8, ... packs: reading smaps costs time
                self.private = max(self.private, workers_private())
            if at_least is not None and tokens >= at_least and time.perf_counter() >= until:
                break
        return tokens


def measure_here(system: System, job: Job) -> Measured:
    """Measure the system in this process."""
    imported = high_water()
    clock = time.perf_counter if system.workers else time.process_time
    began = time.perf_counter()
    start = system.open(job)
    opened = clock()
    packs = start()
    first = next(packs)
    seconds = time.perf_counter() - began
    after_first = clock()
    reading = PackReader(system, chain([first], packs))
    if system.counted == "until the first pack":
        rates = [reading.tokens() / (after_first - opened)]
    elif system.counted == "all":
        rates = [_rate(reading.tokens, clock, opened)]
    else:
        reading.tokens(1)
        system.settle(packs, job)
        rates = _passes(reading, job, clock)
    return Measured(seconds, rates, high_water() + reading.private, imported)


def _passes(reading: PackReader, job: Job, clock: Callable[[], float]) -> list[float]:
    """Return the rate of one pass, or of two if the system is endless."""
    if not reading.system.endless:
        return [_rate(reading.tokens, clock, clock())]
    first = _rate(lambda: reading.tokens(job.tokens), clock, clock())
    until = time.perf_counter() + job.patience / 3
    return [first, _rate(lambda: reading.tokens(job.tokens, until), clock, clock())]


def _rate(run: Callable[[], int], clock: Callable[[], float], began: float) -> float:
    tokens = run()
    return tokens / (clock() - began)


def check_here(system: System, job: Job) -> Checked:
    """Read all rows in this process and return their digests."""
    assert system.sequences
    began = time.perf_counter()
    packs = list(system.open(job)())
    seconds = time.perf_counter() - began
    return Checked(seconds, [digest(ids, mask) for pack in packs for ids, mask in system.sequences(pack)])
