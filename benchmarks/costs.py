"""What it costs to keep a state, to cross to the trainer's process, to start, and to wait for packs."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import msgspec
from child import ask
from corpus import DAY, Job

from sftstream import DataConfig, PackAssignment, PackLoader
from sftstream.cli.bench import private_memory
from sftstream.state import DataState
from trainer.training.step_reader import StepReader

PACE = 100_000
"""Tokens a second that the consumer takes."""
STEP = 8
"""Packs that it takes together."""
REPEATS = 200
"""Times that something short is done to be timed."""


class Request(msgspec.Struct, frozen=True):
    """Which of `TASKS` a process is to do."""

    task: str
    job: Job
    path: str
    workers: int
    asked: float
    """When, in seconds since 1970."""
    seconds: float
    """How long something is watched."""
    half: bool = False
    """Start where half of the rows have been drawn."""


class Numbers(msgspec.Struct, frozen=True):
    """What a process found."""

    values: dict[str, float]


def config_of(request: Request) -> DataConfig:
    """As many streams as a run has by default, endless, on a machine's share of it."""
    return msgspec.convert(
        {
            "sources": [{"path": request.path}],
            "tokenizer": {"path": request.job.tokenizer, "date": DAY},
            "workers": request.workers,
            "capacity": request.job.capacity,
        },
        DataConfig,
    )


def start(request: Request) -> dict[str, float]:
    """Seconds to the first pack: since the process was asked for, and since it had imported everything."""
    config = config_of(request)
    prepared = time.time()
    state = half_way(config, request) if request.half else None
    began = time.time()
    loader = PackLoader(config, state=state)
    next(loader)
    taken = time.time() - began
    loader.close()
    return {"process": prepared - request.asked + taken, "loader": taken}


def half_way(config: DataConfig, request: Request) -> DataState:
    """A state that was saved a few packs after the beginning, moved on to where half of the rows have been drawn.

    What the streams hold open stays as it was: a state is a position and references, however it was come by.
    """
    saved = msgspec.msgpack.decode(Path(request.job.directory, "state").read_bytes(), type=DataState)
    with Path(request.path).open("rb") as file:
        rows = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 24), b""))
    drawn = (rows // 2 // config.streams,)
    streams = {n: msgspec.structs.replace(s, drawn=drawn, mixed=drawn) for n, s in saved.streams.items()}
    return msgspec.structs.replace(saved, streams=streams)


def state(request: Request) -> dict[str, float]:
    """The cost of encoding the state of a pack's stream, as is done for each pack, and of the whole loader's."""
    loader = PackLoader(config_of(request))
    settle(loader, request)
    seconds, packs = taken(loader, request)
    whole = loader.state
    Path(request.job.directory, "state").write_bytes(msgspec.msgpack.encode(whole))
    streams = itertools.cycle(whole.streams.values())
    return {
        "pack": seconds / packs,
        "encode": timed(lambda: msgspec.msgpack.encode(next(streams))),
        "bytes": sum(len(msgspec.msgpack.encode(stream)) for stream in whole.streams.values()) / len(whole.streams),
        "state": timed(lambda: loader.state),
    }


def crossing(request: Request) -> dict[str, float]:
    """A pack's way to the trainer: pickled by the worker, unpickled; all that this process does for one, in CPU time; and bytes
    that the worker shares with nobody."""
    loader = PackLoader(config_of(request))
    settle(loader, request)
    pack = next(loader)
    pickled = ForkingPickler.dumps(pack)
    began = time.process_time()
    _, packs = taken(loader, request)
    return {
        "main": (time.process_time() - began) / packs,
        "private": max(private_memory(child.pid) for child in multiprocessing.active_children() if child.pid),
        "pickle": timed(lambda: ForkingPickler.dumps(pack)),
        "unpickle": timed(lambda: pickle.loads(pickled)),
        "bytes": len(pickled),
    }


def waiting(request: Request) -> dict[str, float]:
    """The share of its time that a consumer of `PACE` tokens a second waits: from the first step on, and once workers settled.

    It takes its packs as the trainer does: those of a step together, read while it sleeps away the step before.
    """
    config = msgspec.structs.replace(config_of(request), global_batch=STEP)
    feed = StepReader(PackLoader(config), PackAssignment(config.streams, STEP, 1), config.capacity, ahead=True)
    feed.packs(0)
    feed.read_ahead()
    steps = itertools.count(1)
    first, soon = waited(feed, steps, request, max(request.job.patience, request.seconds / 4))
    later, packs = waited(feed, steps, request, request.seconds)
    feed.close()
    return {"first": first, "soon": soon, "later": later, "packs": packs}


def waited(feed: StepReader, steps: Iterator[int], request: Request, seconds: float) -> tuple[float, int]:
    """The share of so many seconds, and the packs taken in them."""
    waited, packs, began = 0.0, 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        time.sleep(STEP * request.job.capacity / PACE)
        asked = time.perf_counter()
        packs += len(feed.packs(next(steps)))
        waited += time.perf_counter() - asked
        feed.read_ahead()
    return waited / (time.perf_counter() - began), packs


def settle(loader: PackLoader, request: Request) -> None:
    """Read until every stream is past its first, smaller windows and what computes the ids is loaded."""
    until = time.perf_counter() + request.job.patience
    while time.perf_counter() < until or loader.packs < 2 * loader.config.streams:
        next(loader)


def taken(loader: PackLoader, request: Request) -> tuple[float, int]:
    """Seconds, and packs taken in them."""
    began, packs = time.perf_counter(), 0
    while packs < 2 * loader.config.streams or time.perf_counter() - began < request.seconds / 4:
        next(loader)
        packs += 1
    return time.perf_counter() - began, packs


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    began = time.perf_counter()
    for _ in range(REPEATS):
        run()
    return (time.perf_counter() - began) / REPEATS


TASKS = {task.__name__: task for task in (start, state, crossing, waiting)}


def respond(encoded: bytes) -> Numbers:
    """The new process's side."""
    request = msgspec.json.decode(encoded, type=Request)
    return Numbers(TASKS[request.task](request))


def costs(job: Job, gigabytes: float, seconds: float, rounds: int) -> Iterator[tuple[str, str]]:
    """Rows of the table: what, and how much; of starts the median."""
    path = f"{job.directory}/large.jsonl"
    size = enlarge(job.rows, Path(path), gigabytes)
    with tempfile.TemporaryDirectory(prefix="cache-", dir=job.directory) as cache:

        def find(task: str, workers: int, *, half: bool = False) -> dict[str, float]:
            request = Request(task, job, path, workers, time.time(), seconds, half)
            return ask("costs", request, Numbers, cache, cpus=None, here=job.here).values

        yield from _starts(find, cache, f"{size / 1e9:.3g} GB", rounds)
        yield from _running(find, rounds)


def _starts(find: Callable[..., dict[str, float]], cache: str, size: str, rounds: int) -> Iterator[tuple[str, str]]:
    for workers in (0, 1):
        first, second = [], []
        for _ in range(rounds):
            shutil.rmtree(f"{cache}/sftstream", ignore_errors=True)
            first.append(find("start", workers))
            second.append(find("start", workers))
        yield f"first pack of {size} never seen, {workers} workers", _seconds(first)
        yield f"first pack, second start, {workers} workers", _seconds(second)


def _running(find: Callable[..., dict[str, float]], rounds: int) -> Iterator[tuple[str, str]]:
    found = find("state", 0)
    yield "a pack from file, in one process", f"{found['pack'] * 1e3:.2f} ms"
    share, size = found["encode"] / found["pack"], found["bytes"] / 1e3
    yield "of it, encoding the state", f"{found['encode'] * 1e6:.0f} us ({share:.2%}), {size:.1f} kB"
    yield "`loader.state`, all streams", f"{found['state'] * 1e3:.2f} ms"
    resumed = [find("start", 0, half=True) for _ in range(rounds)]
    yield "first pack on resume, half of the rows drawn", _seconds(resumed)
    found = find("crossing", 1)
    yield (
        "a pack pickled and unpickled",
        f"{found['pickle'] * 1e3:.2f} + {found['unpickle'] * 1e3:.2f} ms, {found['bytes'] / 1e3:.0f} kB",
    )
    yield "what the main process spends on a pack, 1 worker", f"{found['main'] * 1e3:.2f} ms of CPU"
    yield "private memory of a worker", f"{found['private'] / 1e6:.0f} MB"
    found = find("waiting", 2)
    yield (
        f"waiting at {PACE:,} tokens/s, 2 workers, from the first step on",
        f"{found['first']:.2%} of the time of {found['soon']:.0f} packs",
    )
    yield "the same, later on", f"{found['later']:.2%} of the time of {found['packs']:.0f} packs"


def _seconds(found: Sequence[dict[str, float]]) -> str:
    loader, process = (statistics.median(one[part] for one in found) for part in ("loader", "process"))
    return f"{loader:.2f} s; {process:.2f} s with starting Python and imports"


def enlarge(rows: Path, path: Path, gigabytes: float) -> int:
    """The rows again and again, whole; the bytes there are then."""
    block = rows.read_bytes()
    with path.open("wb") as file:
        for _ in range(max(1, round(gigabytes * 1e9 / len(block)))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())  # lest what is measured waits for this
    return path.stat().st_size
