"""`python -m trainer.report`: figures, JSON, comparisons, errors, and nothing heavy imported."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from run_files import end, launch, step, write

from trainer.report.main import EXAMPLES, main

HOSTILE = "<script>document.title = 'owned'</script> \x1b[2J [red]x[/red] \u202egnp"


def two(directory: Path) -> tuple[Path, Path]:
    """Two runs that differ in the learning rate and the host."""
    runs = []
    for name, rate in (("first", 0.1), ("second", 0.2)):
        config = {"run": {"name": name, "steps": 4}, "optimizer": {"learning_rate": rate, "betas": [0.9, 0.95]}}
        events = [launch(0, 1000.0, config=config, environment={"host": name}), end(2, 1005.0, "complete")]
        runs.append(write(directory / name, [step(1), step(2, loss=rate)], events))
    return runs[0], runs[1]


def test_a_run_is_printed_and_its_page_is_written_into_the_run(tmp_path: Path) -> None:
    first, _ = two(tmp_path)
    result = run(main, first)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{first}: complete after step 2\n")
    assert "\nloss           0.1" in result.stdout
    assert "\nlaunch 1: steps 1 to 2, 1970-01-01 00:16:40 UTC, complete\n" in result.stdout
    assert result.stdout.endswith(f"wrote {first}/report.html, 0.0 MB; open it in a browser\n")
    assert (first / "report.html").read_text().startswith("<!doctype html>")


def test_runs_are_compared_with_the_settings_in_which_they_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two(tmp_path)
    third = write(tmp_path / "other" / "first", [step(1)])
    monkeypatch.chdir(tmp_path)
    result = run(main, first, second)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["loss", "0.1", "0.2"] in lines
    assert ["optimizer.learning_rate", "0.1", "0.2"] in lines
    assert ["host", "first", "second"] in lines
    assert "betas" not in result.stdout
    assert "data: no difference" in result.stdout
    assert result.stdout.endswith("wrote comparison.html, 0.0 MB; open it in a browser\n")
    page = (tmp_path / "comparison.html").read_text()
    assert page.count('<path d="') == page.count('class="line c0"') + page.count('class="line c1"')
    found = json.loads(run(main, first, second, third, "--json").stdout)
    assert found["names"] == [str(first), "second", str(third)]
    assert found["config"] == [{"name": "optimizer.learning_rate", "values": ["0.1", "0.2", None]}]
    assert found["facts"]["loss"] == ["0.1", "0.2", "3"]
    assert [one["curves"]["loss"]["mean"] for one in found["runs"]] == [[3.0, 0.1], [3.0, 0.2], [3.0]]


def test_json_is_the_only_output_and_writes_a_page_on_request_only(tmp_path: Path) -> None:
    first, _ = two(tmp_path)
    result = run(main, first, "--json")
    assert json.loads(result.stdout)["step"] == 2
    assert result.stdout.isascii()
    assert not (first / "report.html").exists()
    assert json.loads(run(main, first, "--json", "--html", tmp_path / "page.html").stdout)["name"] == "first"
    assert (tmp_path / "page.html").exists()


def test_hostile_text_changes_no_terminal(tmp_path: Path) -> None:
    config = {"run": {"name": HOSTILE}, HOSTILE: HOSTILE}
    events = [launch(0, 1000.0, config=config, environment={HOSTILE: HOSTILE}), end(1, 1005.0, f"error: {HOSTILE}")]
    lines = [step(1, refused=1, refused_by_reason={HOSTILE: 1}), HOSTILE + "\n"]
    refused = [{"step": 1, "place": HOSTILE, "reason": HOSTILE, "detail": HOSTILE}]
    hostile = write(tmp_path / HOSTILE.replace("/", "|"), lines, events, refused)
    other, _ = two(tmp_path)
    for words in ([hostile], [hostile, other, "--html", tmp_path / "page.html"], [hostile, "--json"]):
        result = run(main, *words)
        assert (result.exit_code, result.stderr) == (0, "")
        assert "\x1b" not in result.stdout
        assert "\u202e" not in result.stdout
    assert "\\x1b[2J [red]x[/red] \\u202egnp" in run(main, hostile).stdout


def test_an_example_of_the_help_runs_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    for example in EXAMPLES:
        result = run(main, *shlex.split(example.removeprefix("python -m trainer.report "), comments=True))
        assert (result.exit_code, result.stderr) == (0, "")


def test_errors_are_one_line_with_a_remedy(tmp_path: Path) -> None:
    first, _ = two(tmp_path)
    missing = run(main, tmp_path / "none")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert missing.stderr == (
        f"error: '{tmp_path}/none' does not exist; name the directory of a run, such as runs/first\n"
    )
    many = run(main, *[first] * 13, "--json")
    assert many.stderr == "error: 13 runs are too many for one page of curves; name at most 12\n"
    (first / "report.html").mkdir()
    (tmp_path / "file").touch()
    unwritten = run(main, first, "--html", tmp_path / "file" / "page.html")
    assert unwritten.stderr.startswith(f"error: the page '{tmp_path}/file/page.html' cannot be written: ")
    assert run(main).exit_code == 2
    assert run(main, first, "--nothing").exit_code == 2


HEAVY = {"torch", "torchdata", "transformers", "datasets", "pyarrow", "tensorboard", "tokenizers", "safetensors"}


def test_a_report_imports_neither_torch_nor_pyarrow(tmp_path: Path) -> None:
    first, _ = two(tmp_path)
    program = f"""
import sys
from contextlib import suppress
from trainer.report.main import EXAMPLES, main
with suppress(SystemExit):
    main(["{first}", "{first}", "--html", "/dev/null"])
print(*{{name.split(".")[0] for name in sys.modules}}, file=sys.stderr)
"""
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "complete after step 2" in ended.stdout
    assert "numpy" in ended.stderr.split()
    assert HEAVY.isdisjoint(ended.stderr.split())
