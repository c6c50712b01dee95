"""States and checkpoints written by earlier versions resume to the bit.

`tests/fixtures/version_0_1_0` (format 3) was written by that version from the sources made below:
`state.json` holds a state after 12 packs and the digests of all packs that followed; `step-00000004`
is a checkpoint of the run in `steps.json`, which lists each step's loss and batch digest.
`tests/fixtures/format_4` holds such a `state.json` of the first version of format 4.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny

from sftstream import DataConfig, DataState, PackLoader

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
VERSION_0_1_0 = FIXTURES / "version_0_1_0"


def mixed_sources(directory: Path) -> list[dict[str, Any]]:
    """A file with a refused row, and six shards that are streamed."""
    rows: list[Any] = tiny.rows(40, seed=1)
    rows[5] = {"text": "?"}
    (directory / "shards").mkdir()
    for number in range(6):
        tiny.write_jsonl(directory / "shards" / f"{number}.jsonl", tiny.rows(9, seed=10 + number))
    shards = {"path": str(directory / "shards"), "weight": 1, "streaming": True, "shuffle": "shards"}
    return [{"path": tiny.write_jsonl(directory / "dialogues.jsonl", rows), "weight": 2, "repeat": 1.5}, shards]


@pytest.fixture
def config(tmp_path: Path, tokenizer: str) -> DataConfig:
    return tiny.data_config(
        {"path": tokenizer, "backend": "huggingface"},
        sources=mixed_sources(tmp_path),
        capacity=96,
        overflow="split",
        mix_by="tokens",
        window=6,
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fixture", ["version_0_1_0", "format_4"])
def test_a_data_state_of_an_earlier_version_gives_the_packs_that_were_still_to_come(
    config: DataConfig, fixture: str, workers: int
) -> None:
    saved = json.loads((FIXTURES / fixture / "state.json").read_text())
    loader = PackLoader(config, workers=workers, state=saved["state"])
    assert [pack.digest() for pack in loader] == saved["digests"]


def test_a_data_state_of_an_earlier_version_is_written_again_under_the_same_names() -> None:
    saved = json.loads((VERSION_0_1_0 / "state.json").read_text())["state"]
    streams = {
        number: stream | {"refused": [stream["refused"], {}]}  # of the first source, see `mixed_sources`
        for number, stream in saved["streams"].items()
    }
    now = saved | {"identity": saved["identity"] | {"format": 4, "versions": {}}, "streams": streams}
    assert DataState.parse(saved).builtins() == tiny.resealed(now)
    assert tiny.resealed(now) == now | {"checksum": tiny.resealed(now)["checksum"]}


def test_refused_rows_of_format_3_are_given_to_the_sources_that_lost_them() -> None:
    saved = json.loads((VERSION_0_1_0 / "state.json").read_text())["state"]
    stream = saved["streams"]["0"]
    stream["refused"] = {"a": 2, "b": 4}
    stream["drawn"] = [stream["accepted"][0][0] + 5, stream["accepted"][1][0] + 1]
    assert DataState.parse(saved).streams[0].refused == ({"b": 4, "a": 1}, {"a": 1})
    stream["refused"] = {"a": 2, "b": 5}  # one row was accepted before a change, and refused after
    assert DataState.parse(saved).streams[0].refused == ({"b": 5}, {"a": 2})
    del stream["drawn"]
    with pytest.raises(ValueError, match=r"this is not a data state of this version: .*refused"):
        DataState.parse(saved)


def test_a_data_state_of_format_4_is_written_again_unchanged() -> None:
    saved = json.loads((FIXTURES / "format_4" / "state.json").read_text())["state"]
    assert DataState.parse(saved).builtins() == saved


def test_a_checkpoint_of_an_earlier_version_resumes_to_the_same_batches(tmp_path: Path, tokenizer: str) -> None:
    before = json.loads((VERSION_0_1_0 / "steps.json").read_text())
    config = runs.run_config(tokenizer, runs.sources(tmp_path), checkpoint={"every": 4, "keep": 5})
    config["data"]["tokenizer"] = {"path": tokenizer, "backend": "huggingface"}
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    shutil.copytree(VERSION_0_1_0 / "step-00000004", checkpoints / "step-00000004")
    job = runs.run(tmp_path, config)
    assert "resuming after step 4" in job.output()
    after = runs.metrics(tmp_path)
    assert [line["batch_digest"] for line in after] == [line["batch_digest"] for line in before[4:]]
    # The kernels of another processor round differently, so losses are equal to rounding only.
    assert [line["loss"] for line in after] == pytest.approx([line["loss"] for line in before[4:]], rel=1e-4)
