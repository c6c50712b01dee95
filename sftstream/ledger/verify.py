"""Kill and resume a run of the user's config at random moments; compare with an unkilled run."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import torch

from sftstream.config import DataConfig
from sftstream.ledger.audit import audit
from sftstream.ledger.compare import compare
from sftstream.ledger.data_run import run_data
from sftstream.ledger.reader import Ledger
from sftstream.loader import PackLoader
from sftstream.toml_file import read_toml

NEVER = 600.0
"""Seconds after which an attempt is killed even if the drawn step is not reached."""


WHOLE = "whole"
"""Name of the directory of the run without a kill."""
ROUNDING = 0.01
"""Largest relative difference of losses that counts as rounding: sums in bfloat16 on another number
of shards differ by some thousandths after a few steps."""


class Verdict(msgspec.Struct, frozen=True):
    """The result of a verification. The resumes are exact if `differences` is empty."""

    shown: tuple[str, ...]
    differences: tuple[str, ...]
    not_shown: tuple[str, ...]


class Attempt(Protocol):
    """A start of a run, which continues the run from its newest state, and can be killed."""

    def alive(self) -> bool:
        """Return True until the run has ended."""

    def kill(self) -> None:
        """Send SIGKILL to the run, and wait for its end."""

    def code(self) -> int:
        """Wait for the end of the run, and return its exit code."""


Losses = list[tuple[float | None, float | None]]
"""Loss and norm of the gradient of each step; None for a number that is not finite."""
Start = Callable[[Path, "Hop"], Attempt]
"""Function that starts, or continues, the run in a directory on a topology."""


@dataclass(frozen=True)
class Hop:
    """The topology of an attempt."""

    shards: int
    workers: int
    tp: int = 1
    """Number of ranks of a shard; 1 without a model."""

    def __str__(self) -> str:
        return f"shards {self.shards} x workers {self.workers}"


def verify_data(
    config: DataConfig, directory: Path, steps: int, kills: int, seed: int, say: Callable[[str], None]
) -> Verdict:
    """Run `steps` steps of the data service without a model: once without a kill, and once with up
    to `kills` kills, each followed by a resume on a topology drawn from `seed`.

    Raises ValueError if the config cannot be run at all.
    """
    loader = PackLoader(config, workers=0)
    config = loader.config  # with the number of streams that "auto" chooses
    most = min(4, loader.position().header.identity.streams)

    def start(place: Path, hop: Hop) -> Attempt:
        return _DataAttempt(config, place, steps, hop)

    hops = [Hop(shards, workers) for shards in range(1, most + 1) for workers in range(3)]
    run = _Verification(start, directory, random.Random(seed), say)
    run.whole(hops[0])
    run.killed(directory / "killed", [run.draw.choice(hops) for _ in range(kills + 1)])
    run.not_shown.append("losses and weights: data only")
    return run.verdict()


def verify_training(
    path: Path,
    directory: Path,
    steps: int,
    kills: int,
    seed: int,
    say: Callable[[str], None],
    options: Sequence[str] = (),
) -> Verdict:
    """Train `steps` steps of the run in the TOML file `path`: once without a kill, and once with up
    to `kills` kills, each followed by a resume with 0 to 2 loader workers drawn from `seed`.
    `options` are further words of the trainer's command line.

    If the machine has room for more shards, a third run is killed and changes the number of shards
    at each resume. Raises ValueError if the run fails.
    """
    room = _room(read_toml(path))

    def start(place: Path, hop: Hop) -> Attempt:
        return _TrainingAttempt(path, place, steps, hop, options)

    def hop(shards: int, workers: int) -> Hop:
        return Hop(shards, workers, room.tp)

    run = _Verification(start, directory, random.Random(seed), say)
    run.whole(hop(room.least, 0))
    run.killed(directory / "killed", [hop(room.least, run.draw.randrange(3)) for _ in range(kills + 1)])
    for name, of in (("losses", _losses), ("weights", _weights)):
        run.compare_bits(name, of(directory / WHOLE), of(directory / "killed"))
    streams = Ledger(directory / WHOLE).sessions[0].identity.streams
    shards = min(room.most, streams) // room.least * room.least
    if shards > room.least:
        # The first and every second attempt on the least shards; the last attempt on the most.
        more = [attempt % 2 == 1 or attempt == kills for attempt in range(kills + 1)]
        hops = [hop(shards, 1) if many else hop(room.least, 0) for many in more]
        run.killed(directory / "hopped", hops, "on other shards: ")
        run.compare_losses(_losses(directory / WHOLE), _losses(directory / "hopped"))
        run.not_shown.append("equal bits on another number of shards: their sums round differently")
    run.not_shown.append(
        f"more than {max(shards, room.least)} shards: this machine has room for {room.most}, and the run has {streams} streams"
    )
    return run.verdict()


class _Room(NamedTuple):
    """The numbers of shards that a run can have on this machine, and the ranks of a shard."""

    least: int
    most: int
    tp: int


def _room(tables: dict[str, Any]) -> _Room:
    """Return the shards that the machine has room for: a GPU for each rank, or on CPUs up to twice
    as many shards as the config needs, and a core for each rank."""
    parallel = tables.get("parallel", {})
    tp, least = parallel.get("tp", 1), parallel.get("replicas", "auto")
    least = 1 if least == "auto" else least
    if tables.get("run", {}).get("device") != "cpu" and torch.cuda.is_available():
        most = torch.cuda.device_count() // tp
    else:
        most = min(2 * least, (os.cpu_count() or 1) // tp)
    return _Room(least, max(least, most), tp)


class _Verification:
    """A verification under way: a run without a kill, then killed runs that must be like it."""

    def __init__(self, start: Start, directory: Path, draw: random.Random, say: Callable[[str], None]) -> None:
        self._start, self._directory, self._say = start, directory, say
        self.draw = draw
        self.shown: list[str] = []
        self.differences: list[str] = []
        self.not_shown: list[str] = []

    def whole(self, hop: Hop) -> None:
        """Run to the end without a kill."""
        self._say("run without a kill")
        place = self._directory / WHOLE
        _finish(self._start(place, hop), place)

    def killed(self, place: Path, hops: Sequence[Hop], prefix: str = "") -> None:
        """Run in directory `place`, killed on each of `hops` but the last, and resumed on the next.

        Compares the packs with those of the run without a kill; `prefix` begins each line of the
        verdict.
        """
        kills = 0
        for hop in hops[:-1]:
            attempt = self._start(place, hop)
            if not _killed(attempt, place, self.draw):
                break
            kills += 1
            self._say(f"{prefix}killed on {hop} after step {_steps(place)}")
        _finish(self._start(place, hops[kills]), place)
        self.judge(place, prefix, kills, ", ".join(dict.fromkeys(map(str, hops[: kills + 1]))))

    def judge(self, place: Path, prefix: str, kills: int, topologies: str) -> None:
        """Compare the packs of a killed run with those of the run without a kill, and audit it."""
        whole, broken = Ledger(self._directory / WHOLE), Ledger(place)
        difference, count = compare(whole, broken)
        if difference is None and len(whole.steps) != len(broken.steps):
            difference = f"A has {len(whole.steps)} steps, B has {len(broken.steps)}"
        if difference:
            self.differences.append(f"{prefix}A is the run without a kill, B the killed run: {difference}")
        else:
            self.shown.append(f"{prefix}{count} steps have equal packs after {kills} kills; topologies: {topologies}")
        report = audit(broken)
        self.differences += [f"{prefix}{line}" for line in report.differences]
        self.not_shown += [f"{prefix}{line}" for line in report.not_shown]
        self.shown += [] if report.differences else [f"{prefix}the audit of the run finds no difference"]
        if not kills:
            self.not_shown.append(f"{prefix}kills: the run was finished before the first kill; give more --steps")

    def compare_bits(self, name: str, whole: object, killed: object) -> None:
        """Compare values that must be equal to the bit."""
        if whole == killed:
            self.shown.append(f"the {name} have equal bits")
        else:
            self.differences.append(f"the {name} of the killed run differ from those of the run without a kill")

    def compare_losses(self, whole: Losses, hopped: Losses) -> None:
        """Compare losses that differ by rounding."""
        losses = zip(whole, hopped, strict=False)
        apart = [_apart(a, b) for (a, _), (b, _) in losses]
        largest = max(apart, default=0.0)
        line = f"the losses on other numbers of shards differ by at most {largest:.2g} of their value"
        if largest <= ROUNDING and all(map(math.isfinite, apart)):
            self.shown.append(line)
        else:
            self.differences.append(f"{line}, more than rounding ({ROUNDING})")

    def verdict(self) -> Verdict:
        """Return the verdict on the runs so far."""
        return Verdict(tuple(self.shown), tuple(self.differences), tuple(self.not_shown))


def _apart(a: float | None, b: float | None) -> float:
    """Return the relative difference of two losses, infinity if only one is finite."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b) / max(abs(a), 1e-6)


def _killed(attempt: Attempt, directory: Path, draw: random.Random) -> bool:
    """Kill an attempt at a random moment after 1 to 3 more steps.

    Returns False if the attempt ended before the kill.
    """
    wanted, deadline = _steps(directory) + draw.randint(1, 3), time.monotonic() + NEVER
    while attempt.alive() and _steps(directory) < wanted and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(draw.random() * 0.02)
    alive = attempt.alive()
    attempt.kill()
    return alive


def _finish(attempt: Attempt, directory: Path) -> None:
    if code := attempt.code():
        log = directory / "log.txt"
        last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
        raise ValueError(
            f"the run in {directory} ended with exit code {code}: {' '.join(last)}; correct the config, and try again"
        )


def _steps(directory: Path) -> int:
    """Return the number of the last step in `metrics.jsonl`; 0 if there is none."""
    path = directory / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return int(msgspec.json.decode(whole[-1])["step"]) if whole else 0


class _DataAttempt:
    """A run of the data service without a model, in another process."""

    def __init__(self, config: DataConfig, directory: Path, steps: int, hop: Hop) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(
            target=_run_data, args=(msgspec.json.encode(config), directory, steps, hop.shards, hop.workers)
        )
        self._process.start()

    def alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def code(self) -> int:
        self._process.join()
        return self._process.exitcode or 0


def _run_data(config: bytes, directory: Path, steps: int, shards: int, workers: int) -> None:
    try:
        run_data(msgspec.json.decode(config, type=DataConfig), directory, steps, 2, shards, workers)
    except (ValueError, OSError) as error:
        (directory / "log.txt").write_text(str(error))
        sys.exit(1)


class _TrainingAttempt:
    """A run of the trainer's command in other processes, a process for each rank."""

    def __init__(self, path: Path, directory: Path, steps: int, hop: Hop, options: Sequence[str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        overrides = {
            "run.root": str(directory.parent.absolute()),
            "run.name": directory.name,
            "run.steps": steps,
            "checkpoint.every": 2,
            "checkpoint.root": str(directory.absolute() / "checkpoints"),  # never the checkpoints of the real run
            "data.workers": hop.workers,
        }
        words = [f"{key}={value}" for key, value in overrides.items()]
        ranks = hop.shards * hop.tp
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
        self._processes = []
        for rank in range(ranks):
            of_rank = {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            with (directory / ("log.txt" if rank == 0 else f"log-{rank}.txt")).open("wb") as log:
                # A new process group, so that a kill reaches the loader's workers too.
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "trainer.main", str(path), *words, *options],
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                        env=os.environ | (of_rank if ranks > 1 else {}),
                    )
                )

    def alive(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def code(self) -> int:
        return next((code for code in [process.wait() for process in self._processes] if code), 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _losses(directory: Path) -> Losses:
    lines = (directory / "metrics.jsonl").read_bytes().splitlines()
    return [(line["loss"], line["grad_norm"]) for line in map(msgspec.json.decode, lines)]


def _weights(directory: Path) -> str:
    """Return the digest of the exported weights."""
    digest = hashlib.sha256()
    for path in sorted((directory / "export").glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
