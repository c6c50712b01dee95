"""`python -m checkpoints push` uploads a step and its card to a local server with the hub's API."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from commands import run
from fake_hub import TOKEN, Hub, running
from safetensors.torch import load

from checkpoints import ORIGIN, RECIPE, About, CheckpointStore, Origin, Recipe, Rows
from checkpoints.cli.main import main
from checkpoints.manifest import Manifest, merge
from checkpoints.model.card import License, model_card

DIGEST = "ab" * 32
COMMAND = "torchrun -m trainer.main run.toml run.name='a b'"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with the checkpoint of step 7."""
    run = tmp_path_factory.mktemp("first")
    recipe = Recipe({"x": [Rows("w", 0, 4)]}, {"config.json": b"{}"})
    origin = Origin(COMMAND, "organisation/base")
    about = About(validation_loss=1.25, digests={"data": DIGEST}, mesh={"dp": 2, "tp": 1})
    with CheckpointStore(run / "checkpoints") as store:
        store.save(7, {"w": torch.ones(4, 2)}, {RECIPE: recipe.builtins(), ORIGIN: origin.builtins()}, about)
    return run


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running(Hub()) as hub:
        yield hub


@pytest.fixture(autouse=True)
def fresh_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Large files are sent as LFS objects, without the storage service Xet."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere")
    yield
    huggingface_hub.close_session()


def push(address: str, *words: object, token: str | None = TOKEN) -> tuple[int, str, str]:
    """Push to the hub at `address`; return exit code, stdout and stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        patch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        return run(main, "push", *words)


def test_a_step_becomes_one_commit_of_weights_config_and_card(hub: Hub, root: Path) -> None:
    code, out, err = push(hub.address, root, "organisation/name", "--license", "apache-2.0", "--private", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "step": 7,
        "repository": "organisation/name",
        "commit": f"{hub.address}/organisation/name/commit/{1:040x}",
    }
    files = hub.repositories["organisation/name"]
    assert sorted(files) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    assert load(files["model.safetensors"])["x"].tolist() == [[1, 1]] * 4
    assert hub.commits == ["Step 7"]
    assert hub.private == {"organisation/name": True}
    _, fields, page = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(fields) == {
        "license": "apache-2.0",
        "base_model": "organisation/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sftstream"],
    }
    assert f"| SHA-256 of the data | `{DIGEST}` |" in page
    assert "| validation loss | 1.2500 |" in page
    assert f"Trained by this command:\n\n```sh\n{COMMAND}\n```\n" in page

    code, out, err = push(hub.address, root / "checkpoints/step-00000007", "organisation/name")
    assert (code, out) == (1, "")
    assert err == (
        "error: organisation/name exists and holds 3 files, such as README.md; push to another name, or add a commit with "
        "--update\n"
    )
    files["model-00001-of-00002.safetensors"] = files["model.safetensors.index.json"] = b"of an earlier commit"
    assert push(hub.address, root, "organisation/name", "--update")[0] == 0
    assert hub.commits == ["Step 7", "Step 7"]
    assert sorted(files) == [".gitattributes", "README.md", "config.json", "model.safetensors"]


def refused(address: str, root: Path, name: str = "organisation/name", token: str | None = TOKEN) -> str:
    """Return the line of a push that fails."""
    code, out, err = push(address, root, name, token=token)
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    return line


def test_a_wrong_or_missing_token_is_one_line(hub: Hub, root: Path) -> None:
    assert refused(hub.address, root, token="hf_wrong") == (
        "error: the hub refuses the token; run `hf auth login` anew, or set HF_TOKEN to a token that may write"
    )
    assert refused(hub.address, root, token=None) == (
        "error: no token for the hub; run `hf auth login`, or set HF_TOKEN"
    )
    assert hub.repositories == {}


def test_a_name_that_is_not_allowed_is_one_line(hub: Hub, root: Path) -> None:
    hub.forbidden = "theirs"
    assert refused(hub.address, root, "theirs/name") == (
        "error: the token may not write to theirs/name; use a token with write access, or another organisation"
    )
    for name in ("a/b/c", "name"):
        line = f"error: {name!r} is no name of a repository; give organisation/name"
        assert refused(hub.address, root, name) == line
    assert refused(hub.address, root, "a/b c").startswith("error: 'a/b c' is no name of a repository: ")


def test_a_hub_that_does_not_answer_is_one_line(root: Path) -> None:
    line = refused("http://127.0.0.1:9", root)
    assert line.startswith("error: the upload to organisation/name failed before the hub confirmed a commit: ")
    assert line.endswith("refused; the same command tries again, and does not send files that arrived")


def test_a_connection_that_breaks_before_the_commit_is_one_line_and_the_same_command_goes_on(
    hub: Hub, root: Path
) -> None:
    hub.breaks_at = "/commit/"
    assert refused(hub.address, root).startswith(
        "error: the upload to organisation/name failed before the hub confirmed a commit: "
    )
    assert hub.repositories["organisation/name"].keys() == {".gitattributes"}
    hub.breaks_at = ""
    assert push(hub.address, root, "organisation/name")[0] == 0
    assert len([line for line in hub.requests if line.startswith("PUT /large/")]) == 1


def test_ctrl_c_during_an_upload_is_one_line(hub: Hub, root: Path) -> None:
    hub.hangs_at = "/commit/"
    process = subprocess.Popen(
        [sys.executable, "-m", "checkpoints", "push", str(root), "organisation/name"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"},
    )
    while not hub.hung.wait(0.1) and process.poll() is None:
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith(
        "error: interrupted before the hub confirmed a commit to organisation/name; the same command"
    )


def manifest(**about: object) -> Manifest:
    return merge([], step=1, token="0" * 16, about=About(**about, versions={}))  # type: ignore[arg-type]


def test_a_card_of_adapters_names_peft_and_another_license() -> None:
    card = model_card("name", manifest(), Origin("a", "o/base", adapter=True), License("other", "mine", "LICENSE.md"))
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "license": "other",
        "license_name": "mine",
        "license_link": "LICENSE.md",
        "base_model": "o/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["sftstream"],
    }


def test_a_command_cannot_leave_its_block_and_a_license_cannot_add_fields() -> None:
    card = model_card("name", manifest(), Origin("a\n```\n<script>\x1b[2J"), License("mit\ntags: [x]"))
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit\ntags: [x]"
    assert card.endswith("\n````sh\na\n```\n<script>\\x1b[2J\n````\n")
