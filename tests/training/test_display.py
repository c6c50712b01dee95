"""What a person reads while a run trains: its first lines, its steps, and the way to go on."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import runs
from rich.console import Console
from test_metrics import STEP

from sftstream.pages.figures import duration
from trainer.config_file import parse_config
from trainer.opening import time_line
from trainer.reporting.display import Display
from trainer.reporting.metrics import StepMetrics
from trainer.reporting.pace import Pace

ROOT = Path(__file__).resolve().parents[2]


def steps(count: int, **changes: Any) -> Iterator[StepMetrics]:
    """The first step takes ten times as long as the others."""
    for number in range(1, count + 1):
        yield msgspec.structs.replace(STEP, step=number, seconds=1.0 if number == 1 else 0.1, **changes)


def shown(metrics: list[StepMetrics], seconds: float, total: int | None = 20, **settings: Any) -> list[str]:
    """Return the lines that a display prints of steps which end every `seconds` seconds."""
    times = iter(range(10**6))
    display = Display(quiet=False, clock=lambda: next(times) * seconds, **settings)
    display.console.file = io.StringIO()
    with display:
        for step in metrics:
            share = None if total is None else step.step / total
            display.step(step, share, last=step.step == total)
    return display.console.file.getvalue().splitlines()


def test_a_log_has_a_line_every_ten_seconds_with_all_facts() -> None:
    assert shown(list(steps(20)), 2.5) == [
        "step 1 | loss 2.5000 | rate 0.001 | 100 tokens/s | fill 90.0% | trained 40% | wait 1.0% | 5% done",
        "time     about 38 s left, by the pace of the first 5 steps",
        "step 5 | loss 2.5000 | rate 0.001 | 1,000 tokens/s | fill 90.0% | trained 40% | wait 10.0% | 25% done | 38 s left",
        "step 9 | loss 2.5000 | rate 0.001 | 1,000 tokens/s | fill 90.0% | trained 40% | wait 10.0% | 45% done | 28 s left",
        "step 13 | loss 2.5000 | rate 0.001 | 1,000 tokens/s | fill 90.0% | trained 40% | wait 10.0% | 65% done | 18 s left",
        "step 17 | loss 2.5000 | rate 0.001 | 1,000 tokens/s | fill 90.0% | trained 40% | wait 10.0% | 85% done | 8 s left",
        "step 20 | loss 2.5000 | rate 0.001 | 1,000 tokens/s | fill 90.0% | trained 40% | wait 10.0% | 100% done | 0 s left",
    ]


def test_fast_steps_print_the_time_of_the_whole_run_once() -> None:
    lines = shown(list(steps(100)), 1.0, 7200)
    assert [line for line in lines if line.startswith("time")] == [
        "time     about 1 h 59 min left, by the pace of the first 5 steps"
    ]


def test_a_gpu_adds_its_use_and_memory_and_a_validation_stays_shown() -> None:
    metrics = list(steps(3, mfu=0.5, peak_memory=12.25))
    metrics[1] = msgspec.structs.replace(metrics[1], validation_loss=1.25, mfu=0.25)
    assert shown(metrics, 10.0, None) == [
        "step 1 | loss 2.5000 | rate 0.001 | 100 tokens/s | MFU 50.0% | 12.2 GiB | fill 90.0% | trained 40% | wait 1.0%",
        "step 2 | validation loss 1.2500",
        "step 2 | loss 2.5000 | validation 1.2500 | rate 0.001 | 1,000 tokens/s | MFU 25.0% | 12.2 GiB | fill 90.0% | "
        "trained 40% | wait 10.0%",
        "step 3 | loss 2.5000 | validation 1.2500 | rate 0.001 | 1,000 tokens/s | MFU 37.5% | 12.2 GiB | fill 90.0% | "
        "trained 40% | wait 10.0%",
    ]


def test_programs_read_each_step_and_message_as_a_line_of_json() -> None:
    first, second = map(json.loads, shown(list(steps(2)), 1.0, 4, as_json=True))
    assert (first["step"], first["share_done"], first["seconds_left"]) == (1, 0.25, None)
    assert (second["step"], second["share_done"], second["seconds_left"]) == (2, 0.5, 2.0)
    assert second["batch_digest"] == "ab"
    display = Display(quiet=False, as_json=True)
    display.console.file = io.StringIO()
    display.say("a\x1b[2J \u202e [bold]")
    assert display.console.file.getvalue() == '{"message": "a\\u001b[2J \\u202e [bold]"}\n'


def test_a_loss_that_is_not_a_number_is_null_in_json() -> None:
    (line,) = shown(list(steps(1, loss=float("nan"), grad_norm=float("inf"), unapplied=True)), 1.0, as_json=True)
    read = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (read["loss"], read["grad_norm"], read["unapplied"]) == (None, None, True)


def test_the_validation_losses_of_the_first_sources_are_shown() -> None:
    losses = (1.0, None, *(2.0,) * 12)
    (first, _) = shown(list(steps(1, validation_loss=1.5, validation_loss_by_source=losses)), 1.0, None)
    listed = ", ".join(["source 0: 1.0000", *(f"source {n}: 2.0000" for n in range(2, 13))])
    assert first == f"step 1 | validation loss 1.5000 ({listed}, 1 more)"


def test_hostile_text_in_a_message_is_shown_and_not_run() -> None:
    display = Display(quiet=False)
    display.console.file = io.StringIO()
    display.say("a\x1b[2J [bold]b[/bold]")
    assert display.console.file.getvalue() == "a\\x1b[2J [bold]b[/bold]\n"


def test_the_time_left_counts_validations_and_leaves_the_first_step_out() -> None:
    pace = Pace()
    pace.add(0.1, 100.0)  # after a minute of compilation
    assert pace.left is None
    pace.add(0.2, 101.0)
    pace.add(0.3, 105.0)  # with a validation of three seconds
    assert pace.left == pytest.approx(0.7 * 5 / 0.2)


def test_a_terminal_shows_a_bar_and_all_facts_below() -> None:
    times = iter(range(100))
    display = Display(quiet=False, clock=lambda: float(next(times)))
    screen = io.StringIO()
    display.console = display._live.console = Console(file=screen, force_terminal=True, width=200, highlight=False)
    with display:
        for step in steps(3):
            display.step(step, step.step / 4, last=False)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    last = [line.strip() for line in plain.replace("\r", "\n").splitlines() if line.strip()][-2:]
    assert re.fullmatch(r"step 3 ━+[╸╺]?━+ 75% done \| 1 s left", last[0]), last
    assert last[1] == "loss 2.5000 | rate 0.001 | 1,000 tokens/s | fill 90.0% | trained 40% | wait 10.0%"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> tuple[Path, dict[str, Any], list[str]]:
    """Directory, config and output of a run of three steps that leaves "auto" settings."""
    directory = tmp_path_factory.mktemp("first")
    config = runs.run_config(
        tokenizer,
        Path(runs.sources(directory)).name,
        run={"steps": 3, "epochs": 1000, "weights_dtype": "float32"},
        data={"streams": "auto", "tokenizer": {"path": tokenizer}},
    )
    return directory, config, runs.run(directory, config).output().splitlines()


def test_the_first_lines_say_what_is_trained_from_where_and_what_was_chosen(
    first: tuple[Path, dict[str, Any], list[str]],
) -> None:
    _, _, lines = first
    assert lines[:8] == [
        "place    1 x CPU (dp 1 x tp 1); checkpoints every 2 steps in runs/run/checkpoints, result in runs/run/export",
        'compute  layers not compiled, attention "sdpa", float32 weights, computation in float32, recompute none, '
        "deterministic",
        "model    a Llama of 51,360 parameters from random weights, all trained",
        "data     62,000 conversations in all epochs of 1 source (dialogues.jsonl); trained roles: assistant",
        lines[4],
        "time     3 steps, each timed as the run goes; the time left is printed from step 5 on",
        "chosen   data.streams = 64, parallel.replicas = 1, parallel.reshard_after_forward = true, "
        'run.attention = "sdpa", run.compile = false, run.compute_dtype = "float32", '
        'run.recompute = "none" (left to "auto")',
        "run      runs/run: a new run, from step 1",
    ]
    assert re.fullmatch(
        r"packs    12 packs of 256 tokens in 3 steps, about [0-9.]+% full; 64 logical streams", lines[4]
    )
    assert re.match(r"step 1 \| loss [0-9.]+ \| rate 0\.01 \| [0-9,]+ tokens/s \| fill ", lines[8])


def test_a_gpu_of_known_peak_foresees_the_time_before_the_first_step(tmp_path: Path) -> None:
    shape = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False}
    changes = {"root": str(tmp_path), "weights_dtype": "float32", "recompute": "none"}
    table = runs.run_config(
        "words", "rows.jsonl", run=changes, data={"capacity": 8192, "global_batch": 64, "streams": 8}
    )
    config = parse_config(table | {"model": shape | heads})
    # 8 layers of 4 * 1024^2 + 3 * 1024 * 4096 weights and a head of 32000 * 1024, 6 operations for each and token
    operations = 6 * (8 * (4 * 1024**2 + 3 * 1024 * 4096) + 32000 * 1024) * 64 * 8192
    seconds = operations / (8 * 989e12 * 0.45)
    assert time_line(config, config.model.shape, 1000, 8, 989e12) == (
        f"time     about {duration(1000 * seconds)} for 1,000 steps, at 45% of 989 TFLOP/s on each GPU, "
        "compilation and validation not counted"
    )
    assert time_line(config, config.model.shape, None, 8, 989e12) == (
        "time     the end is not known in advance, since a source is streamed and run.steps is not set"
    )


def test_ctrl_c_on_a_terminal_saves_and_prints_how_to_go_on(first: tuple[Path, dict[str, Any], list[str]]) -> None:
    tmp_path, config, _ = first
    config = config | {"run": config["run"] | {"steps": 5000}}
    (tmp_path / "run.toml").write_text("".join(f"{name} = {runs.toml(table)}\n" for name, table in config.items()))
    terminal, inside = os.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.main", "run.toml"],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        cwd=tmp_path,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm", "CUDA_VISIBLE_DEVICES": ""},
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(inside)
    output, asked = b"", False
    while True:
        try:
            output += os.read(terminal, 65536)
        except OSError:  # the terminal closes at the end of the process
            break
        if not asked and re.search(rb"step ([5-9]|\d{2,}) ", output):  # frames leave out fast steps
            os.write(terminal, b"\x03")
            asked = True
    os.close(terminal)
    assert process.wait() == 75, output.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode()).replace("\r", "")
    assert re.search(r"time     about .* for [0-9,]+ steps, at [0-9.e-]+ s a step as before the resume", text)
    assert re.search(r"run      runs/run: resuming after step 3, \d+ conversations in", text)
    assert "stopping: the step is finished and a checkpoint saved first" in text
    assert re.search(r"step \d+ ━", text)
    assert re.search(r"loss \d\.\d{4} \| rate 0\.01 \| [\d,]+ tokens/s \| fill ", text)
    (end,) = re.findall(r"stopped after step \d+ and saved its checkpoint; go on with: (.*)", text)
    assert end == "python -m trainer.main run.toml"
