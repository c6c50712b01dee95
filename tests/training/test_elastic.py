"""Agents of torchrun with one to two nodes: a node that is lost or joins changes the ranks, and the
run goes on by itself with the same global batches."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import runs

from checkpoints import CheckpointStore

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

STORE = (
    "import time, torch.distributed as dist; "
    "store = dist.TCPStore('127.0.0.1', {port}, is_master=True, wait_for_workers=False); time.sleep(10_000)"
)
"""The store of the rendezvous, apart from all nodes."""


class Nodes:
    """Agents of torchrun that share a directory, each a node with `ranks` ranks."""

    def __init__(self, directory: Path, config: dict[str, Any], ranks: int) -> None:
        self.directory, self._ranks = directory, ranks
        text = "".join(f"{name} = {runs.toml(table)}\n" for name, table in config.items())
        (directory / "run.toml").write_text(text, encoding="utf-8")
        self._port = runs.free_port()
        self.store = subprocess.Popen([sys.executable, "-c", STORE.format(port=self._port)], start_new_session=True)
        self.agents: list[subprocess.Popen[bytes]] = []
        while not listens(self._port):
            assert self.store.poll() is None
            time.sleep(0.1)

    def start(self) -> None:
        """Start a further agent."""
        timeouts = "is_host=0,last_call_timeout=8,keep_alive_interval=2,keep_alive_max_attempt=5,join_timeout=200"
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", f"--nproc-per-node={self._ranks}"]
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self._port}", "--rdzv-id=test"]
        options = [f"--rdzv-conf={timeouts}", "--local-addr=127.0.0.1", "--max-restarts=5", "--monitor-interval=0.2"]
        with self._log(len(self.agents)).open("wb") as log:
            agent = subprocess.Popen(
                [*launch, *meeting, *options, "-m", "trainer.main", "run.toml"],
                cwd=self.directory,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ
                | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
                start_new_session=True,
            )
        self.agents.append(agent)

    def kill(self, number: int) -> None:
        """Kill an agent with its ranks, as the loss of a node does."""
        for pid in reversed(family(self.agents[number].pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_rank(self, number: int) -> None:
        """Kill the first rank of an agent."""
        os.kill(family(self.agents[number].pid)[1], signal.SIGKILL)

    def wait_for(self, condition: Callable[[], bool], timeout: float = 240) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.output()
            assert any(agent.poll() is None for agent in self.agents), self.output()
            time.sleep(0.05)

    def finish(self, *numbers: int) -> None:
        """Wait until the agents end, and assert their exit codes 0."""
        for number in numbers:
            assert self.agents[number].wait(400) == 0, self.output()

    def output(self) -> str:
        return "\n".join(self._log(n).read_text(errors="replace") for n in range(len(self.agents)))

    def end(self) -> None:
        for process in (*self.agents, self.store):
            for pid in family(process.pid) if process.poll() is None else ():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    def _log(self, number: int) -> Path:
        return self.directory / f"agent{number}.log"


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def family(pid: int) -> list[int]:
    """Return a process and its children, and their children."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return [pid]
    return [pid, *(found for child in children for found in family(int(child)))]


STEPS = 120


def config_of(source: str, tokenizer: str) -> dict[str, Any]:
    return runs.run_config(tokenizer, source, run={"steps": STEPS}, parallel={"timeout": "60s"})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    """The directory of an undisturbed run on one rank."""
    directory = tmp_path_factory.mktemp("plain")
    return runs.run(directory, config_of(runs.sources(directory), tokenizer)).directory


@pytest.fixture
def nodes(plain: Path, tmp_path: Path, tokenizer: str, request: pytest.FixtureRequest) -> Iterator[Nodes]:
    job = Nodes(tmp_path, config_of(str(plain / "dialogues.jsonl"), tokenizer), request.param)
    try:
        yield job
    finally:
        job.end()


def saved(nodes: Nodes) -> Callable[[], bool]:
    store = CheckpointStore(nodes.directory / "runs" / "run" / "checkpoints")
    return lambda: store.steps() != []


def shards(nodes: Nodes) -> list[int]:
    """Return the number of data-parallel ranks of each start of the run."""
    lines = (nodes.directory / "runs" / "run" / "ledger" / "sessions.jsonl").read_text().splitlines()
    return [json.loads(line)["mesh"]["dp"] for line in lines]


@pytest.mark.parametrize("nodes", [1, 2], indirect=True, ids=["1 rank", "2 ranks"])
@pytest.mark.parametrize("lost", [0, 1])
def test_the_run_goes_on_at_what_is_left_of_two_nodes(nodes: Nodes, plain: Path, lost: int) -> None:
    nodes.start()
    nodes.start()
    nodes.wait_for(saved(nodes))
    nodes.kill(lost)
    nodes.finish(1 - lost)
    before, *_, after = shards(nodes)
    assert before == 2 * after
    assert runs.digests(nodes.directory) == runs.digests(plain)


@pytest.mark.parametrize("nodes", [1], indirect=True, ids=["1 rank"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed_is_started_again_on_both_nodes(nodes: Nodes, plain: Path, lost: int) -> None:
    nodes.start()
    nodes.start()
    nodes.wait_for(saved(nodes))
    nodes.kill_rank(lost)
    nodes.finish(0, 1)
    assert shards(nodes)[-1] == 2
    assert runs.digests(nodes.directory) == runs.digests(plain)


@pytest.mark.parametrize("nodes", [1], indirect=True, ids=["1 rank"])
def test_a_node_that_joins_after_a_failure_makes_the_run_wider(nodes: Nodes, plain: Path) -> None:
    """The agent stops its ranks by SIGTERM for the newcomer: no request to stop the run."""
    nodes.start()
    nodes.wait_for(saved(nodes))
    nodes.kill_rank(0)
    nodes.wait_for(lambda: "resuming after" in nodes.output())
    nodes.start()
    nodes.finish(0, 1)
    assert shards(nodes) == [1, 1, 2]
    assert runs.digests(nodes.directory) == runs.digests(plain)
