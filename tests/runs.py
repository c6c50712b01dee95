"""Start training runs as processes of their own, and kill them at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import tiny
from gloo_ranks import processes as server

TIMES = ("tokens_per_second", "gpu_tokens_per_second", "mfu", "peak_memory", "data_wait", "seconds", "time")
"""Fields of metrics.jsonl that differ between equal runs."""


def run_config(tokenizer: str, *sources: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """Return a config: a Llama of 51,360 parameters, ten steps of four packs, a checkpoint every
    second step.

    `changes` replaces keys by table.
    """
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "steps": 10, "device": "cpu"},
        "data": {
            "sources": [{"path": path} for path in sources],
            "tokenizer": {"path": tokenizer},
            "streams": 8,
            "capacity": 256,
            "global_batch": 4,
            "window": 8,
            "workers": 0,
        },
        "model": {
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "optimizer": {"learning_rate": 1e-2},
        "checkpoint": {"every": 2},
    }
    return {name: tables.get(name, {}) | changes.get(name, {}) for name in tables | changes}


def sources(directory: Path, count: int = 60) -> str:
    """Write `count` conversations, a too long conversation, and a row with an unknown role."""
    bad = [tiny.chat("a question", " ".join(tiny.WORDS * 8)), {"messages": [{"role": "oracle", "content": "?"}]}]
    return tiny.write_jsonl(directory / "dialogues.jsonl", [*tiny.rows(count), *bad])


class Job:
    """The processes of a run in `directory`, started once."""

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        processes: int = 1,
        environment: dict[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        address |= environment or {}
        self._ranks: list[BaseProcess] = [
            server.Process(target=_rank, args=(directory, config, {**address, **names(r)}, options))
            for r in range(processes)
        ]
        for rank in self._ranks:
            rank.start()

    @property
    def alive(self) -> bool:
        return all(rank.is_alive() for rank in self._ranks)

    def kill(self) -> None:
        """Send SIGKILL to every rank; the loader workers end with their ranks."""
        for rank in self._ranks:
            rank.kill()
        self._join()

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [rank.pid or 0 for rank in self._ranks]

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        os.kill(self.pids[rank], number)

    def finish(self, timeout: float = 240) -> int:
        """Wait for the end and return the first nonzero exit code, or 0.

        A failed rank ends all ranks, as under torchrun. Raises TimeoutError after `timeout` s.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            codes = [rank.exitcode for rank in self._ranks]
            if any(codes) or None not in codes:
                self.kill()
                return next((code for code in codes if code), 0)
            time.sleep(0.02)
        self.kill()
        raise TimeoutError(f"the run did not end within {timeout} s")

    def output(self, rank: int = 0) -> str:
        return (self.directory / f"rank{rank}.log").read_text()

    def _join(self) -> None:
        for rank in self._ranks:
            rank.join(30)


def run(directory: Path, config: dict[str, Any], processes: int = 1) -> Job:
    """Run to the end and assert exit code 0."""
    job = Job(directory, config, processes)
    code = job.finish()
    assert code == 0, f"exit code {code}\n" + "\n".join(job.output(rank) for rank in range(processes))
    return job


def wait_for(condition: Callable[[], bool], job: Job, timeout: float = 120) -> None:
    """Wait until the condition holds or the job has ended, at most `timeout` s."""
    deadline = time.monotonic() + timeout
    while not condition() and job.alive and time.monotonic() < deadline:
        time.sleep(0.001)


def metrics(directory: Path, name: str = "run") -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl` without the fields of `TIMES`."""
    lines = (directory / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def digests(directory: Path, name: str = "run") -> list[str]:
    return [line["batch_digest"] for line in metrics(directory, name)]


def outcome(directory: Path, name: str = "run") -> dict[str, Any]:
    """Return the outputs of a run that equal runs share bit for bit."""
    root = directory / "runs" / name
    return {
        "metrics": metrics(directory, name),
        "refused": (root / "refused.jsonl").read_text(),
        "ledger": {
            path.name: path.read_bytes() for path in (root / "ledger").iterdir() if path.name != "sessions.jsonl"
        },
        "weights": (root / "export" / "model.safetensors").read_bytes(),
    }


def names(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _rank(directory: Path, config: dict[str, Any], environment: dict[str, str], options: Sequence[str]) -> None:
    os.environ.update(environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    os.chdir(directory)
    log = os.open(f"rank{environment['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from trainer.main import main

    torch.set_num_threads(1)
    path = directory / f"config{environment['RANK']}.toml"
    path.write_text("".join(f"{name} = {toml(table)}\n" for name, table in config.items()))
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.exit(main([str(path), *options]))


def free_port() -> int:
    """Return a free port below 32768, the first port that the kernel gives to outgoing
    connections."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def toml(value: Any) -> str:
    """Return a value as TOML, with inline tables."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)
