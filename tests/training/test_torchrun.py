"""A real torchrun that starts failed workers again: a stop ends them, a kill goes on exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs

from checkpoints import CheckpointStore

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


class Torchrun:
    """torchrun with two workers, which starts failed workers again up to twice."""

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        self.directory = directory
        text = "".join(f"{name} = {runs.toml(table)}\n" for name, table in config.items())
        (directory / "run.toml").write_text(text, encoding="utf-8")
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2"]
        address = ["--master-addr=127.0.0.1", f"--master-port={runs.free_port()}", "--monitor-interval=0.1"]
        self._log = (directory / "torchrun.log").open("wb")
        self.process = subprocess.Popen(
            [*launch, *address, "-m", "trainer.main", "run.toml"],
            cwd=directory,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def workers(self) -> dict[int, int]:
        """Return the process id of each living worker by rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = {}
        for child in map(int, children):
            try:
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks = [entry for entry in environment if entry.startswith(b"RANK=")]
            if ranks:
                found[int(ranks[0][5:])] = child
        return found

    def wait_for(self, condition: Callable[[], bool], timeout: float = 240) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.01)

    def finish(self, timeout: float = 400) -> int:
        try:
            return self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self._log.close()

    def output(self) -> str:
        return (self.directory / "torchrun.log").read_text(errors="replace")


@pytest.fixture
def config(tmp_path: Path, tokenizer: str) -> dict[str, Any]:
    return runs.run_config(tokenizer, runs.sources(tmp_path), run={"steps": 12})


def test_workers_started_again_after_a_stop_end_without_a_step(tmp_path: Path, config: dict[str, Any]) -> None:
    config["run"] |= {"steps": 100_000, "stop_after": "8s"}
    job = Torchrun(tmp_path, config)
    assert job.finish() != 0  # so that `torchrun ... && deploy` deploys no unfinished model
    output = job.output()
    assert output.count("and saved its checkpoint; go on with: torchrun --nproc-per-node 2 -m trainer.main ") == 1
    assert "resuming after step" not in output
    (last,) = CheckpointStore(tmp_path / "runs/run/checkpoints").steps()[-1:]
    assert len(runs.metrics(tmp_path)) == last
    config["run"] = {"name": "run", "device": "cpu", "steps": last + 1}
    job = Torchrun(tmp_path, config)
    assert job.finish() == 0, job.output()
    assert f"resuming after step {last}" in job.output()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_is_started_again_and_the_run_goes_on_exactly(
    tmp_path: Path, config: dict[str, Any], rank: int
) -> None:
    (tmp_path / "plain").mkdir()
    runs.run(tmp_path / "plain", config, processes=2)
    (tmp_path / "killed").mkdir()
    job = Torchrun(tmp_path / "killed", config)
    store = CheckpointStore(tmp_path / "killed/runs/run/checkpoints")
    job.wait_for(lambda: store.steps() != [])
    os.kill(job.workers()[rank], signal.SIGKILL)
    assert job.finish() == 0, job.output()
    assert "resuming after step" in job.output()
    assert runs.outcome(tmp_path / "killed") == runs.outcome(tmp_path / "plain")
