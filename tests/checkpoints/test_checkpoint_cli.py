"""The command line `python -m checkpoints`, on the checkpoints of a run."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from safetensors.torch import load_file

from checkpoints import RECIPE, About, CheckpointStore, CorruptCheckpoint, Recipe, Retention, Rows
from checkpoints.cli.main import main
from checkpoints.model.export import parse_recipe
from sftstream import __version__


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    """The directory of a run on two tensor-parallel ranks, with checkpoints of steps 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("run")
    config = runs.run_config(tokenizer, runs.sources(directory), run={"steps": 6}, parallel={"tp": 2})
    runs.run(directory, config, 2)
    return directory / "runs" / "run"


@pytest.fixture
def root(run: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoints of the run."""
    return Path(shutil.copytree(run / "checkpoints", tmp_path / "checkpoints"))


def call(*words: object) -> tuple[int, list[str]]:
    """Run a command; return the exit code and the lines of both outputs, with single spaces."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
    code = ended.value.code
    if isinstance(code, str):  # The interpreter prints a text to stderr and exits with 1.
        output.write(code)
        code = 1
    return code or 0, [" ".join(line.split()) for line in output.getvalue().splitlines()]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_steps_are_listed_with_their_sizes(root):
    (root / "step-00000004" / "manifest.json").write_bytes(b"")
    code, lines = call("list", root)
    assert code == 0
    assert lines[0] == "step saved size ranks tensors validation loss"
    step, _, _, size, unit, ranks, tensors = lines[1].split(" ")
    assert (step, unit, ranks, tensors) == ("2", "kB", "2", "60")
    assert 500 < float(size) < 1500
    assert lines[2].startswith("6 ")
    assert lines[3].startswith("step 4 is damaged: ")


def test_verify_reads_every_byte_of_all_steps_or_of_one(root):
    assert call("verify", root) == (0, [f"step {step}: whole, 4 files" for step in (2, 4, 6)])
    damage(root / "step-00000004" / "rank00001.safetensors")
    code, lines = call("verify", root)
    assert (code, len(lines), lines[0], lines[2]) == (1, 3, "step 2: whole, 4 files", "step 6: whole, 4 files")
    assert lines[1].startswith("step 4: DAMAGED: ")
    assert "rank00001.safetensors does not match its SHA-256" in lines[1]
    assert call("verify", root / "step-00000004")[0] == 1
    assert call("verify", root / "step-00000006")[0] == 0


def test_inspect_says_how_far_the_run_was_and_what_is_in_the_step(run):
    step = run / "checkpoints" / "step-00000006"
    code, short = call("inspect", step)
    assert code == 0
    assert any(re.fullmatch(r"settings \d+ entries; --all prints them", line) for line in short)
    assert len(short) < 40
    code, lines = call("inspect", step, "--all")
    assert code == 0
    assert {line for line in short if "--all" not in line} <= set(lines)
    assert lines[0] == "step 6, written by 2 ranks"
    assert "mesh dp 1, tp 2, replicas 1" in lines
    assert any(f"versions sftstream {__version__}, torch {torch.__version__}, torchdata" in line for line in lines)
    config, data = (re.compile(rf"digest of {name} [0-9a-f]{{64}}") for name in ("config", "data"))
    assert [sum(map(bool, map(digest.fullmatch, lines))) for digest in (config, data)] == [1, 1]
    metrics = runs.metrics(run.parents[1])[-1]
    for line in ("progress.step 6", f"progress.loss {metrics['loss']!r}", f"progress.rows {metrics['rows']}"):
        assert line in lines
    assert "settings.model.hidden_size 32" in lines
    assert "data/run.packs 24" in lines
    assert any(line.startswith("tensors of model ") for line in lines)
    assert any(line.startswith("data/stream/ 8 values, ") for line in lines)
    assert any(line.startswith("export ") for line in lines)


def test_prune_keeps_the_newest_undamaged_step(root):
    for newest in (4, 6):
        damage(root / f"step-0000000{newest}" / "rank00000.safetensors")
    assert call("prune", root, "--keep", 1)[1][-1] == "deleted nothing; [2, 4, 6] stay"


def test_prune_keeps_the_newest_steps_and_multiples(root):
    assert call("prune", root, "--keep", 1, "--keep-every", 4)[1] == ["deleted [2]; [4, 6] stay"]
    assert call("prune", root, "--keep", 1)[1] == ["deleted [4]; [6] stay"]


def test_prune_keeps_the_steps_of_the_lowest_validation_loss(tmp_path):
    with CheckpointStore(tmp_path, Retention(keep=9)) as store:
        for step, loss in ((1, 2.5), (2, 0.5), (3, 1.5), (4, None)):
            store.save(step, {"w": torch.ones(1)}, about=About(validation_loss=loss))
    assert [line.split()[-1] for line in call("list", tmp_path)[1][1:]] == ["2.5000", "0.5000", "1.5000", "1"]
    assert call("prune", tmp_path, "--keep", 1, "--keep-best", 1)[1] == ["deleted [1, 3]; [2, 4] stay"]
    assert "validation loss 0.5" in call("inspect", tmp_path / "step-00000002")[1]


def test_prune_does_nothing_while_a_run_has_the_directory(root):
    with CheckpointStore(root) as store:
        store.claim()
        code, lines = call("prune", root, "--keep", 1)
        assert code == 1
        assert f"in use by process {os.getpid()} " in lines[0]
        assert store.steps() == [2, 4, 6]
        assert call("list", root)[0] == call("verify", root)[0] == 0


def test_the_export_of_a_step_is_the_export_of_the_run_byte_by_byte(run, tmp_path):
    out = tmp_path / "new" / "model"
    assert call("export", run / "checkpoints" / "step-00000006", out) == (0, [f"exported step 6 to {out}"])
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= files.keys()
    code, lines = call("export", run / "checkpoints" / "step-00000006", out)
    assert (code, lines) == (1, [f"error: {out} exists already; export to another directory, or move it away"])


def test_transformers_loads_a_model_in_several_files(run, tmp_path):
    from transformers import AutoModelForCausalLM

    CheckpointStore(run / "checkpoints").export(6, tmp_path / "out", file_bytes=40_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(run / "export").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_every_verb_takes_the_directory_of_a_run_and_prints_json(run, tmp_path):
    copied = Path(shutil.copytree(run, tmp_path / "run"))

    def document(*words: object) -> Any:
        code, lines = call(*words, "--json")
        text = "\n".join(lines)
        assert text.isascii()
        return code, json.loads(text)

    code, steps = document("list", copied)
    assert (code, [step["step"] for step in steps]) == (0, [2, 4, 6])
    assert steps[0]["damage"] is None
    assert (steps[0]["ranks"], steps[0]["tensors"], steps[0]["validation_loss"]) == (2, 60, None)
    assert document("verify", copied) == (0, [{"step": step, "damage": None} for step in (2, 4, 6)])
    newest = document("inspect", copied)[1]
    assert (newest["step"], newest["values"]["progress"]["step"]) == (6, 6)
    assert newest["values"]["settings"]["model"]["hidden_size"] == 32
    assert newest["files"].keys() == {f"rank0000{r}.{kind}" for r in (0, 1) for kind in ("safetensors", "values")}
    values = document("values", copied, "--prefix", "progress")[1]
    assert (values["step"], values["values"].keys()) == (6, {"progress"})
    out = tmp_path / "out"
    assert document("export", copied, out) == (0, {"step": 6, "out": str(out)})
    damage(copied / "checkpoints/step-00000006/rank00000.safetensors")
    code, verdict = document("verify", copied)
    assert (code, [bool(step["damage"]) for step in verdict]) == (1, [False, False, True])
    assert call("export", copied, tmp_path / "older") == (0, [f"exported step 4 to {tmp_path / 'older'}"])
    assert document("prune", copied, "--keep", 1) == (0, {"deleted": [2], "kept": [4, 6]})


def test_a_damaged_step_is_not_exported(root, tmp_path):
    damage(root / "step-00000006" / "rank00000.safetensors")
    code, lines = call("export", root / "step-00000006", tmp_path / "out")
    assert code == 1
    assert "does not match its SHA-256" in lines[0]
    assert os.listdir(tmp_path) == ["checkpoints"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("list", "nowhere"), "error: nowhere holds no steps; name a directory such as runs/my-run/checkpoints"),
        (("inspect", "runs"), "error: runs holds no steps; name a directory such as runs/my-run/checkpoints"),
        (("verify", "nowhere"), "error: nowhere holds no steps; name a directory such as runs/my-run/checkpoints"),
    ],
)
def test_an_error_is_one_line(words, message):
    assert call(*words) == (1, [message])


def python_m(*words: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m checkpoints` in a child process."""
    command = [sys.executable, "-m", "checkpoints", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_names_its_commands():
    done = python_m("--help")
    assert done.returncode == 0
    assert "Usage: python -m checkpoints " in done.stdout
    for name in ("list", "verify", "inspect", "prune", "export"):
        assert name in done.stdout


def test_an_error_goes_to_stderr_in_one_line_with_exit_code_1(tmp_path):
    done = python_m("list", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path} holds no steps; name a directory such as runs/my-run/checkpoints\n"


def test_an_error_of_the_system_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    code, lines = call("list", tmp_path / "file")
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith("error: [Errno 20] Not a directory: ")


# Hostile recipes: whoever can write into a checkpoint can seal one.


@pytest.mark.parametrize(
    "name",
    ["../a.json", "/a.json", "a/b/c.json", "a/../b.json", ".a.json", "a\n.json", "run.py", "a.bin", "a.pkl", "", "a/"],
)
def test_a_recipe_names_no_file_outside_its_directory_and_no_code(tmp_path, name):
    value = {"tensors": {"x": [["w", 0, 4]]}, "files": {name: b"{}"}}
    with pytest.raises(CorruptCheckpoint, match="not a recipe"):
        parse_recipe(value)
    store = CheckpointStore(tmp_path / "store")
    store.save(1, {"w": torch.ones(4, 2)}, {RECIPE: value})
    code, lines = call("export", store.root / "step-00000001", tmp_path / "out")
    assert code == 1
    assert lines[0].startswith("error: the value 'export' is not a recipe of an export: ")
    assert os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Rows("other", 0, 1)], "does not hold"),
        ([Rows("w", 3, 2)], "does not hold"),
        ([Rows("w", 2**62, 2**62)], "does not hold"),
        ([Rows("scalar", 0, 1)], "does not hold"),
        ([Rows("w", 0, 1), Rows("wide", 0, 1)], "differ in type or columns"),
        ([], "differ in type or columns"),
    ],
)
def test_a_recipe_of_missing_rows_is_refused(tmp_path, rows, message):
    state = {"w": torch.ones(4, 2), "wide": torch.ones(4, 3), "scalar": torch.ones(())}
    store = CheckpointStore(tmp_path / "store")
    store.save(1, state, {RECIPE: Recipe({"x": rows}, {}).builtins()})
    with pytest.raises(CorruptCheckpoint, match=message):
        store.export(1, tmp_path / "out")
    assert os.listdir(tmp_path) == ["store"]


def test_rows_are_joined_in_the_recipes_order(tmp_path):
    weights = torch.arange(12.0).view(6, 2)
    recipe = Recipe({"a": [Rows("w", 4, 2), Rows("w", 0, 1)], "b": [Rows("w", 1, 3)]}, {"sub/note.txt": b"hello"})
    store = CheckpointStore(tmp_path / "store")
    store.save(1, {"w": weights}, {RECIPE: recipe.builtins()})
    store.export(1, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["a"].tolist() == [[8, 9], [10, 11], [0, 1]]
    assert found["b"].tolist() == [[2, 3], [4, 5], [6, 7]]
    assert (tmp_path / "out" / "sub" / "note.txt").read_bytes() == b"hello"


def test_a_step_without_a_recipe_is_not_exported(tmp_path):
    CheckpointStore(tmp_path).save(1, {"w": torch.ones(1)})
    assert call("export", tmp_path / "step-00000001", tmp_path / "out")[1][0].endswith(
        "saved without a recipe for an export; give save() the value 'export'"
    )
