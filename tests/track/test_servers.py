"""Real servers of MLflow and trackio on this machine, killed, stopped by SIGSTOP, and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from made_runs import made_run, write_lines
from runs import free_port

from trainer.track import trackio_run
from trainer.track.config import TrackerConfig
from trainer.track.open import opener
from trainer.track.send import Sender
from trainer.track.tracker import TrackerDown

pytestmark = pytest.mark.slow

COMMANDS = {
    "mlflow": "from mlflow.cli import cli; cli(['server', '--backend-store-uri', 'sqlite:///{root}/mlflow.db', "
    "'--artifacts-destination', '{root}/artifacts', '--port', '{port}', '--workers', '1'])",
    "trackio": "import trackio; trackio.show(open_browser=False, block_thread=True, server_port={port})",
}


class Server:
    """The server of a tracker, in a session of its own."""

    def __init__(self, kind: str, root: Path) -> None:
        self.kind, self.root, self.port = kind, root, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        code = COMMANDS[self.kind].format(root=self.root, port=self.port)
        environment = os.environ | {"TRACKIO_DIR": str(self.root), "TRACKIO_WRITE_TOKEN": "letters"}
        with (self.root / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], stdout=log, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while True:
            with suppress(OSError), closing(socket.create_connection(("127.0.0.1", self.port), 1)):
                return
            assert self._process.poll() is None, (self.root / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()


@pytest.fixture(params=["mlflow", "trackio"])
def server(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip(request.param)
    if request.param == "mlflow":
        pytest.importorskip("mlflow.server.handlers")
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", "letters")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setattr(trackio_run, "TIMEOUT", 3.0)
    root = tmp_path / "server"
    root.mkdir()
    found = Server(request.param, root)
    yield found
    found.signal(signal.SIGKILL)


def numbers(server: Server, tracker: TrackerConfig) -> list[int]:
    """Return the steps of the losses that the server's database holds."""
    import sqlite3

    (path,) = server.root.glob("mlflow.db" if server.kind == "mlflow" else f"{tracker.project}.db")
    query = "SELECT step FROM metrics" + (" WHERE key = 'loss'" if server.kind == "mlflow" else "")
    with closing(sqlite3.connect(path)) as stored:
        return sorted(step for (step,) in stored.execute(query))


def test_a_server_that_is_killed_and_stopped_gets_each_step_once(server: Server, tmp_path: Path) -> None:
    tracker = TrackerConfig(kind=server.kind, url=server.url, project="letters")  # type: ignore[arg-type]
    run = made_run(tmp_path / "run", tracker, steps=3)
    sender = Sender(run, tracker, opener(run, tracker))
    with pytest.raises(TrackerDown):
        sender.send()
    server.start()
    sender = _patiently(sender)
    write_lines(run, range(1, 6))
    server.signal(signal.SIGSTOP)
    for _ in range(2):
        with pytest.raises(TrackerDown):
            sender.send()
    server.signal(signal.SIGCONT)
    _patiently(sender)
    server.signal(signal.SIGKILL)
    write_lines(run, range(1, 9))
    with pytest.raises(TrackerDown):
        sender.send()
    server.start()
    _patiently(sender).close()
    assert numbers(server, tracker) == [1, 2, 3, 4, 5, 6, 7, 8]


def _patiently(sender: Sender) -> Sender:
    """Send as soon as the server answers, at most for 60 s."""
    deadline = time.monotonic() + 60
    while True:
        try:
            sender.send()
        except TrackerDown:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return sender
