"""The way of a new user, who knows the help texts only: from a file of chats to an audited model."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from fake_hub import TOKEN, Hub, running

pytestmark = pytest.mark.slow


def command(*words: object, **environment: str) -> str:
    """Run a Python command as a shell would; return its output."""
    ended = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | environment,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def sftstream(*words: object) -> str:
    """Run a verb of sftstream; return its output."""
    return command("-m", "sftstream", *words)


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

    assert "--plan" in command("-m", "trainer.main", "--help")
    plan = json.loads(command("-m", "trainer.main", "run.toml", "--plan", "--json"))
    assert plan["steps"] > 0
    checkpoints = tmp_path / "runs/chats/checkpoints"
    first = subprocess.Popen(
        [sys.executable, "-m", "trainer.main", "run.toml"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not any(checkpoints.glob("step-*")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "runs/chats/export").exists()
    killed_at = json.loads(sftstream("inspect", "runs/chats", "--json"))
    assert 0 < killed_at["steps"] < found["steps"]

    printed = command("-m", "trainer.main", "run.toml").splitlines()
    begins = [line.partition(" ")[0] for line in printed]
    for word in ("compute", "model", "data", "packs", "place", "time", "chosen", "run", "step"):
        assert word in begins
    assert f"resuming after step {killed_at['steps']}" in printed[begins.index("run")]
    assert printed[len(begins) - begins[::-1].index("step") - 1].endswith("100% done | 0 s left")
    assert (tmp_path / "runs/chats/export/model.safetensors").exists()
    finished = json.loads(sftstream("inspect", "runs/chats", "--json"))
    assert finished["conversations"] == 3 * 300
    assert finished["refused"] == {"unknown role": 3}
    audited = json.loads(sftstream("audit", "runs/chats", "--json"))
    assert audited["differences"] == []
    assert len(audited["sessions"]) >= 2

    assert "runs/first" in command("-m", "trainer.report", "--help")
    reported = json.loads(command("-m", "trainer.report", "runs/chats", "--json"))
    assert len(reported["launches"]) == len(audited["sessions"])
    assert (tmp_path / "runs/chats/report.html").exists()

    generate = next(line for line in printed if line.startswith("generate "))
    program, *words = shlex.split(generate.removeprefix("generate "))
    assert program == "python"
    assert command(*words)  # the answer of the model
    assert "push" in command("-m", "checkpoints", "--help")
    assert json.loads(command("-m", "checkpoints", "verify", "runs/chats", "--json"))[-1]["damage"] is None
    with running(Hub()) as hub:
        settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        pushed = command("-m", "checkpoints", "push", "runs/chats", "me/chats", "--license", "mit", **settings)
        assert pushed.startswith(f"pushed step {finished['steps']} to me/chats: ")
        files = hub.repositories["me/chats"]
    weights = (tmp_path / "runs/chats/export/model.safetensors").read_bytes()
    assert files["model.safetensors"] == weights
    assert "python -m trainer.main run.toml" in files["README.md"].decode()
