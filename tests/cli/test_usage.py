"""Every verb of `sftstream`: help, examples, completion, version, and `--json`."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from commands import run

import sftstream
from checkpoints.cli import usage as checkpoints_usage
from checkpoints.cli.main import main as checkpoints_main
from sftstream.cli.main import app, main
from sftstream.cli.usage import USAGE

VERBS = typer.main.get_command(app).commands


LIBRARIES = {
    *("torch", "torchdata", "transformers", "huggingface_hub", "datasets", "pyarrow", "fsspec", "safetensors"),
    *("msgspec", "numpy", "xxhash", "jinja2", "rich", "tensorboard", "tokenizers"),
}
"""Packages that the project imports, besides typer."""


COMMANDS = (
    "sftstream.cli.main",
    "checkpoints.cli.main",
    "trainer.main",
    "trainer.parity",
    "trainer.report.main",
    "trainer.track.main",
)
"""Modules of the commands, each with `app` and `main`."""


@pytest.mark.parametrize("module", COMMANDS)
def test_printing_the_help_of_every_verb_imports_no_library_but_typer(module: str) -> None:
    program = f"""
import sys
from contextlib import suppress
from {module} import app, main
import typer
verbs = sorted(getattr(typer.main.get_command(app), "commands", {{}}))
for words in [["--help"], ["--version"], *([verb, "--help"] for verb in verbs)]:
    with suppress(SystemExit):
        main(words)
print(*verbs, file=sys.stderr)
print(*{{name.split(".")[0] for name in sys.modules}}, file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    verbs, imported = map(str.split, ended.stderr.split("\n")[:2])
    package = module.partition(".")[0]
    assert all(re.search(rf"^Usage: .*{package} {verb} ", ended.stdout, re.MULTILINE) for verb in verbs)
    assert f"\nsftstream {sftstream.__version__}\n" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
    assert LIBRARIES.isdisjoint(imported)


def test_every_verb_has_a_usage_and_no_usage_is_left_over() -> None:
    assert sorted(VERBS) == sorted(USAGE)


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_shows_its_examples_exit_codes_and_json(verb: str) -> None:
    printed = run(main, verb, "--help").stdout
    for example in USAGE[verb].examples:
        assert f"\n    {example}\n" in printed
    assert re.search(r"\n    0  .*\n    1  .*\n    2  ", printed)
    assert "--json" in printed


SLOW = ("verify-resume-0", "init-1")
"""Examples that start a training run or the trainer's estimate; other tests cover the verbs."""


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(example, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for verb, usage in USAGE.items()
        for number, example in enumerate(usage.examples)
        for name in [f"{verb}-{number}"]
    ],
)
def test_an_example_of_a_help_runs_as_it_is(desk: Path, example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    program, *words = shlex.split(example, comments=True)
    assert program == "sftstream"
    before = set(desk.iterdir())
    result = run(main, *words)
    for path in set(desk.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    differs = words[0] == "diff"
    assert (result.exit_code, result.stderr) == (int(differs), "")
    assert result.stdout


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("template model", {"a turn ends with", "shapes"}),
        ("bench run.toml --seconds 0.05", {"loaders", "stages"}),
        ("rebase state.json run.toml /dev/null", {"packs", "sources", "streams", "identity"}),
        ("audit runs/first", {"sessions", "proved", "differences", "not_shown"}),
        ("audit runs/first runs/first", {"equal_steps", "difference"}),
        ("find runs/first --source 0 --row 4", {"uses", "refusals"}),
    ],
)
def test_a_verb_prints_one_json_document_of_ascii(
    desk: Path, monkeypatch: pytest.MonkeyPatch, line: str, keys: set[str]
) -> None:
    monkeypatch.chdir(desk)
    result = run(main, *line.split(), "--json")
    assert result.exit_code == 0
    assert keys <= json.loads(result.stdout).keys()
    assert result.stdout.isascii()


def test_the_json_of_a_traced_step_holds_its_conversations(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    found = json.loads(run(main, "trace", "runs/first", "--step", "2", "--json").stdout)["conversations"]
    assert {conversation["pack"] for conversation in found} == {0, 1}
    assert all(conversation["conversation"]["messages"][0]["role"] == "user" for conversation in found)


def test_the_version_is_that_of_the_package() -> None:
    assert run(main, "--version").stdout == f"sftstream {sftstream.__version__}\n"


def test_a_command_without_arguments_prints_the_verbs() -> None:
    result = run(main)
    assert result.exit_code == 2
    printed = result.stderr
    assert all(f"\n  {verb} " in printed for verb in VERBS)


@pytest.mark.parametrize("module", COMMANDS[1:])
def test_the_help_of_every_command_has_examples_exit_codes_and_json(module: str) -> None:
    found = importlib.import_module(module)
    verbs = getattr(typer.main.get_command(found.app), "commands", {"": None})
    for verb in verbs:
        printed = run(found.main, *verb.split(), "--help").stdout
        assert re.search(r"\n  Examples:\n    (python|torchrun) ", printed), verb
        assert re.search(r"\n    0 +\S.*\n    1 +\S.*\n    2 +\S", printed), verb
        assert "--json" in printed, verb


def test_the_examples_of_checkpoints_run_as_they_are(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(desk / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    for verb, usage in checkpoints_usage.USAGE.items():
        for example in usage.examples if verb != "push" else ():  # test_push.py pushes to a hub
            words = shlex.split(example, comments=True)
            assert words[:4] == ["python", "-m", "checkpoints", verb]
            if ">" not in words and "--best" not in words:  # the run has no validation
                assert run(checkpoints_main, *words[3:])[0::2] == (0, ""), example


def test_verbs_and_options_are_completed_by_a_shell() -> None:
    def completed(line: str, module: str = "sftstream.cli.main") -> list[str]:
        words = line.split(" ")
        environment = os.environ | {
            f"_{words[0].upper().replace('-', '_')}_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        }
        program = f"import sys; sys.argv[0] = {words[0]!r}; from {module} import main; main()"
        ended = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120, env=environment
        )
        return ended.stdout.split()

    assert completed("sftstream ins") == ["inspect"]
    assert "--accept" in completed("sftstream rebase --a")
    assert completed("sftstream-checkpoints pr", "checkpoints.cli.main") == ["prune"]
    assert completed("sftstream-train run.toml --pl", "trainer.main") == ["--plan"]
    assert completed("sftstream-report runs/first --ht", "trainer.report.main") == ["--html"]
    assert completed("sftstream-parity model --dt", "trainer.parity") == ["--dtype"]
    assert completed("sftstream-report runs/first --ht", "trainer.report.main") == ["--html"]


def test_an_unknown_option_is_exit_code_2(desk: Path) -> None:
    assert run(main, "inspect", desk, "--nothing").exit_code == 2
