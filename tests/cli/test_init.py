"""`sftstream init`: a config for data of one's own, which runs as it is written."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers
from commands import run

from sftstream.cli.main import main
from trainer.config_file import load_config


def words_of(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("rows", "options", "layout"),
    [
        (tiny.rows(40), (), "messages"),
        ([{"instruction": f"what {n}", "output": "seven stones"} for n in range(40)], (), "instruction"),
        ([{"q": f"what {n}", "a": "seven"} for n in range(40)], ("prompt=q", "completion=a"), "prompt"),
        ([{"text": f"seven stones {n}"} for n in range(40)], (), "plain text"),
        ([*tiny.rows(30), *[{"messages": []}] * 10], (), "messages"),
    ],
    ids=["messages", "alpaca", "named columns", "plain text", "a quarter refused"],
)
def test_the_written_config_trains_as_it_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], options: tuple[str, ...], layout: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_jsonl(tmp_path / "chats.jsonl", rows)
    result = run(main, "init", "chats.jsonl", "--model", model, "--gpus", 0, *(f"--columns={o}" for o in options))
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.search(rf"^layout    {layout}", result.stdout, re.MULTILINE)
    config = load_config(Path("run.toml"), [])
    assert config.run.name == "chats"
    assert config.data.capacity <= 1024
    previewed = run(main, "preview", "run.toml", "--json")
    assert json.loads(previewed.stdout)["packs"][0]["tokens"] > 0


def test_the_next_commands_are_words_of_a_shell(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.rows(40))
    result = run(main, "init", "chats.jsonl", "--model", model, "--gpus", 0, "--out", "my run.toml")
    assert [shlex.split(line) for line in result.stdout.splitlines()[-3:]] == [
        ["sftstream", "preview", "my run.toml"],
        ["sftstream", "stats", "my run.toml"],
        ["torchrun", "-m", "trainer.main", "my run.toml"],
    ]


def test_the_text_and_the_json_tell_the_same_numbers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = [{"messages": [{"role": "oracle\x1b[2J", "content": "?"}]}]
    tiny.write_jsonl(tmp_path / "chats.jsonl", [*tiny.rows(60), *bad])
    printed = run(main, "init", "chats.jsonl", "--model", model).stdout
    found = json.loads(run(main, "init", "chats.jsonl", "--model", model, "--force", "--json").stdout)
    assert found["wrote"] == "run.toml"
    data, proposal = found["data"], found["proposal"]
    assert (data["rows"], data["sampled"], len(data["lengths"])) == (61, 61, 60)
    assert data["roles"] == {"user": 60, "assistant": 60}
    assert "\x1b" not in printed
    text = words_of(printed)
    assert "data chats.jsonl: 61 rows in 1 file, 61 sampled" in text
    assert "refused 1 of 61 sampled rows chats.jsonl:61: unknown role: " in text
    assert f"packs of {proposal['capacity']:,} tokens, {proposal['global_batch']} in a step" in text
    tables = tomllib.loads(Path("run.toml").read_text())
    assert tables["data"]["capacity"] == proposal["capacity"]
    assert proposal["capacity"] >= max(data["lengths"])


@pytest.mark.slow
def test_the_plan_of_the_trainer_chooses_the_parallelism(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.rows(60))
    found = json.loads(run(main, "init", "chats.jsonl", "--model", model, "--gpus", "2", "--json").stdout)
    assert found["hardware"] == {"gpus": 2, "memory": 80 * 10**9, "name": "2 GPUs of 80 GB"}
    assert found["proposal"]["tp"] == 1
    assert found["proposal"]["global_batch"] % 2 == 0
    assert 0 < found["plan"]["memory"] < 80 * 10**9
    assert found["plan"]["parameters"] == sum(
        p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(model).parameters()
    )


def test_a_model_without_a_chat_template_is_started_with_the_template_that_is_given(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.rows(40))
    (tmp_path / "chat.jinja").write_text(tiny.TEMPLATE)
    shutil.copytree(model, tmp_path / "base")
    tiny.save_tokenizer(tmp_path / "base", template=None)
    (tmp_path / "base/chat_template.jinja").unlink(missing_ok=True)
    words = ("init", "chats.jsonl", "--model", "base", "--gpus", 0)
    refused = run(main, *words)
    assert refused.stderr == (
        "error: tokenizer 'base' has no chat template; give the path of a file: --template chat.jinja\n"
    )
    assert not (tmp_path / "run.toml").exists()
    result = run(main, *words, "--template", "chat.jinja")
    assert (result.exit_code, result.stderr) == (0, "")
    assert tomllib.loads(Path("run.toml").read_text())["data"]["tokenizer"] == {
        "path": "base",
        "template": "chat.jinja",
    }
    previewed = run(main, "preview", "run.toml", "--json")
    assert json.loads(previewed.stdout)["packs"][0]["tokens"] > 0
    trained = trained_steps(["run.device=cpu", "run.steps=1"])
    assert trained == [1]


def trained_steps(changes: list[str]) -> list[int]:
    """Run run.toml, and return the steps in its metrics."""
    command = [sys.executable, "-m", "trainer.main", "run.toml", *changes]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=300)
    return [json.loads(line)["step"] for line in Path("runs/chats/metrics.jsonl").read_text().splitlines()]


def test_an_existing_config_is_not_replaced(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("mine")
    result = run(main, "init", "chats.jsonl", "--model", model)
    assert result.stderr == "error: run.toml exists; give another --out, or replace it with --force\n"
    assert (tmp_path / "run.toml").read_text() == "mine"


def test_data_without_a_trainable_row_is_an_error_that_shows_the_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_jsonl(tmp_path / "chats.jsonl", [{"q": "what", "a": "seven"}] * 3)
    result = run(main, "init", "chats.jsonl", "--model", model)
    assert result.exit_code == 1
    assert "the first of 3 sampled rows: chats.jsonl:" in result.stderr
    assert "--columns prompt=COLUMN" in result.stderr
    assert not (tmp_path / "run.toml").exists()
    assert "is not NAME=COLUMN" in run(main, "init", "chats.jsonl", "--model", model, "--columns", "q").stderr
    assert (
        "--roles 'q=me' is not NAME=ROLE with a role of system, user,"
        in run(main, "init", "chats.jsonl", "--model", model, "--roles", "q=me").stderr
    )


THINKS = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{% if m.reasoning_content %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)
CALL = {"role": "invoke", "content": '{"name": "what", "arguments": {}}'}


@pytest.mark.parametrize(
    ("row", "advised", "options"),
    [
        ({**tiny.rows(1)[0], "background": "It rains."}, "ignore = ['background']", ["--ignore", "background"]),
        (
            {"messages": [{**message, "thoughts": "seven"} for message in tiny.rows(1)[0]["messages"]]},
            "ignore = ['messages[].thoughts']",
            ["--ignore", "messages[].thoughts"],
        ),
        ({"messages": [{"role": "narrator", "content": "what"}, CALL]}, "roles = {...} adds names, 'tool_call'", []),
        (
            {"Question": "what", "Complex_CoT": "stones", "Response": "seven"},
            "--columns question=Question --columns response=Response --columns reasoning=Complex_CoT",
            [f"--columns={pair}" for pair in ("question=Question", "response=Response", "reasoning=Complex_CoT")]
            + ["--template", "thinks.jinja"],
        ),
    ],
)
def test_an_advice_of_init_is_followed_by_its_options(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Any, advised: str, options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("thinks.jinja").write_text(THINKS)
    tiny.write_jsonl(tmp_path / "chats.jsonl", [row] * 40)
    init = ["init", "chats.jsonl", "--model", str(model), "--gpus", "0"]
    assert advised in run(main, *init).stderr
    followed = run(main, *init, *(options or ["--roles", "narrator=user", "--roles", "invoke=tool_call"]))
    assert (followed.exit_code, followed.stderr) == (0, "")
    assert "refused   0 of 40 sampled rows" in followed.stdout
    assert json.loads(run(main, "preview", "run.toml", "--json").stdout)["packs"][0]["tokens"] > 0


def test_the_options_of_a_config_are_named_below_refused_rows(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_jsonl(tmp_path / "chats.jsonl", [*tiny.rows(30), {**tiny.rows(1)[0], "background": "seven " * 99}])
    printed = run(main, "init", "chats.jsonl", "--model", model).stdout
    assert "leave the column out by ignore = ['background']" in printed
    assert "options of init: --columns NAME=COLUMN, --ignore NAME, --roles NAME=ROLE" in printed
