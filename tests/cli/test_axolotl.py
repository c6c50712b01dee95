"""`sftstream init --from`: a config of axolotl becomes a config that trains the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from commands import run

from sftstream.cli.main import main
from sftstream.formats import parse_row
from sftstream.formats.exclusions import CHOICES
from trainer.config import TrainConfig
from trainer.config_file import load_config

LEAST = {
    "base_model": "models/llama",
    "learning_rate": 1e-5,
    "sample_packing": True,
    "warmup_steps": 10,
    "datasets": [{"path": "chats.jsonl", "type": "chat_template"}],
}
"""The settings without which nothing means the same."""

# As a user writes it: comments, an anchor, a number without a dot, empty keys.
WRITTEN = """
base_model: meta-llama/Llama-3.2-1B-Instruct   # a comment
strict: false
chat_template: jinja
chat_template_jinja: chat.jinja
chat_template_kwargs: {enable_thinking: false, date_string: 2024-07-26}
datasets:
  - &chats
    path: chats.jsonl
    type: chat_template
    split: train
    ds_type: json
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
    roles: {assistant: [gpt, storyteller], user: [human]}
    roles_to_train: [gpt]
    train_on_eos: turn
  - path: org/chats
    type: chat_template
    split: "train[:10%]"
    name: english
    revision: main
    weight: 0.5
    field_messages: turns
test_datasets: [{path: held_out.jsonl, type: chat_template}]
output_dir: ./outputs/first
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
adapter: qlora
load_in_4bit: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.0
lora_target_modules: [q_proj, v_proj]
peft_use_rslora: true
wandb_project:
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 1
optimizer: adamw_torch
adam_beta2: 0.95
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
learning_rate: 2e-5
max_grad_norm: 0
bf16: auto
gradient_checkpointing: true
flash_attention: true
plugins: [axolotl.integrations.liger.LigerPlugin]
warmup_steps: 20
eval_steps: 50
save_steps: 50
save_total_limit: 2
weight_decay: 0.01
tensor_parallel_size: 2
val_set_size: 0
seed: 7
brand_new_key: {a: 1}
"""


def translated(tmp_path: Path, changes: dict[str, Any], *options: Any) -> TrainConfig:
    """The config written for `LEAST` with `changes`; a change to None removes the key."""
    given = {key: value for key, value in {**LEAST, **changes}.items() if value is not None}
    (tmp_path / "axolotl.yaml").write_text(yaml.safe_dump(given))
    result = run(main, "init", "--from", tmp_path / "axolotl.yaml", "--out", tmp_path / "run.toml", "--force", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    return load_config(tmp_path / "run.toml")


def refusal(tmp_path: Path, changes: dict[str, Any]) -> str:
    given = {key: value for key, value in {**LEAST, **changes}.items() if value is not None}
    (tmp_path / "axolotl.yaml").write_text(yaml.safe_dump(given))
    result = run(main, "init", "--from", tmp_path / "axolotl.yaml", "--out", tmp_path / "never.toml", "--gpus", 0)
    assert result.exit_code == 1
    assert not (tmp_path / "never.toml").exists()
    return result.stderr


def test_every_setting_of_a_config_is_moved_or_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.rows(4))
    (tmp_path / "axolotl.yaml").write_text(WRITTEN)
    result = run(main, "init", "--from", "axolotl.yaml", "--gpus", 8, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = [line.partition(":")[0] for line in json.loads(result.stdout)["told"]]
    assert told == ["strict", "pad_to_sequence_len", "flash_attention", "plugins", "brand_new_key"]
    comments = [line for line in Path("run.toml").read_text().splitlines() if line.startswith("#")]
    assert comments[0] == "# From axolotl.yaml, for 8 GPUs."
    assert comments[-1] == "# Without a counterpart: brand_new_key: {'a': 1}"
    config = load_config(Path("run.toml"))
    data, optimizer, schedule = config.data, config.optimizer, config.schedule
    assert (config.run.name, config.run.root, config.run.seed, config.run.epochs) == ("first", "outputs", 7, 1)
    assert (config.run.recompute, config.run.steps, config.run.weights_dtype) == ("full", None, "auto")
    assert config.model.init_from == data.tokenizer.path == "meta-llama/Llama-3.2-1B-Instruct"
    assert data.tokenizer.template == "chat.jinja"
    assert data.tokenizer.variables == {"enable_thinking": False, "date_string": "2024-07-26"}
    assert (data.capacity, data.global_batch, data.train_on) == (4096, 2 * 4 * 4, ("assistant",))
    chats, hub = data.sources
    assert (chats.path, chats.split, chats.columns, chats.roles) == (
        "chats.jsonl",
        None,
        None,
        {"storyteller": "assistant"},
    )
    assert (hub.path, hub.split, hub.subset, hub.revision) == ("org/chats", "train[:10%]", "english", "main")
    assert (hub.repeat, hub.columns) == (0.5, {"messages": "turns"})
    assert config.validation is not None
    assert ([source.path for source in config.validation.sources], config.validation.every) == (["held_out.jsonl"], 50)
    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (32, 16, ("q_proj", "v_proj"))
    assert (config.lora.rank_stabilized, config.lora.quantize) == (True, "nf4")
    assert (optimizer.learning_rate, optimizer.betas, optimizer.eps) == (2e-5, (0.9, 0.95), 1e-8)
    assert (optimizer.weight_decay, optimizer.clip) == (0.01, math.inf)
    assert (schedule.kind, schedule.warmup, schedule.over, schedule.minimum) == ("cosine", 20, "data", 0.1)
    assert (config.checkpoint.every, config.checkpoint.keep, config.parallel.tp) == (50, 2, 2)


def test_missing_keys_have_the_defaults_of_axolotl(tmp_path: Path) -> None:
    config = translated(tmp_path, {}, "--gpus", 0)
    assert (config.data.capacity, config.data.global_batch, config.data.shuffle) == (512, 1, True)
    assert (config.run.name, config.run.seed, config.run.epochs) == ("model-out", 42, 1)
    assert config.run.weights_dtype == "bfloat16"
    assert (config.optimizer.betas, config.optimizer.clip, config.optimizer.weight_decay) == ((0.9, 0.999), 1.0, 0.0)
    assert (config.schedule.kind, config.lora, config.validation) == ("cosine", None, None)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"max_steps": 200, "num_epochs": 3}, "run.steps", 200),
        ({"max_steps": 200, "num_epochs": 3}, "run.epochs", None),
        ({"max_steps": 200}, "schedule.over", "steps"),
        ({"max_steps": 200, "warmup_steps": None, "warmup_ratio": 0.1}, "schedule.warmup", 20),
        ({"max_steps": 200, "warmup_steps": None}, "schedule.warmup", 6),
        ({"max_steps": 9000, "warmup_steps": None}, "schedule.warmup", 100),
        ({"warmup_steps": None, "warmup_ratio": 0}, "schedule.warmup", 0),
        ({"lr_scheduler": "constant"}, "schedule.warmup", 0),
        ({"lr_scheduler": "constant_with_warmup"}, "schedule.warmup", 10),
        ({"lr_scheduler": "linear"}, "schedule.kind", "linear"),
        ({"bf16": False}, "run.compute_dtype", "float32"),
        ({"bf16": False}, "run.weights_dtype", "auto"),
        ({"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}, "lora.targets", "all-linear"),
        ({"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}, "run.weights_dtype", "auto"),
        ({"adapter": "lora", "lora_r": 8, "lora_target_modules": "all-linear"}, "lora.targets", "all-linear"),
        ({"adapter": "lora", "lora_r": 8, "lora_modules_to_save": ["lm_head"]}, "lora.modules_to_save", ("lm_head",)),
        ({"train_on_inputs": True}, "data.train_on", ("all",)),
        ({"shuffle_merged_datasets": False}, "data.shuffle", False),
        ({"tokenizer_config": "models/other"}, "data.tokenizer.path", "models/other"),
        ({"dataloader_num_workers": 3}, "data.workers", 3),
        ({"dp_replicate_size": 2}, "parallel.replicas", 2),
        ({"torch_compile": False}, "run.compile", False),
        ({"learning_rate": "3e-4"}, "optimizer.learning_rate", 3e-4),
        ({"adam_epsilon": "1e-6"}, "optimizer.eps", 1e-6),
        ({"special_tokens": {"pad_token": "<|pad|>"}}, "data.capacity", 512),
    ],
)
def test_a_setting_of_axolotl_has_its_value_here(
    tmp_path: Path, changes: dict[str, Any], field: str, value: Any
) -> None:
    found: Any = translated(tmp_path, changes, "--gpus", 0)
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value


def source(**changes: Any) -> dict[str, Any]:
    return {"datasets": [{"path": "chats.jsonl", "type": "chat_template", **changes}]}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sample_packing": None}, "sample_packing = None (only True)"),
        ({"excess_length_strategy": "truncate"}, "excess_length_strategy = 'truncate' (only 'drop')"),
        ({"optimizer": "adamw_bnb_8bit"}, "optimizer = 'adamw_bnb_8bit' (only 'adamw_torch' or 'adamw_torch_fused')"),
        ({"lr_scheduler": "rex"}, "lr_scheduler = 'rex'"),
        ({"warmup_steps": None}, "warmup_ratio = None without max_steps (give warmup_steps)"),
        ({"warmup_steps": None, "warmup_ratio": 0.1}, "warmup_ratio = 0.1 without max_steps (give warmup_steps)"),
        ({"val_set_size": 0.05}, "val_set_size = 0.05"),
        ({"rl": "dpo"}, "rl = 'dpo'"),
        ({"num_epochs": 1.5}, "num_epochs = 1.5 (only a whole number)"),
        ({"micro_batch_size": "auto"}, "micro_batch_size = 'auto' (only a whole number)"),
        ({"save_steps": 0.25}, "save_steps = 0.25 (only a whole number)"),
        ({"adapter": "lora", "lora_dropout": 0.05}, "lora_dropout = 0.05"),
        ({"load_in_4bit": True}, "load_in_4bit = True"),
        ({"fp16": True}, "fp16 = True"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha = 5"),
        ({"context_parallel_size": 2}, "context_parallel_size = 2 (only 1)"),
        ({"special_tokens": {"eos_token": "<|im_end|>"}}, "special_tokens = ['eos_token']"),
        ({"plugins": ["my.Plugin"]}, "plugins = 'my.Plugin'"),
        ({"chat_template": "chatml"}, "datasets[0].chat_template = 'chatml' (only 'tokenizer_default')"),
        (source(type="alpaca"), "datasets[0].type = 'alpaca' (only 'chat_template')"),
        (source(train_on_eos="all"), "datasets[0].train_on_eos = 'all' (only 'turn')"),
        (source(message_field_training="keep"), "datasets[0].message_field_training = 'keep' (only 'train' or"),
        (source(data_files="a.jsonl"), "datasets[0].data_files = 'a.jsonl'"),
        (source(message_property_mappings={"role": "who"}), "datasets[0].message_property_mappings.role = 'who'"),
        ({**source(weight=0.5), "num_epochs": 2}, "weight with more than one epoch"),
        (
            {"datasets": [*source()["datasets"], *source(roles_to_train=["user"])["datasets"]]},
            "roles_to_train or chat_template of one source alone",
        ),
    ],
)
def test_a_value_that_would_mean_something_else_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    assert named in refusal(tmp_path, changes)


@pytest.mark.parametrize("key", CHOICES)
def test_a_key_that_marks_messages_for_axolotl_marks_them_here(tmp_path: Path, key: str) -> None:
    found = translated(tmp_path, source(message_field_training=key), "--gpus", 0)
    (read,) = found.data.sources
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", key: 0}]
    assert [message.train for message in parse_row({"messages": turns}, read).messages] == [None, False]


def test_all_refused_values_are_told_at_once(tmp_path: Path) -> None:
    line = refusal(tmp_path, {"rl": "dpo", "val_set_size": 0.1, **source(type="alpaca")})
    assert line.startswith(f"error: {tmp_path / 'axolotl.yaml'}: no setting here means the same as rl = 'dpo'; ")
    assert "val_set_size = 0.1; " in line
    assert "datasets[0].type = 'alpaca'" in line


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("- a list", "lacks base_model, datasets or learning_rate"),
        ("base_model: x", "lacks base_model, datasets or learning_rate"),
        ("base_model: [", "cannot be read as a config of axolotl"),
        ("base_model: x\nlearning_rate: 1\ndatasets: 5", "cannot be read as a config of axolotl"),
        ("base_model: x\nlearning_rate: 1\ndatasets: [{path: a, type: chat_template, roles: 3}]", "cannot be read as"),
        ("base_model: x\nlearning_rate: !!python/object/apply:os.getcwd []\ndatasets: []", "cannot be read as"),
    ],
)
def test_a_file_that_is_no_config_of_axolotl_is_an_error(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "axolotl.yaml").write_text(content)
    result = run(main, "init", "--from", tmp_path / "axolotl.yaml", "--out", tmp_path / "run.toml", "--gpus", 0)
    assert result.exit_code == 1
    assert reason in result.stderr
    assert not (tmp_path / "run.toml").exists()


def test_data_and_a_config_to_translate_exclude_each_other(tmp_path: Path) -> None:
    out = tmp_path / "run.toml"
    both = run(main, "init", "chats.jsonl", "--from", "axolotl.yaml", "--out", out)
    neither = run(main, "init", "--out", out)
    assert "leave DATA, --model, --template, --columns, --ignore and --roles out" in both.stderr
    assert "no data is given" in neither.stderr
