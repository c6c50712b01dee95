"""Kill and resume a run of the user's config at random moments; compare with an unkilled run."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from sftstream.config import DataConfig
from sftstream.ledger.audit import audit
from sftstream.ledger.compare import compare
from sftstream.ledger.data_run import run_data
from sftstream.ledger.reader import Ledger
from sftstream.loader import PackLoader

NEVER = 600.0
"""Seconds after which an attempt is killed even if the drawn step is not reached."""


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


Start = Callable[[Path, "Hop"], Attempt]
"""Function that starts, or continues, the run in a directory on a topology."""


@dataclass(frozen=True)
class Hop:
    """The topology of an attempt."""

    shards: int
    workers: int

    def __str__(self) -> str:
        return f"{self.shards} shards x {self.workers} workers"


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
    return _verify(start, directory, hops, kills, seed, say, resumed_weights=None)


def verify_training(
    path: Path, directory: Path, steps: int, kills: int, seed: int, say: Callable[[str], None]
) -> Verdict:
    """Train `steps` steps of the run in the TOML file `path`: once without a kill, and once with up
    to `kills` kills, each followed by a resume.

    Every attempt trains in a single process, with 0 to 2 loader workers drawn from `seed`. Raises
    ValueError if the run fails.
    """

    def start(place: Path, hop: Hop) -> Attempt:
        return _TrainingAttempt(path, place, steps, hop)

    hops = [Hop(1, workers) for workers in range(3)]
    return _verify(start, directory, hops, kills, seed, say, resumed_weights=_weights)


def _verify(
    start: Start,
    directory: Path,
    hops: Sequence[Hop],
    kills: int,
    seed: int,
    say: Callable[[str], None],
    resumed_weights: Callable[[Path], str] | None,
) -> Verdict:
    draw = random.Random(seed)
    whole, broken = directory / "whole", directory / "broken"
    say("run without a kill")
    _finish(start(whole, hops[0]), whole)
    killed = 0
    for _ in range(kills):
        hop = draw.choice(hops)
        if not _killed(start(broken, hop), broken, draw):
            break
        killed += 1
        say(f"killed on {hop} after step {_steps(broken)}")
    _finish(start(broken, draw.choice(hops)), broken)
    return _judge(whole, broken, killed, resumed_weights, [str(hop) for hop in hops])


def _judge(
    whole: Path, broken: Path, kills: int, weights: Callable[[Path], str] | None, hops: Sequence[str]
) -> Verdict:
    shown, differences, not_shown = [], [], []
    difference, count = compare(Ledger(whole), Ledger(broken))
    if difference is None and len(Ledger(whole).steps) != len(Ledger(broken).steps):
        difference = f"A has {len(Ledger(whole).steps)} steps, B has {len(Ledger(broken).steps)}"
    if difference:
        differences.append(f"A is the run without a kill, B the killed run: {difference}")
    else:
        shown.append(f"{count} steps have equal packs after {kills} kills; topologies: {', '.join(hops)}")
    report = audit(Ledger(broken))
    differences += report.differences
    not_shown += report.not_shown
    shown += [] if report.differences else ["the audit of the killed run finds no difference"]
    if weights is None:
        not_shown.append("losses and weights: data only")
    else:
        for name, of in (("losses", _losses), ("weights", weights)):
            if of(whole) == of(broken):
                shown.append(f"the {name} have equal bits")
            else:
                differences.append(f"the {name} of the killed run differ from those of the run without a kill")
        not_shown.append("other numbers of ranks: the verification trains in one process")
    if not kills:
        not_shown.append("kills: the run was finished before the first kill; give more --steps")
    return Verdict(tuple(shown), tuple(differences), tuple(not_shown))


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
        raise ValueError(f"the run in {directory} ended with exit code {code}: {' '.join(last)}")


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
    """A run of the trainer's command in another process."""

    def __init__(self, path: Path, directory: Path, steps: int, hop: Hop) -> None:
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
        with (directory / "log.txt").open("wb") as log:
            # A new process group, so that a kill reaches the loader's workers too.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainer.main", str(path), *words],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        if self.alive():
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def code(self) -> int:
        return self._process.wait()


def _losses(directory: Path) -> list[tuple[object, object]]:
    lines = (directory / "metrics.jsonl").read_bytes().splitlines()
    return [(line["loss"], line["grad_norm"]) for line in map(msgspec.json.decode, lines)]


def _weights(directory: Path) -> str:
    """Return the digest of the exported weights."""
    digest = hashlib.sha256()
    for path in sorted((directory / "export").glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
