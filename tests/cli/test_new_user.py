"""The way of a new user, who knows the help texts only: from a file of chats to an audited model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

pytestmark = pytest.mark.slow


def sftstream(*words: object) -> str:
    """Run a verb as a shell would; return its output."""
    command = [sys.executable, "-m", "sftstream", *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_from_a_file_of_chats_to_an_audited_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    bad = [{"messages": [{"role": "oracle", "content": "?"}]}]
    tiny.write_jsonl(tmp_path / "chats.jsonl", [*tiny.rows(300), *bad])
    assert all(verb in sftstream("--help") for verb in ("init", "preview", "stats", "audit"))

    assert "wrote run.toml" in sftstream("init", "chats.jsonl", "--model", model)
    assert "slots filled" in sftstream("preview", "run.toml")
    found = json.loads(sftstream("stats", "run.toml", "--json"))
    assert found["sources"][0]["refused"] == {"unknown role": 1}

    command = [sys.executable, "-m", "trainer.main", "run.toml"]
    checkpoints = tmp_path / "runs/chats/checkpoints"
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not any(checkpoints.glob("step-*")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "runs/chats/export").exists()
    killed_at = json.loads(sftstream("inspect", "runs/chats", "--json"))
    assert 0 < killed_at["steps"] < found["steps"]

    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "runs/chats/export/model.safetensors").exists()
    finished = json.loads(sftstream("inspect", "runs/chats", "--json"))
    assert finished["conversations"] == 3 * 300
    assert finished["refused"] == {"unknown role": 3}
    audited = json.loads(sftstream("audit", "runs/chats", "--json"))
    assert audited["differences"] == []
    assert len(audited["sessions"]) >= 2
