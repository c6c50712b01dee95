"""A directory as a user has it: conversations, a config, a finished run, its model and a state."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import runs
import tiny

from sftstream import read_state


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    """A directory with chats.jsonl, run.toml, chat.jinja, model/, state.json, and runs/first of four
    steps with the checkpoints of steps 2 and 4."""
    directory = tmp_path_factory.mktemp("desk")
    tiny.write_jsonl(directory / "chats.jsonl", [*tiny.rows(60), {"messages": [{"role": "oracle", "content": "?"}]}])
    (directory / "chat.jinja").write_text(tiny.DATED_TEMPLATE)
    config = runs.run_config(
        tokenizer,
        "chats.jsonl",
        run={"name": "first", "steps": 4, "device": "cpu", "epochs": 4},
        data={"streams": 2, "global_batch": 2},
    )
    (directory / "run.toml").write_text("".join(f"{name} = {runs.toml(table)}\n" for name, table in config.items()))
    runs.run(directory, config)
    (directory / "model").symlink_to("runs/first/export", target_is_directory=True)
    before = Path.cwd()
    os.chdir(directory)
    state = read_state("runs/first/checkpoints/step-00000002")
    (directory / "state.json").write_bytes(msgspec.json.encode(state.builtins()))
    os.chdir(before)
    return directory
