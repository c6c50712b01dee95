"""An audit says yes to every honest run, and names the fault of every other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny
from commands import Outcome, run

from sftstream import DataConfig, Segments, batch_digest
from sftstream.cli.main import main
from sftstream.ledger.audit import audit
from sftstream.ledger.data_run import run_data
from sftstream.ledger.files import closed_files, write_closed
from sftstream.ledger.reader import Ledger
from sftstream.ledger.rebuild import Rebuilder
from sftstream.ledger.records import StepSegments

REFUSED = {"messages": [{"role": "oracle", "content": "?"}]}
STEPS = 4


@pytest.fixture(scope="module")
def data(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two epochs of 40 conversations and a refused row."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    return tiny.data_config(tokenizer, tiny.write_jsonl(path, [*tiny.rows(40), REFUSED]))


@pytest.fixture(scope="module")
def _whole(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    run_data(data, directory, STEPS, 2)
    run_data(data, directory, 10**6, 2, shards=2)
    return directory


@pytest.fixture
def done(_whole: Path, tmp_path: Path) -> Path:
    """The directory of a run to the end of its data, in two sessions on two topologies."""
    shutil.copytree(_whole, tmp_path / "run")
    return tmp_path / "run"


def _change(directory: Path, change: Callable[[dict[int, Segments]], None]) -> None:
    """Plant a fault: change the segments of the steps in the ledger's files."""
    steps = {step.step: step.segments.copy() for step in Ledger(directory).steps}
    change(steps)
    for file in closed_files(directory / "ledger"):
        file.path.unlink()
    write_closed(directory / "ledger", 1, [StepSegments(step, segments) for step, segments in steps.items()])


def _make_metrics_agree(directory: Path) -> None:
    """Write into `metrics.jsonl` what a loader with the planted fault would have counted."""
    ledger = Ledger(directory)
    rebuilder = Rebuilder(ledger.sessions[-1])
    rows = 0
    lines = []
    for step, segments in ledger.steps:
        packs = rebuilder.step(segments)
        old = ledger.metrics[step]
        rows += int((segments["part"] == 0).sum()) + old.refused
        counts = {name: int(segments[name].sum()) for name in ("tokens", "trained_tokens")}
        digest = batch_digest(pack.digest() for pack in packs)
        lines.append(msgspec.structs.replace(old, **counts, rows=rows, batch_digest=digest))
    (directory / "metrics.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def test_an_honest_run_over_two_topologies_is_proved(done: Path) -> None:
    report = audit(Ledger(done))
    assert report.differences == []
    assert report.not_shown == []
    assert "source 0: 82 draws in 2 epochs; 80 conversations trained, 2 refused" in report.proved
    result = run(main, "audit", done)
    assert result.exit_code == 0
    assert result.stdout.startswith("steps 1 to 4: dp 1, workers 0, version ")
    assert "steps 5 to " in result.stdout
    assert "difference" not in result.stdout


def _drop(steps: dict[int, Segments]) -> None:
    steps[2] = steps[2][steps[2]["pack"] != 1]


def _repeat(steps: dict[int, Segments]) -> None:
    segments = steps[3][steps[3]["pack"] != 1]
    again = steps[2][steps[2]["pack"] == 1]
    steps[3] = np.sort(np.concatenate([segments, again]), order="pack", kind="stable")


def _swap(steps: dict[int, Segments]) -> None:
    changed = steps[2].copy()
    changed["pack"][steps[2]["pack"] == 0] = 1
    changed["pack"][steps[2]["pack"] == 1] = 0
    steps[2] = changed[np.argsort(changed["pack"], kind="stable")]


def _alter(steps: dict[int, Segments]) -> None:
    steps[2]["row"][0] = 41 - steps[2]["row"][0]


def _alter_labels(steps: dict[int, Segments]) -> None:
    steps[2]["trained_tokens"][0] += 1
    steps[2]["trained_tokens"][1] -= 1


def _drop_step(steps: dict[int, Segments]) -> None:
    steps[2] = steps[2][:0]


FAULTS = {
    "drop": (_drop, "step 2: "),
    "repeat": (_repeat, "step 3: "),
    "swap": (_swap, "step 2: the packs in the ledger have the digest "),
    "alter": (_alter, "step 2 cannot be built again: row "),
    "alter labels": (_alter_labels, "step 2: row "),
    "drop step": (_drop_step, "step 2: 0 tokens in the ledger, "),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_planted_in_the_ledger_is_named(name: str, done: Path) -> None:
    fault, message = FAULTS[name]
    _change(done, fault)
    differences = audit(Ledger(done)).differences
    assert any(message in line for line in differences), differences
    result = run(main, "audit", done)
    assert result.exit_code == 1
    assert f"difference: {differences[0]}" in result.stdout


CONSISTENT = {
    "drop": (_drop, "was drawn, but is in no pack, and neither refused nor waiting"),
    "repeat": (_repeat, "is trained twice in epoch 0: in step 2, pack 1, and in step 3, pack 1"),
    "swap": (_swap, "but is in a pack of stream"),
}


@pytest.mark.parametrize("name", CONSISTENT)
def test_a_fault_of_the_loader_that_is_in_the_metrics_too_is_named(name: str, done: Path) -> None:
    fault, message = CONSISTENT[name]
    _change(done, fault)
    _make_metrics_agree(done)
    differences = audit(Ledger(done)).differences
    assert any(message in line for line in differences), differences


@pytest.mark.parametrize("steps", [5, 10**6])
def test_an_altered_epoch_of_a_streamed_row_is_named(steps: int, tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for number, count in enumerate([17, 5, 30]):  # 6 stripes of files of different sizes for 4 streams
        tiny.write_jsonl(tmp_path / f"rows/{number}.jsonl", [*tiny.rows(count, number), REFUSED])
    source = {"path": str(tmp_path / "rows/*.jsonl"), "streaming": True, "shuffle": "shards"}
    config = tiny.data_config(tokenizer, sources=[source], epochs=3)
    run_data(config, tmp_path / "run", steps, 1)
    assert audit(Ledger(tmp_path / "run"), rebuild=0).differences == []
    honest = {step.step: step.segments.copy() for step in Ledger(tmp_path / "run").steps}
    count = sum(len(segments) for segments in honest.values())
    for index in range(0, count, 1 + count // 4):
        for change in (-1, 1):
            row = []

            def alter(
                steps: dict[int, Segments], index: int = index, change: int = change, row: list[int] = row
            ) -> None:
                for step, segments in honest.items():
                    steps[step] = segments.copy()
                    if 0 <= index < len(segments) and segments["epoch"][index] + change >= 0:
                        steps[step]["epoch"][index] += change
                        row.append(int(segments["row"][index]))
                    index -= len(segments)

            _change(tmp_path / "run", alter)
            differences = audit(Ledger(tmp_path / "run"), rebuild=0).differences
            assert not row or any(f"row {row[0]} of source 0" in line for line in differences), (row, differences)


def test_a_conversation_altered_in_the_source_is_named(tokenizer: str, tmp_path: Path) -> None:
    rows = tiny.rows(40)
    run_data(tiny.data_config(tokenizer, tiny.write_jsonl(tmp_path / "rows.jsonl", rows)), tmp_path / "run", 2, 2)
    rows[7] = tiny.chat("other", "words")
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    (difference,) = audit(Ledger(tmp_path / "run")).differences
    assert difference.startswith("the data is not the data of the run: data.sources[0].files[0].")


def test_a_pack_over_its_capacity_is_named(done: Path) -> None:
    def enlarge(steps: dict[int, Segments]) -> None:
        steps[2]["tokens"][steps[2]["pack"] == 3] += 100

    _change(done, enlarge)
    assert any(line.startswith("pack 3 of step 2 holds ") for line in audit(Ledger(done)).differences)


def test_a_removed_refusal_is_named(done: Path) -> None:
    lines = (done / "refused.jsonl").read_text().splitlines(keepends=True)
    (done / "refused.jsonl").write_text("".join(lines[1:]))
    differences = audit(Ledger(done)).differences
    assert "refused.jsonl lists 1 rows, metrics.jsonl counts 2" in differences
    assert any(line.startswith("row 40 of source 0 in epoch ") for line in differences)


def test_a_run_under_way_lists_its_waiting_rows_as_neither_lost_nor_trained(data: DataConfig, tmp_path: Path) -> None:
    run_data(data, tmp_path / "run", 3, 2)
    report = audit(Ledger(tmp_path / "run"))
    assert report.differences == []
    _change(tmp_path / "run", _drop)
    _make_metrics_agree(tmp_path / "run")
    assert any("neither refused nor waiting" in line for line in audit(Ledger(tmp_path / "run")).differences)


@pytest.mark.parametrize("change", ["source added", "file grown"])
def test_a_run_is_proved_whose_accepted_data_no_checkpoint_has_followed(
    change: str, tokenizer: str, tmp_path: Path
) -> None:
    paths = [tiny.write_jsonl(tmp_path / f"{seed}.jsonl", tiny.rows(30, seed)) for seed in range(3)]
    sources = [{"path": path} for path in paths]
    directory = tmp_path / "run"
    run_data(tiny.data_config(tokenizer, sources=sources[:2]), directory, 2, 2)
    if change == "file grown":
        tiny.write_jsonl(Path(paths[1]), [*tiny.rows(30, 1), *tiny.rows(10, 5)])
        sources, accepted = sources[:2], ["data.sources[1]"]
    else:
        accepted = ["data.sources[2]"]
    run_data(tiny.data_config(tokenizer, sources=sources, accept_changed=accepted), directory, 3, 2)
    (directory / "ledger" / "state-00000003.msgpack").unlink()
    report = audit(Ledger(directory))
    assert report.differences == []
    assert "that no row is lost in the last 1 steps: they follow the newest checkpoint, of step 2" in report.not_shown
    shares = [line for line in report.proved if line.endswith(" wanted by its weight")]
    assert [line.split(":")[0] for line in shares] == [f"source {number}" for number in range(len(sources))]


def test_a_wrong_mixture_is_named(tokenizer: str, tmp_path: Path) -> None:
    paths = [tiny.write_jsonl(tmp_path / f"{seed}.jsonl", tiny.rows(60, seed)) for seed in range(2)]
    sources = [{"path": path, "weight": weight} for path, weight in zip(paths, (3.0, 1.0), strict=True)]
    config = tiny.data_config(tokenizer, sources=sources, epochs=None)
    run_data(config, tmp_path / "run", 4, 4)
    proved = audit(Ledger(tmp_path / "run")).proved
    assert "the mixture is as wanted in 4 of 4 streams; in all others a source ended" in proved
    path = tmp_path / "run" / "ledger" / "sessions.jsonl"
    (stored,) = (tmp_path / "run" / "ledger").glob("state-*")
    content = msgspec.msgpack.decode(stored.read_bytes())
    content["run"]["identity"]["sources"][0]["weight"] = 1.0
    stored.write_bytes(msgspec.msgpack.encode(content))
    assert path.exists()
    assert any("whose weight is 50.0%" in line for line in audit(Ledger(tmp_path / "run")).differences)


def test_two_equal_runs_and_the_first_difference_of_two_others(done: Path, data: DataConfig, tmp_path: Path) -> None:
    run_data(data, tmp_path / "b", 10**6, 3)
    assert _compared(done, tmp_path / "b").exit_code == 0
    _change(done, _swap)
    result = _compared(done, tmp_path / "b")
    assert result.exit_code == 1
    assert result.stdout.startswith("the runs part after 1 equal steps: step 2, pack 0: row ")


def _compared(a: Path, b: Path) -> Outcome:
    return run(main, "audit", a, b)


def test_a_directory_without_a_ledger_is_named(tmp_path: Path) -> None:
    result = run(main, "audit", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {tmp_path} has no ledger; name the directory of a run, such as runs/my-run, made by this version\n"
    )


def test_hostile_text_reaches_no_terminal(data: DataConfig, done: Path) -> None:
    path = done / "refused.jsonl"
    line = json.loads(path.read_text().splitlines()[0])
    path.write_text("".join(json.dumps(line | {"detail": "\x1b[2Jgone", "place": "\x1b]0;x"}) + "\n" for _ in range(2)))
    result = run(main, "find", done, "--source", 0, "--row", 40)
    assert "\x1b" not in result.stdout
    assert "\\x1b[2Jgone" in result.stdout
