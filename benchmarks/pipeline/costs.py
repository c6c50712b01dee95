"""Measure the costs of keeping a state, crossing to the trainer's process, starting, and waiting
for packs."""

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
from sftstream.cli.speed import private_memory
from sftstream.state import DataState, StreamState
from trainer.training.step_reader import StepReader

PACE = 100_000
"""Tokens per second taken by the consumer."""
STEP = 8
"""Packs taken together by the consumer."""
REPEATS = 200
"""Repetitions for timing a short operation."""


class Request(msgspec.Struct, frozen=True):
    """One of `TASKS` for a process to run."""

    task: str
    job: Job
    path: str
    workers: int
    asked: float
    """Time of the request, seconds since 1970."""
    seconds: float
    """Duration of a measurement, seconds."""
    half: bool = False
    """Start from a state with half of the rows drawn."""


class Numbers(msgspec.Struct, frozen=True):
    """Figures of one process, by name."""

    values: dict[str, float]


def config_of(request: Request) -> DataConfig:
    """Return an endless config with the default number of streams."""
    return msgspec.convert(
        {
            "sources": [{"path": request.path}],
            "tokenizer": {"path": request.job.tokenizer, "date": DAY},
            "workers": request.workers,
            "streams": 64,
            "capacity": request.job.capacity,
        },
        DataConfig,
    )


def start(request: Request) -> dict[str, float]:
    """Measure seconds to the first pack, from the request for the process and from the end of all
    imports."""
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
    """Return a state saved after a few packs, moved forward to half of the rows drawn.

    Planned packs and leftovers stay unchanged.
    """
    saved = msgspec.msgpack.decode(Path(request.job.directory, "state").read_bytes(), type=DataState)
    with Path(request.path).open("rb") as file:
        rows = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 24), b""))
    half = rows // 2 // config.stream_count
    streams = {number: _moved_forward(stream, half) for number, stream in saved.streams.items()}
    return msgspec.structs.replace(saved, streams=streams)


def _moved_forward(stream: StreamState, drawn: int) -> StreamState:
    """Return the stream after `drawn` rows, as if the rows between had been given."""
    more = max(0, drawn - stream.drawn[0])
    (accepted,) = stream.accepted
    return msgspec.structs.replace(
        stream,
        drawn=(stream.drawn[0] + more,),
        mixed=(stream.mixed[0] + more,),
        accepted=(msgspec.structs.replace(accepted, conversations=accepted.conversations + more),),
        conversations=stream.conversations + more,
    )


def state(request: Request) -> dict[str, float]:
    """Measure encoding a stream's state, done once per pack, and `loader.state` of all streams."""
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
    """Measure pickling and unpickling of a pack, CPU time of this process per pack, and the
    worker's private bytes."""
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
    """Measure the share of time that a consumer of `PACE` tokens per second waits: from the start,
    and after workers settled.

    Like the trainer, the consumer takes the packs of a step together, read while it sleeps for the
    previous step.
    """
    config = msgspec.structs.replace(config_of(request), global_batch=STEP)
    reader = StepReader(PackLoader(config), PackAssignment(config.stream_count, STEP, 1), config.capacity, ahead=True)
    reader.packs(0)
    reader.read_ahead()
    steps = itertools.count(1)
    first, soon = waited(reader, steps, request, max(request.job.patience, request.seconds / 4))
    later, packs = waited(reader, steps, request, request.seconds)
    reader.close()
    return {"first": first, "soon": soon, "later": later, "packs": packs}


def waited(reader: StepReader, steps: Iterator[int], request: Request, seconds: float) -> tuple[float, int]:
    """Return the share of `seconds` spent waiting and the packs taken."""
    waited, packs, began = 0.0, 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        time.sleep(STEP * request.job.capacity / PACE)
        asked = time.perf_counter()
        packs += len(reader.packs(next(steps)))
        waited += time.perf_counter() - asked
        reader.read_ahead()
    return waited / (time.perf_counter() - began), packs


def settle(loader: PackLoader, request: Request) -> None:
    """Read until every stream is past its first, smaller windows and fastokens is loaded."""
    until = time.perf_counter() + request.job.patience
    while time.perf_counter() < until or loader.packs < 2 * loader.config.stream_count:
        next(loader)


def taken(loader: PackLoader, request: Request) -> tuple[float, int]:
    """Return seconds elapsed and packs taken."""
    began, packs = time.perf_counter(), 0
    while packs < 2 * loader.config.stream_count or time.perf_counter() - began < request.seconds / 4:
        next(loader)
        packs += 1
    return time.perf_counter() - began, packs


def timed(run: Callable[[], Any]) -> float:
    """Return the mean seconds of a call."""
    began = time.perf_counter()
    for _ in range(REPEATS):
        run()
    return (time.perf_counter() - began) / REPEATS


TASKS = {task.__name__: task for task in (start, state, crossing, waiting)}


def respond(encoded: bytes) -> Numbers:
    """Answer an encoded `Request` in the new process."""
    request = msgspec.json.decode(encoded, type=Request)
    return Numbers(TASKS[request.task](request))


def costs(job: Job, gigabytes: float, seconds: float, rounds: int) -> Iterator[tuple[str, str]]:
    """Yield the rows of the table: cost and amount; medians for starts."""
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
        yield f"first pack of {size} new to the machine, {workers} workers", _seconds(first)
        yield f"first pack, second start, {workers} workers", _seconds(second)


def _running(find: Callable[..., dict[str, float]], rounds: int) -> Iterator[tuple[str, str]]:
    found = find("state", 0)
    yield "a pack from file, in one process", f"{found['pack'] * 1e3:.2f} ms"
    share, size = found["encode"] / found["pack"], found["bytes"] / 1e3
    yield "encoding the state, part of the former", f"{found['encode'] * 1e6:.0f} us ({share:.2%}), {size:.1f} kB"
    yield "`loader.state`, all streams", f"{found['state'] * 1e3:.2f} ms"
    resumed = [find("start", 0, half=True) for _ in range(rounds)]
    yield "first pack on resume, half of the rows drawn", _seconds(resumed)
    found = find("crossing", 1)
    yield (
        "a pack pickled and unpickled",
        f"{found['pickle'] * 1e3:.2f} + {found['unpickle'] * 1e3:.2f} ms, {found['bytes'] / 1e3:.0f} kB",
    )
    yield "CPU time of the main process per pack, 1 worker", f"{found['main'] * 1e3:.2f} ms of CPU"
    yield "private memory of a worker", f"{found['private'] / 1e6:.0f} MB"
    found = find("waiting", 2)
    yield (
        f"waiting at {PACE:,} tokens/s, 2 workers, from the first step",
        f"{found['first']:.2%} of the time of {found['soon']:.0f} packs",
    )
    yield "the former, after workers have settled", f"{found['later']:.2%} of the time of {found['packs']:.0f} packs"


def _seconds(found: Sequence[dict[str, float]]) -> str:
    loader, process = (statistics.median(one[part] for one in found) for part in ("loader", "process"))
    return f"{loader:.2f} s; {process:.2f} s with starting Python and imports"


def enlarge(rows: Path, path: Path, gigabytes: float) -> int:
    """Write the rows repeatedly until the file has about `gigabytes`; return its bytes."""
    block = rows.read_bytes()
    with path.open("wb") as file:
        for _ in range(max(1, round(gigabytes * 1e9 / len(block)))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())  # a measurement must not wait for this write
    return path.stat().st_size
