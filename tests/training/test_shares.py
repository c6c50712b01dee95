"""The metrics tell what each source has contributed so far, and what its weight asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import tiny

from sftstream.ledger.reader import Ledger
from sftstream.ledger.segments import given


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
