"""The metrics tell what each source has contributed so far, and what its weight asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import tiny

from sftstream.ledger.reader import Ledger
from sftstream.ledger.segments import given
from trainer.report.read import RunReader


@pytest.mark.parametrize("unit", ["conversations", "trained_tokens"])
def test_amounts_and_shares_are_those_of_the_ledger_and_go_on_after_a_kill(
    unit: str, tokenizer: str, tmp_path: Path
) -> None:
    paths = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.rows(count, seed=n)) for n, count in enumerate((50, 30))]
    config = runs.run_config(tokenizer, *paths, data={"mix_by": unit}, run={"steps": 5})
    for source, weight in zip(config["data"]["sources"], (3, 1), strict=True):
        source["weight"] = weight
    job = runs.Job(tmp_path, config)
    path = tmp_path / "runs" / "run" / "metrics.jsonl"
    runs.wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= 3, job)
    job.kill()
    runs.run(tmp_path, config)
    amounts = [0, 0]
    steps = Ledger(tmp_path / "runs" / "run").steps
    for line, (_, listed) in zip(runs.metrics(tmp_path), steps, strict=True):
        trained = [0, 0]
        for segment in given(listed):
            trained[segment["source"]] += int(segment["trained_tokens"])
            counted = int(segment["part"] == 0) if unit == "conversations" else int(segment["trained_tokens"])
            amounts[segment["source"]] += counted
        assert line["trained_tokens_by_source"] == trained
        assert sum(trained) == line["trained_tokens"]
        assert line["mixed_by_source"] == amounts
        assert line["share_by_source"] == [amounts[0] / sum(amounts), amounts[1] / sum(amounts)]
        assert line["wanted_share_by_source"] == [0.75, 0.25]
    assert abs(runs.metrics(tmp_path)[-1]["share_by_source"][0] - 0.75) < 0.2


def test_amounts_go_on_from_those_of_two_sources_with_zero_for_an_added_third(tokenizer: str, tmp_path: Path) -> None:
    paths = [tiny.write_jsonl(tmp_path / f"{seed}.jsonl", tiny.rows(40, seed)) for seed in range(3)]
    unit = {"mix_by": "trained_tokens"}
    runs.run(tmp_path, runs.run_config(tokenizer, *paths[:2], run={"steps": 2}, data=unit))
    accepted = unit | {"accept_changed": ["data.sources[2]"]}
    runs.run(tmp_path, runs.run_config(tokenizer, *paths, run={"steps": 6}, data=accepted))
    lines = runs.metrics(tmp_path)
    tokens = [[*line["trained_tokens_by_source"], 0][:3] for line in lines]
    amounts = [[sum(column) for column in zip(*tokens[: index + 1], strict=True)] for index in range(6)]
    assert [line["mixed_by_source"] for line in lines] == [*(found[:2] for found in amounts[:2]), *amounts[2:]]
    assert amounts[-1][2] > 0
    report = RunReader(tmp_path / "runs" / "run").summary()
    assert [len(source.curve) for source in report.mixture] == [6, 6, 6]


def test_a_run_that_began_with_one_source_has_tokens_but_no_amounts_by_source(tokenizer: str, tmp_path: Path) -> None:
    paths = [tiny.write_jsonl(tmp_path / f"{seed}.jsonl", tiny.rows(40, seed)) for seed in range(2)]
    runs.run(tmp_path, runs.run_config(tokenizer, paths[0], run={"steps": 2}))
    accepted = {"accept_changed": ["data.sources[1]"]}
    runs.run(tmp_path, runs.run_config(tokenizer, *paths, run={"steps": 3}, data=accepted))
    last = runs.metrics(tmp_path)[-1]
    assert len(last["tokens_by_source"]) == 2
    assert not {"mixed_by_source", "share_by_source", "wanted_share_by_source"} & last.keys()
