"""Every remedy in a message that names a key is followed, and the error is gone."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import runs
import tiny
import tiny_llama
import torch
from safetensors.torch import load_file, save_file
from test_imports import ORDER, files
from tokenizers import Tokenizer, models, pre_tokenizers

from checkpoints import CheckpointError, CheckpointStore
from sftstream import PackLoader, Shard
from sftstream.config import RowSettings
from sftstream.formats import parse_row
from sftstream.records import Refused
from sftstream.tokenization import fast_tokenizer
from trainer.checkpointing.saves import Saves
from trainer.checkpointing.settings import Settings
from trainer.choices import choose
from trainer.config import TrainConfig
from trainer.config_file import load_config
from trainer.distributed.determinism import determinism
from trainer.distributed.mesh import distributed
from trainer.llama.attention import KERNELS
from trainer.llama.export import export
from trainer.llama.hf_config import read_config
from trainer.llama.model import Llama
from trainer.llama.weights import load_weights
from trainer.reporting.display import Display
from trainer.run import run


def loaded(changes: dict[str, str]) -> TrainConfig:
    """Write the config of a tiny run, and load it with the changes; the value "-" takes a key away."""
    config = runs.run_config("words", "rows.jsonl", data={"streams": 4})
    path = Path("run.toml")
    path.write_text("".join(f"{name} = {runs.toml(table)}\n" for name, table in config.items()))
    return load_config(path, [f"{key}={value}" for key, value in changes.items() if value != "-"])


def start(changes: dict[str, str]) -> None:
    """Read a pack of the first of two shards."""
    loader = PackLoader(loaded(changes).data, shard=Shard(0, 2), workers=0)
    try:
        next(loader)
    finally:
        loader.close()


def read(changes: dict[str, str]) -> None:
    """Read all packs; raises the first row's refusal."""
    for pack in PackLoader(loaded({"run.epochs": "1", "data.max_too_long": "1.0", **changes}).data, workers=0):
        for refused in pack.refused:
            raise Refused(refused.reason, refused.detail)


def train(changes: dict[str, str]) -> None:
    """Train two steps of a run of its own."""
    shutil.rmtree("runs", ignore_errors=True)
    run(loaded({"run.steps": "2", **changes}))


def train_on(changes: dict[str, str]) -> None:
    """Continue, with other settings, a run that has a checkpoint of its second step."""
    if not Path("kept").exists():
        train({})
        shutil.copytree("runs", "kept")
    shutil.rmtree("runs")
    shutil.copytree("kept", "runs")
    run(loaded({"run.steps": "4", **changes}))


def resume_attention(changes: dict[str, str]) -> None:
    """Choose the attention of a resume whose checkpoint was made with a kernel for GPUs."""
    config = loaded(changes)
    with distributed("cpu", config.parallel) as topology:
        usual = choose(loaded({}), tiny_llama.CONFIG, topology, None).config
        values = {"seed": 0, "model": tiny_llama.CONFIG, "optimizer": usual.optimizer, "schedule": usual.schedule}
        choose(config, tiny_llama.CONFIG, topology, Settings(**values, compute_dtype="float32", attention="fa4"))


def load_damaged(changes: dict[str, str]) -> None:
    """Find the newest step of checkpoints that are damaged."""
    root = Path("damaged")
    if not root.exists():
        CheckpointStore(root).save(1, {"w": torch.ones(3)}, {})
        next(root.rglob("*.safetensors")).write_bytes(b"")
    saves = Saves(loaded({"checkpoint.root": "'damaged'", **changes}), Display(quiet=True))
    with saves.store:
        saves.latest()


def attend(changes: dict[str, str]) -> None:
    """Ask the kernel of a run for its device, type, head size and package."""
    run = loaded({key: value for key, value in changes.items() if key.startswith("run.")}).run
    name = "sdpa" if run.attention == "auto" else run.attention
    dtype = torch.float32 if run.compute_dtype == "auto" else getattr(torch, run.compute_dtype)
    KERNELS[name].require(torch.device(changes.get("device", "cuda")), dtype, int(changes.get("size", "64")))
    KERNELS[name].require_installed()


def load_tied(changes: dict[str, str]) -> None:
    """Load a model directory whose config.json says that head and embedding are tied."""
    directory = Path("tied")
    if not directory.exists():
        export(tiny_llama.built(tiny_llama.TIED), tiny_llama.TIED, directory)
        tensors = load_file(directory / "model.safetensors")
        head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
        save_file(tensors | head, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": "untie" not in changes}
    (directory / "config.json").write_text(json.dumps(config))
    load_weights(Llama(read_config(directory)), directory)


def train_adapter(changes: dict[str, str]) -> None:
    """Train on from an adapter of an earlier run, or merge the adapter into its model."""
    if not Path("adapter").exists():
        wide = msgspec.structs.replace(tiny_llama.CONFIG, vocab_size=408)
        export(tiny_llama.built(wide), wide, Path("wide"))
        train({"model": "{init_from = 'wide'}", "lora": "{rank = 2}"})
        Path("runs/run/adapter").rename("adapter")
        Path("runs/run/export").rename("merged")
    train(changes)


def put(changes: dict[str, str]) -> None:
    """Run a kernel without a deterministic form."""
    with determinism(loaded(changes).run.deterministic):
        torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))


def parse(changes: dict[str, str]) -> None:
    """Read the JSON text of a row under the settings of its source, each a JSON text."""
    settings = {key: json.loads(value) for key, value in changes.items() if key != "row"}
    parse_row(changes["row"].encode(), msgspec.convert(settings, RowSettings))


class Advice(NamedTuple):
    """A broken config, its message, and changes that the message advises, each to be tried alone."""

    broken: dict[str, str]
    message: str
    remedies: tuple[dict[str, str], ...]
    """Overrides; the value "-" takes the key away."""
    file: str = ""
    """The file that raises the error; "" for any file with the words of the message."""
    use: Callable[[dict[str, str]], None] = start
    """The use of the config, which raises the error."""


def rows_at(path: str, **settings: str) -> str:
    more = "".join(f", {key} = {value}" for key, value in settings.items())
    return f"[{{path = '{path}'{more}}}]"


CALLS_FIRST = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}\n"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    "{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant\n{% endif %}"
)
"""A template that prints the calls of a message before its content."""
FORGETS = (
    "{%- for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' }}"
    "{%- if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{- m.content + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"
)
"""A template that prints the reasoning of the last message only."""
MOVES = (
    "{% for m in messages %}{% if m.role == 'user' and messages[loop.index0:] | selectattr('role', 'equalto', 'user') | list"
    " | length == 1 %}{{ tools | tojson }}{% endif %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)
"""A template that prints the tools before the last question."""
TURNS = json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}])
MARKED = TURNS.replace('"hello"', '"hello", "MARK": VALUE')
FORMATS = "sftstream/formats"
LORA = "trainer/llama/lora/layers.py"
ADAPTER = '{ rank = 2, alpha = 32.0, targets = "all-linear", rank_stabilized = false, modules_to_save = [] }'
HISTORIES: tuple[dict[str, str], ...] = ({"data.history": "'per_turn'"}, {"data.history": "'as_rendered'"})
HELD_OUT = "[{path = 'rows.jsonl', weight = 1000}, {path = 'long.jsonl', weight = 0.001}]"
LONG = {"data.sources": rows_at("long.jsonl"), "data.streams": "1"}

HELLO = {"role": "assistant", "content": "hello"}
ADD, OTHER = ({"name": "add", "arguments": {"a": number}} for number in (1, 2))
TRAINED_PART = {"type": "text", "text": "hi", "train": 1}
STREAMED = {"data.sources": "[{path = 'rows.jsonl', streaming = true}]", "data.shuffle": "false"}
ADVICE = [
    Advice(
        {"row": f'{{"messages": {MARKED.replace("MARK", "skipLoss").replace("VALUE", "true")}}}'},
        "or leave the key out by ignore = ['messages[].skipLoss']",
        ({"ignore": '["messages[].skipLoss"]'},),
        f"{FORMATS}/exclusions.py",
        parse,
    ),
    Advice(
        {"row": f'{{"messages": {MARKED.replace("MARK", "weight").replace("VALUE", "0.5")}}}'},
        "use true or false, 1 or 0, or leave it out by ignore = ['messages[].weight']",
        ({"ignore": '["messages[].weight"]'},),
        f"{FORMATS}/exclusions.py",
        parse,
    ),
    Advice(
        {"row": f'{{"messages": {MARKED.replace("MARK", "value").replace("VALUE", chr(34) + "bye" + chr(34))}}}'},
        "leave out the wrong keys by ignore = ['messages[].content'], for example",
        ({"ignore": '["messages[].value"]'}, {"ignore": '["messages[].content"]'}),
        f"{FORMATS}/keys.py",
        parse,
    ),
    Advice(
        {"row": f'{{"messages": {MARKED.replace("MARK", "refusal").replace("VALUE", chr(34) + "no" + chr(34))}}}'},
        "or leave them out by ignore = ['messages[].refusal']",
        ({"ignore": '["messages[].refusal"]'},),
        f"{FORMATS}/keys.py",
        parse,
    ),
    Advice(
        {"row": json.dumps({"messages": [{"role": "user", "content": [TRAINED_PART]}, HELLO]})},
        "or leave the key out by ignore = ['messages[].train']",
        ({"ignore": '["messages[].train"]'},),
        f"{FORMATS}/exclusions.py",
        parse,
    ),
    Advice(
        {"row": json.dumps({"messages": [{"role": "assistant", "type": "reasoning", "content": "hm"}, HELLO]})},
        "or read the words by ignore = ['messages[].type']",
        ({"ignore": '["messages[].type"]'},),
        f"{FORMATS}/messages.py",
        parse,
    ),
    Advice(
        {"row": json.dumps({"messages": [{"role": "assistant", "tool_calls": [ADD], "function_call": OTHER}, HELLO]})},
        "leave out the wrong keys by ignore = ['messages[].tool_calls'], for example",
        ({"ignore": '["messages[].tool_calls"]'}, {"ignore": '["messages[].function_call"]'}),
        f"{FORMATS}/messages.py",
        parse,
    ),
    Advice(
        {"row": json.dumps({"messages": [{**HELLO, "channel": "commentary", "recipient": "python"}]})},
        "or read the message as words of its channel by ignore = ['messages[].recipient']",
        ({"ignore": '["messages[].recipient"]'},),
        f"{FORMATS}/harmony.py",
        parse,
    ),
    Advice(
        {"row": json.dumps({"messages": [{**HELLO, "thinking": "hm", "content": "<think>so</think>hello"}]})},
        "or leave out the key of the reasoning by ignore = ['messages[].thinking']",
        ({"ignore": '["messages[].thinking"]'},),
        f"{FORMATS}/thoughts.py",
        parse,
    ),
    Advice(
        {"row": f'{{"prompt": "Hi!", "chosen": {TURNS}}}'},
        'read the answer alone by columns = {messages = "..."} with the name of its column',
        ({"columns": '{"messages": "chosen"}'},),
        f"{FORMATS}/messages.py",
        parse,
    ),
    Advice(
        {"row": '{"prompt": "hi", "completion": "no", "label": false}'},
        "or train the answer by ignore = ['label']",
        ({"ignore": '["label"]'},),
        f"{FORMATS}/exclusions.py",
        parse,
    ),
    Advice(
        {"row": f'{{"instruction": {json.dumps(TURNS)}, "output": "x"}}'},
        "read it by columns = {messages = ...} with the column's name",
        ({"columns": '{"messages": "instruction"}'},),
        f"{FORMATS}/spelled.py",
        parse,
    ),
    Advice(
        {"row": f'{{"messages": {TURNS}, "background": "It rains."}}'},
        "read the column under a known name by columns = {...}, or leave the column out by ignore = ['background']",
        ({"ignore": '["background"]'}, {"columns": '{"messages": "messages", "system": "background"}'}),
        f"{FORMATS}/unread.py",
        parse,
    ),
    Advice(
        {"row": f'{{"messages": {TURNS}}}', "max_row_bytes": "50"},
        "raise max_row_bytes, or shorten the row",
        ({"max_row_bytes": "500"},),
        f"{FORMATS}/rows.py",
        parse,
    ),
    Advice(
        {"row": '{"task": "hi", "reply": "hello"}'},
        "columns = {...} of the source reads columns under these names",
        ({"columns": '{"prompt": "task", "completion": "reply"}'},),
        f"{FORMATS}/layouts.py",
        parse,
    ),
    Advice(
        {"row": json.dumps({"messages": [{"role": "user", "content": "hi"}], "answer": "a", "reasoning": "hm"})},
        'by columns = {prompt = "messages", completion = "answer", reasoning = "reasoning"}',
        ({"columns": '{"prompt": "messages", "completion": "answer", "reasoning": "reasoning"}'},),
        f"{FORMATS}/unread.py",
        parse,
    ),
    Advice(
        {
            "row": json.dumps({"prompt": "hi", "completion": [{**HELLO, "reasoning": "a"}], "reasoning": "b"}),
        },
        "leave the column out by ignore = ['reasoning'], or out of columns",
        ({"ignore": '["reasoning"]'}, {"columns": '{"prompt": "prompt", "completion": "completion"}'}),
        f"{FORMATS}/layouts.py",
        parse,
    ),
    Advice(
        {
            "row": '{"prompt": "hi", "completion": "hello", "note": "words"}',
            "columns": '{"prompt": "prompt", "completion": "completion", "contxt": "note"}',
        },
        "give the column a name in columns that this layout reads, or leave it out of columns",
        (
            {"columns": '{"prompt": "prompt", "completion": "completion", "system": "note"}'},
            {"columns": '{"prompt": "prompt", "completion": "completion"}'},
        ),
        f"{FORMATS}/unread.py",
        parse,
    ),
    Advice(
        {"row": f'{{"messages": {TURNS}, "tools": [{{"type": "web_search_20250305", "name": "web_search"}}]}}'},
        "write it as a function with parameters, or leave it out of the tools",
        (
            {"row": f'{{"messages": {TURNS}, "tools": [{{"name": "web_search", "parameters": {{}}}}]}}'},
            {"row": f'{{"messages": {TURNS}, "tools": []}}'},
        ),
        f"{FORMATS}/tools.py",
        parse,
    ),
    Advice(
        {"row": f'{{"messages": {TURNS.replace("user", "narrator")}}}'},
        "roles = {...} adds names, 'tool_call' for calls",
        ({"roles": '{"narrator": "user"}'},),
        f"{FORMATS}/messages.py",
        parse,
    ),
    Advice(
        {"data.sources": rows_at("splits", split="'a[:5]'", streaming="true"), "data.shuffle": "false"},
        "leave out streaming, or name a whole split",
        (
            {"data.sources": rows_at("splits", split="'a[:5]'")},
            {"data.sources": rows_at("splits", split="'a'", streaming="true")},
        ),
    ),
    Advice(
        {**STREAMED, "run.epochs": "2", "schedule": "{kind = 'cosine', over = 'data'}"},
        'use schedule.over = "steps" with schedule.steps',
        ({"schedule": "{kind = 'cosine', over = 'steps', steps = 9}"},),
    ),
    Advice(
        {**LONG, "data.max_too_long": "1.0"},
        "tokens do not fit into a pack of 256; raise data.capacity, or set data.overflow",
        ({"data.capacity": "4096"}, {"data.overflow": "'truncate'"}, {"data.overflow": "'split'"}),
        "sftstream/streaming/packer.py",
        read,
    ),
    Advice(
        {**LONG, "data.sources": rows_at("huge.jsonl")},
        "characters do not fit into 256 tokens; raise data.capacity, or set data.overflow",
        ({"data.capacity": "32768"}, {"data.overflow": "'truncate'"}, {"data.overflow": "'split'"}),
        "sftstream/streaming/example_reader.py",
        read,
    ),
    Advice(
        {
            "data.sources": rows_at("thoughts.jsonl"),
            "data.tokenizer.template": "'forgets.jinja'",
            "data.history": "'error'",
        },
        'is not printed; set history = "per_turn" or "as_rendered"',
        HISTORIES,
        "sftstream/rendering/mask.py",
        read,
    ),
    Advice(
        {"data.sources": rows_at("tools.jsonl"), "data.tokenizer.template": "'moves.jinja'", "data.history": "'error'"},
        'messages follow; set history = "per_turn" or "as_rendered"',
        HISTORIES,
        "sftstream/rendering/renderer.py",
        read,
    ),
    Advice(
        {
            "data.sources": rows_at("calls.jsonl"),
            "data.tokenizer.template": "'calls.jinja'",
            "data.train_reasoning": "false",
        },
        "left out; set train_reasoning = true",
        ({"data.train_reasoning": "true"},),
        "sftstream/rendering/mask.py",
        read,
    ),
    Advice(
        {
            "data.sources": rows_at("rows.jsonl", streaming="true", repeat="0.1"),
            "data.shuffle": "false",
            "run.epochs": "2",
        },
        "raise repeat to 0.125 or more",
        ({"data.sources": rows_at("rows.jsonl", streaming="true", repeat="0.125")},),
        "sftstream/streaming/sampler.py",
    ),
    Advice(
        {"data.tokenizer": "{path = 'letters', backend = 'fastokens'}"},
        'is not byte-level; set backend = "auto"',
        ({"data.tokenizer": "{path = 'letters', backend = 'auto'}"},),
        "sftstream/tokenization/tokenizer.py",
    ),
    Advice(
        {"run.attention": "'fa4'", "device": "cpu"},
        'attention "fa4" has kernels for cuda, not for cpu: set run.attention = "auto"',
        ({"run.attention": "'auto'"},),
        "trainer/llama/attention.py",
        attend,
    ),
    Advice(
        {"run.attention": "'fa3'", "run.compute_dtype": "'bfloat16'"},
        'is not installed (no module flash_attn_interface); set run.attention = "auto" for the fastest kernel',
        ({"run.attention": "'auto'"},),
        "trainer/llama/attention.py",
        attend,
    ),
    Advice(
        {"run.attention": "'torch'", "run.compute_dtype": "'bfloat16'", "size": "12"},
        'not 12: set run.attention = "auto"',
        ({"run.attention": "'auto'"},),
        "trainer/llama/attention.py",
        attend,
    ),
    Advice(
        {"run.attention": "'torch'", "run.compute_dtype": "'float32'"},
        "computes in bfloat16, float16, not in float32: set run.compute_dtype to one of these",
        ({"run.compute_dtype": "'bfloat16'"},),
        "trainer/llama/attention.py",
        attend,
    ),
    Advice(
        {"run.attention": "'fa4'"},
        'attention "fa4" has kernels for cuda, not for cpu: set run.attention = "auto"',
        ({"run.attention": "'auto'"},),
        "trainer/llama/attention.py",
        train,
    ),
    Advice(
        {},
        'set run.accept_changed = ["run.attention"] and name another kernel in run.attention',
        ({"run.accept_changed": "['run.attention']", "run.attention": "'sdpa'"},),
        "trainer/choices.py",
        resume_attention,
    ),
    Advice(
        {},
        "set tie_word_embeddings to false in config.json",
        ({"untie": "true"},),
        "trainer/llama/weights.py",
        load_tied,
    ),
    Advice(
        {"run.deterministic": "true"},
        "set run.deterministic = false",
        ({"run.deterministic": "false"},),
        "trainer/distributed/determinism.py",
        put,
    ),
    Advice(
        {},
        "or set checkpoint.fresh_start = true to start from step 0",
        ({"checkpoint.fresh_start": "true"},),
        "trainer/checkpointing/saves.py",
        load_damaged,
    ),
    Advice(
        {"model": "{init_from = 'small'}", "lora": "{rank = 2, dropout = 0.1}"},
        "set dropout = 0, or remove the key",
        ({"lora": "{rank = 2, dropout = 0}"}, {"lora": "{rank = 2}"}),
        LORA,
        loaded,
    ),
    Advice(
        {"lora": "{rank = 2}"},
        "set model.init_from, or remove [lora]",
        ({"model": "{init_from = 'small'}"}, {"lora": "-"}),
        LORA,
        loaded,
    ),
    Advice(
        {
            "model": "{init_from = 'small'}",
            "lora": "{rank = 2, export_merged = false}",
            "evaluation": "{path = 'rows.jsonl'}",
        },
        "set lora.export_merged = true, or remove [evaluation]",
        ({"lora": "{rank = 2, export_merged = true}"}, {"evaluation": "-"}),
        LORA,
        loaded,
    ),
    Advice(
        {"model": "{init_from = 'adapter'}"},
        f"set lora = {ADAPTER} to train it on, or merge the adapter into its model",
        ({"lora": ADAPTER}, {"model": "{init_from = 'merged'}"}),
        "trainer/training/model.py",
        train_adapter,
    ),
    Advice(
        {"model.vocab_size": "256"},
        "set model.vocab_size = 408 or more",
        ({"model.vocab_size": "408"},),
        "trainer/training/step_reader.py",
        train,
    ),
    Advice(
        {"model": "{init_from = 'small'}"},
        "or with model.init_from use the tokenizer of that model, or set model.resize_vocabulary = true",
        ({"model": "{init_from = 'small', resize_vocabulary = true}"},),
        "trainer/training/step_reader.py",
        train,
    ),
    Advice(
        {"run.accept_changed": "['optimizer']", "optimizer.learning_rate": "1e30", "checkpoint.every": "9"},
        'set run.accept_changed = ["optimizer"] as well, or set run.on_nonfinite = "skip"',
        ({"optimizer.learning_rate": "1e-3"}, {"run.on_nonfinite": "'skip'"}),
        "trainer/run.py",
        train_on,
    ),
    Advice(
        {
            "run.accept_changed": "['optimizer']",
            "optimizer.learning_rate": "1e30",
            "run.on_nonfinite": "'skip'",
            "run.steps": "20",
        },
        'lower optimizer.learning_rate and set run.accept_changed = ["optimizer"]',
        ({"optimizer.learning_rate": "1e-3"},),
        "trainer/run.py",
        train_on,
    ),
    Advice(
        {"run.accept_changed": "['optimizer']", "optimizer.learning_rate": "1e39", "checkpoint.every": "1"},
        "that are not finite, and nothing is saved; lower optimizer.learning_rate, and once there is a checkpoint, set "
        'run.accept_changed = ["optimizer"] as well',
        ({"optimizer.learning_rate": "1e-3"},),
        "trainer/run.py",
        train_on,
    ),
    Advice(
        {"validation": f"{{sources = {HELD_OUT}, global_batches = 1, best_by = 1}}", "data.window": "1"},
        'set validation.best_by = "all", or name another source',
        (
            {"validation": f"{{sources = {HELD_OUT}, global_batches = 1, best_by = 'all'}}"},
            {"validation": f"{{sources = {HELD_OUT}, global_batches = 1, best_by = 0}}"},
        ),
        "trainer/training/validation.py",
        train,
    ),
    Advice(
        {"model": "{init_from = 'small'}", "lora": "{rank = 2}", "optimizer.kind": "'muon'"},
        'set optimizer.kind = "adamw", or remove [lora]',
        ({"optimizer.kind": "'adamw'"}, {"lora": "-"}),
        LORA,
        loaded,
    ),
    Advice(
        {"schedule.kind": "'wsd'"},
        'set decay to a number of steps such as 500, or to a share such as 0.1, or set kind = "constant" until',
        ({"schedule.decay": "1"}, {"schedule.decay": "0.1"}, {"schedule.kind": "'constant'"}),
        "trainer/training/schedule.py",
        loaded,
    ),
    Advice(
        {"schedule.kind": "'wsd'", "schedule.over": "'data'", "schedule.decay": "1", "run.epochs": "2"},
        'set decay to a share such as 0.1, or over = "steps"',
        ({"schedule.decay": "0.1"}, {"schedule.over": "'steps'"}),
        "trainer/training/schedule.py",
        loaded,
    ),
    Advice(
        {"schedule.decay": "1"},
        'remove them, or set kind = "wsd"',
        ({"schedule.decay": "-"}, {"schedule.kind": "'wsd'"}),
        "trainer/training/schedule.py",
        loaded,
    ),
    Advice(
        {
            "run.accept_changed": "['optimizer']",
            "optimizer.learning_rate": "1e30",
            "checkpoint.every": "9",
            "validation": "{sources = [{path = 'rows.jsonl'}], every = 1}",
        },
        'checkpoint, set run.accept_changed = ["optimizer"] as well',
        ({"run.accept_changed": "['optimizer']", "optimizer.learning_rate": "1e-3"},),
        "trainer/training/validation.py",
        train_on,
    ),
    Advice(
        {"data.shuffle": "true", "data.sources": STREAMED["data.sources"]},
        'set shuffle = "shards" to shuffle its',
        ({"data.shuffle": "'shards'"}, {"data.shuffle": "false"}),
    ),
    Advice({"data.capacity": "0"}, "capacity = 0 must be at least 1", ({"data.capacity": "256"},)),
    Advice(
        {"data.window": "10000000000"},
        "window = 10000000000 must be at most 131072",
        ({"data.window": "131072", "run.epochs": "1"},),
    ),
    Advice(
        {"data.sources": "[{path = 'rows.jsonl', repeat = 2.0}]"},
        "repeat needs data.epochs; set data.epochs",
        ({"run.epochs": "2"}, {"data.sources": "[{path = 'rows.jsonl', weight = 2.0}]"}),
    ),
    Advice(
        {"data.sources": "[{path = 'rows.jsonl', columns = {}}]"},
        "name at least one column, or leave columns out",
        (
            {"data.sources": "[{path = 'rows.jsonl', columns = {messages = 'messages'}}]"},
            {"data.sources": "[{path = 'rows.jsonl'}]"},
        ),
    ),
    Advice(
        {"data.sources": "[{path = 'rows.jsonl', split = 'train'}]"},
        "has no meaning; leave split out",
        ({"data.sources": "[{path = 'rows.jsonl'}]"},),
    ),
    Advice(
        {"data.sources": "[{path = 'saved', split = 'train'}]"},
        "leave out split = 'train'",
        ({"data.sources": "[{path = 'saved'}]"},),
    ),
    Advice(
        {"data.sources": "[{path = 'splits'}]"},
        "set split to one of 'a', 'b'",
        ({"data.sources": "[{path = 'splits', split = 'a'}]"}, {"data.sources": "[{path = 'splits', split = 'b'}]"}),
    ),
    Advice(
        {"data.sources": "[{path = 'empty'}]"},
        "name files in subdirectories by a glob, or set split",
        ({"data.sources": "[{path = 'empty/*/*.jsonl'}]"},),
    ),
    Advice({"data.streams": "1"}, "raise data.streams to 2 or more", ({"data.streams": "2"},)),
    Advice(
        {"data.tokenizer": "{path = 'words', template = 'name:nothing'}"},
        "give the path of a file: template = ",
        ({"data.tokenizer": "{path = 'words', template = 'chat.jinja'}"},),
    ),
    Advice(
        {"data.tokenizer": "{path = 'words', template = 'dated.jinja'}"},
        'set data.tokenizer.date = "',
        ({"data.tokenizer": "{path = 'words', template = 'dated.jinja', date = '2025-01-31'}"},),
    ),
    Advice({"run": "{device = 'cpu'}"}, "neither steps nor epochs is given", ({"run.steps": "3"}, {"run.epochs": "3"})),
    Advice(
        {"checkpoint.root": "''"},
        "name a directory or URL, or leave root out",
        ({"checkpoint.root": "'x'"}, {"checkpoint.root": "-"}),
    ),
    Advice(
        {"checkpoint.keep_best": "1"},
        "add a [validation] table",
        ({"validation": "{sources = [{path = 'rows.jsonl'}], every = 2}"},),
    ),
    Advice(
        {"schedule": "{kind = 'cosine', over = 'data'}"},
        'set run.epochs, or schedule.over = "steps"',
        ({"run.epochs": "2"}, {"schedule.over": "'steps'"}),
    ),
    Advice(
        {"schedule": "{kind = 'cosine', over = 'data', steps = 5}", "run.epochs": "2"},
        'remove steps, or set over = "steps"',
        ({"schedule": "{kind = 'cosine', over = 'data'}"}, {"schedule.over": "'steps'"}),
    ),
    Advice(
        {"schedule": "{kind = 'cosine'}", "run": "{device = 'cpu', epochs = 2}"},
        'set schedule.over = "data" or schedule.steps',
        ({"schedule.over": "'data'"}, {"schedule.steps": "9"}),
    ),
    Advice({"model.resize_vocabulary": "true"}, "set vocab_size instead", ({"model.resize_vocabulary": "-"},)),
    Advice({"data.epochs": "2"}, "data.epochs is set by run.epochs", ({"data.epochs": "-", "run.epochs": "2"},)),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets

    directory = tmp_path_factory.mktemp("remedies")
    tiny.save_tokenizer(directory / "words")
    (directory / "chat.jinja").write_text(tiny.TEMPLATE)
    (directory / "dated.jinja").write_text(tiny.DATED_TEMPLATE)
    tiny.write_jsonl(directory / "rows.jsonl", tiny.rows(40))
    (directory / "empty/inner").mkdir(parents=True)
    tiny.write_jsonl(directory / "empty/inner/rows.jsonl", tiny.rows(20))
    words = " ".join(tiny.WORDS)
    tiny.write_jsonl(directory / "long.jsonl", [*tiny.rows(3), tiny.chat(*[words] * 8)])
    tiny.write_jsonl(directory / "huge.jsonl", [*tiny.rows(3), tiny.chat(*[words] * 60)])
    said = {"role": "assistant", "content": "north", "reasoning_content": "because"}
    asked = {"role": "user", "content": "which"}
    tiny.write_jsonl(directory / "thoughts.jsonl", [{"messages": [asked, said, asked, said]}])
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    tiny.write_jsonl(directory / "tools.jsonl", [{**tiny.chat("which", "north", "again", "seven"), "tools": tools}])
    call = {"function": {"name": "look", "arguments": {"a": "river"}}}
    calling = {"role": "assistant", "content": "<think>because</think>north", "tool_calls": [call]}
    tiny.write_jsonl(directory / "calls.jsonl", [{"messages": [asked, calling]}])
    for name, template in (("forgets", FORGETS), ("moves", MOVES), ("calls", CALLS_FIRST)):
        (directory / f"{name}.jinja").write_text(template)
    save_letters(directory / "letters")
    export(tiny_llama.built(tiny_llama.CONFIG), tiny_llama.CONFIG, directory / "small")
    rows = datasets.Dataset.from_list(tiny.rows(20))
    rows.save_to_disk(str(directory / "saved"))
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(str(directory / "splits"))
    return directory


def save_letters(directory: Path) -> None:
    """Save a tokenizer that is not byte-level: a token for each letter."""
    tiny.save_tokenizer(directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = {chr(number): number for number in range(32, 127)} | {"\n": 0}
    letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    plain = json.loads(letters.to_str())
    plain["added_tokens"] = content["added_tokens"]
    (directory / "tokenizer.json").write_text(json.dumps(plain))


@pytest.mark.parametrize("advice", ADVICE, ids=[advice.message[:40] for advice in ADVICE])
def test_an_advice_that_is_followed_ends_the_error(place: Path, monkeypatch: Any, advice: Advice) -> None:
    monkeypatch.chdir(place)
    with pytest.raises((ValueError, CheckpointError, Refused), match=re.escape(advice.message)):
        advice.use(advice.broken)
    for remedy in advice.remedies:
        advice.use({**advice.broken, **remedy})


def test_the_automatic_backend_needs_no_fastokens(place: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(fast_tokenizer, "version", lambda: None)
    with pytest.raises(ValueError, match='run `pip install fastokens`, or set backend = "auto"'):
        start({"data.tokenizer": "{path = 'words', backend = 'fastokens'}"})
    start({"data.tokenizer": "{path = 'words', backend = 'auto'}"})


TABLES = "(?:run|data|model|schedule|optimizer|checkpoint|validation)"
NAMED = re.compile(
    rf"(?:\bset|\braise|\blower|\bleave out|\badd) (?:{TABLES}\.)?[a-z_]+(?:\.[a-z_]+)*(?: =| to| out)"
    rf"|\bset {TABLES}\.[a-z_.]+|\b(?:by|use) (?:ignore|columns|schedule\.over) =|\braise max_row_bytes"
)


TRIED_ELSEWHERE = [
    ("sftstream/tokenization/tokenizer.py", "set backend ="),  # test_the_automatic_backend_needs_no_fastokens
    ("trainer/checkpointing/snapshot.py", "set parallel.tp ="),  # test_adamw8bit.py
    ("trainer/training/adamw8bit.py", "set optimizer.kind ="),  # test_optimizer.py
    ("trainer/llama/attention.py", "set run.attention ="),  # test_attention.py
]


def advice_in_code() -> list[tuple[str, str]]:
    """Return each advice of a message that names a key, with the file of the message."""
    found = []
    for package in ORDER:
        for path in files(package).values():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Raise) and node.exc is not None:
                    texts = [
                        n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant) and type(n.value) is str
                    ]
                    relative = str(path).partition(f"/{package}/")[2]
                    found += [(f"{package}/{relative}", match[0]) for text in texts for match in NAMED.finditer(text)]
    return found


def test_every_advice_is_in_the_table() -> None:
    """An advice counts as tried if a message of the table, raised by the same file, has its words.

    The advice of `sftstream/integrations` names settings of other trainers; tests/integrations has its tests.
    """
    advised = Counter({found: n for found, n in Counter(advice_in_code()).items() if "/integrations/" not in found[0]})
    for advice in TRIED_ELSEWHERE:
        advised[advice] -= 1
    assert len(advised) > 20
    tried: Counter[tuple[str, str]] = Counter()
    for advice in ADVICE:
        for file, words in advised:
            tried[file, words] += advice.file in ("", file) and words in advice.message
    assert advised - tried == Counter()
