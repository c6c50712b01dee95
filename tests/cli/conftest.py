"""A directory as a user has it: conversations, a config, a finished run, its model and a state."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import runs
import tiny
import transformers

from sftstream import read_state


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    """A directory with chats.jsonl, run.toml, axolotl.yaml, chat.jinja, model/, state.json, and runs/first of four
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
    (directory / "axolotl.yaml").write_text(
        "base_model: model\nlearning_rate: 2e-5\nsample_packing: true\nwarmup_steps: 2\n"
        "datasets: [{path: chats.jsonl, type: chat_template}]\n"
    )
    (directory / "model").symlink_to("runs/first/export", target_is_directory=True)
    before = Path.cwd()
    os.chdir(directory)
    state = read_state("runs/first/checkpoints/step-00000002")
    (directory / "state.json").write_bytes(msgspec.json.encode(state.builtins()))
    os.chdir(before)
    return directory


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small Llama with a tokenizer and a chat template."""
    directory = tmp_path_factory.mktemp("model")
    tiny.save_tokenizer(directory)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory
