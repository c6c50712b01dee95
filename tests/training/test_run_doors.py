"""The command line and the config turn every input into a config or into one line."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny

from trainer.config_file import load_config, parse_config
from trainer.main import main
from trainer.process import command_line

SEED = int(os.environ.get("SFTSTREAM_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
DRAWS = int(os.environ.get("SFTSTREAM_DRAWS", "400"))


class Panic(BaseException):
    """A panic of a Rust library."""


@pytest.fixture
def config(tmp_path: Path, tokenizer: str) -> dict[str, Any]:
    return runs.run_config(tokenizer, tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(3)))


def written(directory: Path, config: dict[str, Any]) -> Path:
    path = directory / "run.toml"
    path.write_text("".join(f"{name} = {runs.toml(table)}\n" for name, table in config.items()), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", [KeyError, RecursionError, MemoryError, NotImplementedError, Panic])
def test_an_unexpected_error_is_one_line_that_names_the_config(
    tmp_path: Path,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: Any,
) -> None:
    def broken(*_: object, **__: object) -> bool:
        raise kind("first line\n\x1b[2Jsecond")

    monkeypatch.setattr("trainer.run.run", broken)
    path = written(tmp_path, config)
    assert main([str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: {kind.__name__}: ")
    assert line.endswith("; --debug or LOGLEVEL=DEBUG shows the traceback")
    assert "\x1b" not in line


def test_ctrl_c_outside_of_the_training_is_one_line_with_the_command(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.run.run", interrupted)
    path = written(tmp_path, config)
    assert main([str(path), "run.name=a b"]) == 130
    assert capsys.readouterr().err == f"\ninterrupted; go on with: python -m trainer.main {path} 'run.name=a b'\n"
    monkeypatch.setenv("RANK", "1")  # the other ranks are silent
    assert main([str(path)]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({}, "python -m trainer.main a.toml 'b=c d'"),
        ({"LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"}, "torchrun -m trainer.main a.toml 'b=c d'"),
        (
            {"LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"},
            "torchrun --nproc-per-node 8 -m trainer.main a.toml 'b=c d'",
        ),
        (
            {"LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"},
            "torchrun --nnodes 2 ... --nproc-per-node 8 -m trainer.main a.toml 'b=c d'",
        ),
    ],
)
def test_the_command_that_goes_on_starts_as_many_processes(
    environment: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | ({"TORCHELASTIC_RUN_ID": "x"} if environment else {})).items():
        monkeypatch.setenv(name, value)
    assert command_line("trainer.main", ["a.toml", "b=c d"]) == line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"x = {'[' * 100_000}", "is nested too deeply"),
        (f"x = {'{a = ' * 3000}1{'}' * 3000}", "is nested too deeply"),
        (f"x = {'9' * 5000}", "is not TOML"),
        ("x = '\udcff'", "is not TOML"),
        ("[run]\nname = 'a'\n[run]\n", "is not TOML"),
    ],
    ids=["lists", "tables", "digits", "bytes", "twice"],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "model.hidden_size=2147483648",
        "model.intermediate_size=2147483648",
        "model.vocab_size=4294967296",
        "model.num_hidden_layers=1000000000",
        "model.num_attention_heads=1073741824",
        "model.head_dim=1073741824",
        "parallel.tp=1000000000000",
        "parallel.replicas=1000000000000",
        "run.steps=10000000000000",
        "run.epochs=10000000000000",
        "schedule={warmup=10000000000000}",
        "schedule={steps=10000000000000, kind='cosine'}",
        "run.root='~nosuch-user/runs'",
        'run.root="a\\u0000b"',
        'run.name="a\\u0000b"',
        'checkpoint.root="a\\u001b"',
        "checkpoint.root='~nosuch-user/runs'",
        "parallel.timeout='1001d'",
        "run.stop_after='99999999999h'",
        "model.head_dim=-2",
        "optimizer.eps=inf",
    ],
)
def test_a_size_or_place_out_of_bounds_is_refused_before_anything_is_made(
    tmp_path: Path, config: dict[str, Any], override: str
) -> None:
    path = written(tmp_path, config)
    with pytest.raises(ValueError, match=override.split("=")[0].split(".")[-1]) as error:
        load_config(path, [override])
    assert str(error.value).isprintable()


def test_any_config_is_read_or_refused_in_one_line(tmp_path: Path, config: dict[str, Any]) -> None:
    print(f"SFTSTREAM_SEED={SEED}")
    draw = random.Random(SEED)
    lines = [f"{table}.{key}={runs.toml(value)}" for table, keys in config.items() for key, value in keys.items()]
    path = written(tmp_path, config)
    for _ in range(DRAWS):
        overrides = [_damaged(draw.choice(lines), draw) for _ in range(draw.randint(1, 3))]
        with suppress(ValueError):
            load_config(path, overrides)


def _damaged(text: str, draw: random.Random) -> str:
    key, _, value = text.partition("=")
    values = [
        "-1",
        "0",
        "1e400",
        "nan",
        "[]",
        "{}",
        "'\u0000'",
        "''",
        "[" * 5000,
        "9" * 5000,
        "true",
        "1979-05-27",
        value,
    ]
    match draw.randrange(4):
        case 0:
            return f"{key}={draw.choice(values)}"
        case 1:
            return f"{key}.{draw.choice(['0', 'x', '', '99', '-1'])}={draw.choice(values)}"
        case 2:
            cut = draw.randrange(len(text))
            return text[:cut] + draw.choice("=.[]{}\"'\\\n\x00é") + text[cut:]
        case _:
            return text[: draw.randrange(len(text))]


def test_a_value_nested_deeply_is_refused(config: dict[str, Any]) -> None:
    deep: Any = "x"
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(ValueError, match="data"):
        parse_config(config | {"data": config["data"] | {"train_on": deep}})


def test_a_crash_of_native_code_prints_the_stack_of_each_thread(tmp_path: Path, config: dict[str, Any]) -> None:
    config["run"]["steps"] = 100_000
    job = runs.Job(tmp_path, config)
    runs.wait_for(lambda: (tmp_path / "runs/run/metrics.jsonl").exists(), job)
    job.signal(signal.SIGSEGV)
    assert job.finish() == -signal.SIGSEGV
    assert re.search(r"Fatal Python error: Segmentation fault\n(.*\n)*  File .*trainer/main.py", job.output())


def test_config_and_output_are_utf_8_in_any_locale(tmp_path: Path, config: dict[str, Any]) -> None:
    config["data"]["sources"] = [{"path": "données.jsonl"}]
    path = written(tmp_path, config)
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-m", "trainer.main", str(path)]
    done = subprocess.run(words, capture_output=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "error: source 'données.jsonl' matches no file" in done.stderr.decode("utf-8")
