"""The `sftstream` command as a person types it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import typer
from commands import run

from sftstream.cli.main import app, main

COMMANDS = typer.main.get_command(app).commands


def test_a_template_is_reported_in_one_table(tokenizer: str) -> None:
    result = run(main, "template", tokenizer)
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "a turn ends with <|eot_id|>" in lines
    assert "earlier turns printed unchanged" in lines
    assert "two tool calls printed whole" in lines
    assert "reasoning drops assistant reasoning" in lines


def test_another_template_and_date_can_be_reported(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "dated.jinja").write_text(tiny.DATED_TEMPLATE)
    result = run(main, "template", tokenizer, tmp_path / "dated.jinja", "--date", "2025-01-31")
    assert "printed, as 2025-01-31" in " ".join(result.stdout.split())


def test_an_error_is_one_line_on_stderr_and_exit_code_1(tokenizer: str) -> None:
    program = "from sftstream.cli.main import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", program, "template", tokenizer, "nowhere.jinja"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr == (
        "error: chat template 'nowhere.jinja' cannot be read: No such file or directory; give a file or the Jinja text\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *[
            (
                words,
                "error: '{}/nowhere' does not exist; name a JSON file with a state dict, a directory such as "
                "runs/my-run, or a checkpoint such as runs/my-run/checkpoints/step-00000100\n",
            )
            for words in [
                ("inspect", "{}/nowhere"),
                ("diff", "{}/nowhere", "{}"),
                ("rebase", "{}/nowhere", "{}/run.toml", "{}/new.json"),
                ("preview", "{}/run.toml", "--state", "{}/nowhere"),
            ]
        ],
        *[
            (
                (verb, f"{{}}/{name}", *options),
                f"error: '{{}}/{name}' {there}; name the directory of a run, such as runs/my-run\n",
            )
            for name, there in [("nowhere", "does not exist"), ("run.toml", "is not a directory")]
            for verb, *options in [("audit",), ("trace", "--step", "1"), ("find", "--source", "0", "--row", "0")]
        ],
        (
            ("audit", "{}"),
            "error: {} has no ledger; name the directory of a run, such as runs/my-run, made by this version\n",
        ),
        (("bench", "{}/nowhere.toml"), "error: config '{}/nowhere.toml' cannot be read: No such file or directory\n"),
        (
            ("diff", "{}", "{}"),
            "error: {} holds no checkpoint and no state; name a JSON file with a state dict, a directory such as "
            "runs/my-run, or a checkpoint such as runs/my-run/checkpoints/step-00000100\n",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "run.toml").write_text(
        "[data]\nstreams = 2\nsources = [{path = 'a.jsonl'}]\ntokenizer = {path = 'b'}\n"
    )
    result = run(main, *(argument.format(tmp_path) for argument in arguments))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == message.format(tmp_path)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[run]\n", "error: config '{}' has no [data] table; name the TOML file of a run\n"),
        ("run\n", "error: config '{}' is not TOML: "),
        ("[data]\nstreams = '2'\n", "error: config '{}': the [data] table is not valid: "),
    ],
)
def test_a_config_without_a_valid_data_table_is_named(tmp_path: Path, toml: str, message: str) -> None:
    config = tmp_path / "run.toml"
    config.write_text(toml)
    assert run(main, "bench", config).stderr.startswith(message.format(config))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_prints_every_word_of_the_help_texts(name: str) -> None:
    """Markup would take [data] for a style and print nothing."""
    command = COMMANDS[name]
    printed = " ".join(run(main, name, "--help").stdout.split())
    for text in (command.help, *(parameter.help for parameter in command.params if parameter.name != "help")):
        assert text, f"a parameter of {name} has no help text"
        assert " ".join(text.split()) in printed


def test_a_help_text_names_the_table_of_the_config_in_brackets() -> None:
    texts = [parameter.help for command in COMMANDS.values() for parameter in command.params]
    assert {name for text in texts for name in re.findall(r"\[\w+\]", text)} == {"[data]"}


def test_a_config_is_measured_stage_by_stage(tokenizer: str, tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "rows.jsonl", [*tiny.rows(40), {"messages": []}])
    config = tmp_path / "run.toml"
    config.write_text(
        f"""
[data]
streams = 2
global_batch = 2
capacity = 128
workers = 1
[data.tokenizer]
path = {tokenizer!r}
[[data.sources]]
path = "{tmp_path}/rows.jsonl"
"""
    )
    result = run(main, "bench", config, "--seconds", "0.2")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    speeds = [line for line in lines if line[:1] == ["│"] and line[1] in ("0", "1")]
    assert [line[1] for line in speeds] == ["0", "1"]
    stages = [line[1] for line in lines if line[:1] == ["│"] and len(line) > 5 and line[5].endswith("%")]
    assert stages == ["draw", "load", "template", "tokenize", "pack"]
    shares = [
        int(line[5].rstrip("%")) for line in lines if line[:1] == ["│"] and len(line) > 5 and line[5].endswith("%")
    ]
    assert 95 <= sum(shares) <= 105
    assert any(" ".join(line).startswith("refused, empty conversation:") for line in lines)
