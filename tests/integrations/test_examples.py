"""The examples of other trainers run and resume, and the page on integrations runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hosts import Hosts

from sftstream import read_state
from sftstream.integrations import last_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["plain_loop", "transformers_trainer", "trl_sft"])
def test_an_example_runs_and_resumes(hosts: Hosts, tmp_path: Path, name: str) -> None:
    for steps in (1, 2):
        hosts.example(name, str(tmp_path), steps)
        checkpoint = last_checkpoint(tmp_path)
        assert checkpoint
        assert read_state(f"{checkpoint}/data_state.json").packs == steps * 8


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert names["step"] == 1
