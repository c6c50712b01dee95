"""The commands at the end of a run, run as printed where the tool is installed."""

from __future__ import annotations

import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import runs

from checkpoints import ORIGIN, CheckpointStore
from trainer.config import TrainConfig
from trainer.config_file import parse_config
from trainer.serving import serving_lines


def config(tokenizer: str, **changes: dict[str, Any]) -> TrainConfig:
    return parse_config(runs.run_config(tokenizer, "rows.jsonl", **changes))


@pytest.mark.parametrize("name", ["plain", 'it\'s "$HOME" `ls` \\ a!'])
def test_transformers_answers_by_the_printed_command(
    tmp_path: Path, tokenizer: str, name: str, monkeypatch: Any
) -> None:
    data = runs.sources(tmp_path)
    output = runs.run(tmp_path, runs.run_config(tokenizer, data, run={"name": name, "steps": 2})).output()
    (line,) = (line for line in output.splitlines() if line.startswith("generate "))
    program, option, code = shlex.split(line.removeprefix("generate "))
    assert (program, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    answer = StringIO()
    with redirect_stdout(answer):
        exec(code, {})
    assert answer.getvalue().endswith("\n")
    store = CheckpointStore(tmp_path / "runs" / name / "checkpoints")
    command = shlex.join(["python", "-m", "trainer.main", str(tmp_path / "config0.toml")])
    assert store.values(2, ORIGIN) == {ORIGIN: {"command": command}}


def test_each_command_of_a_whole_model_names_its_directory(tokenizer: str) -> None:
    generate, *others = serving_lines(config(tokenizer, run={"name": "first"}), None)
    assert "'runs/first/export'" in generate
    assert others == [
        "serve    vllm serve runs/first/export --served-model-name first",
        "GGUF     python llama.cpp/convert_hf_to_gguf.py runs/first/export --outfile first.gguf",
        "publish  python -m checkpoints push runs/first ORGANISATION/NAME --license LICENSE",
    ]


def test_an_adapter_is_served_above_its_model_and_remote_checkpoints_are_published(tokenizer: str) -> None:
    given = {"model": {"init_from": "organisation/base"}, "lora": {"rank": 4}}
    table = runs.run_config(tokenizer, "rows.jsonl", run={"name": "a b"}, checkpoint={"root": "s3://bucket/a"}) | given
    _, *others = serving_lines(parse_config(table), "organisation/base")
    assert others == [
        "serve    vllm serve organisation/base --enable-lora --lora-modules 'a b=runs/a b/adapter' --max-lora-rank 4",
        "GGUF     python llama.cpp/convert_lora_to_gguf.py 'runs/a b/adapter' --outfile 'a b.gguf'",
        "publish  python -m checkpoints push s3://bucket/a ORGANISATION/NAME --license LICENSE",
    ]
