"""`sftstream stats`: the numbers of all rows, in a terminal, as JSON, and as a page in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
from browser import chromium, opened
from commands import run

from sftstream import ChatEncoder, Refused
from sftstream.cli.main import main


def write(directory: Path, tokenizer: str, rows: list[Any], held_out: list[Any], **data: Any) -> Path:
    """Write a config of two sources, the second streamed if `data` has a key `streamed`."""
    tiny.write_jsonl(directory / "a.jsonl", rows)
    tiny.write_jsonl(directory / "b.jsonl", tiny.rows(20, seed=1))
    tiny.write_jsonl(directory / "held_out.jsonl", held_out)
    sources = [str(directory / "a.jsonl"), str(directory / "b.jsonl")]
    config = runs.run_config(
        tokenizer,
        *sources,
        data={"streams": 1, "global_batch": 2, "epochs": 2, **data},
        validation={"sources": [{"path": str(directory / "held_out.jsonl")}]},
    )
    path = directory / "run.toml"
    path.write_text("".join(f"{name} = {runs.toml(table)}\n" for name, table in config.items()))
    return path


@pytest.fixture(scope="module")
def config(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 rows with a duplicate, a row too long for a pack and two refused rows; a held-out file with a
    training row, a training question and a new row."""
    rows = tiny.rows(50)
    long = tiny.chat("what", " ".join(tiny.WORDS * 10))
    other = tiny.chat(rows[3]["messages"][0]["content"], "another answer")
    hostile = {"messages": [{"role": "<img src=x onerror=alert(1)>\x1b[2J", "content": "?"}]}
    return write(
        tmp_path_factory.mktemp("stats" * 30),
        tokenizer,
        [*rows, rows[7], long, hostile, {"messages": []}],
        [rows[5], other, tiny.chat("new", "new")],
    )


def measured(config: Path, *options: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(main, "stats", config, "--json", *options).stdout)
    del found["seconds"]
    return found


def test_the_numbers_are_those_of_an_encoder_row_by_row(config: Path, tokenizer: str) -> None:
    encoder = ChatEncoder(tokenizer, capacity=10**6)
    lengths, trained, refused = [], [], 0
    for line in (config.parent / "a.jsonl").read_text().splitlines():
        try:
            (example,) = encoder.encode(json.loads(line)["messages"])
        except Refused:
            refused += 1
            continue
        lengths.append(len(example.tokens))
        trained.append(example.targets)
    found = measured(config)
    source = found["sources"][0]
    assert (source["rows"], source["read"], source["examples"]) == (54, 54, 52)
    assert (source["tokens"], source["trained"]) == (sum(lengths), sum(trained))
    assert source["too_long"] == sum(length > 256 for length in lengths) == 1
    assert source["refused"] == {"unknown role": 1, "empty conversation": 1}
    assert refused == 2
    assert found["lengths"]["quantiles"]["1.0"] == max(lengths)
    assert sum(found["lengths"]["histogram"]["counts"]) == 72
    assert sum(source["share_of_tokens"] for source in found["sources"]) == pytest.approx(1)
    assert not found["sampled"]


def test_duplicates_and_held_out_rows_are_found_with_their_places(config: Path) -> None:
    found = measured(config)["overlap"]
    a, held = config.parent / "a.jsonl", config.parent / "held_out.jsonl"
    assert found["duplicates"] == 1
    assert found["pairs"] == [{"place": f"{a}:51", "equal_to": f"{a}:8"}]
    assert (found["held_out"], found["trained_too"], found["asked_too"]) == (3, 1, 2)
    assert found["trained_too_pairs"] == [{"place": f"{held}:1", "equal_to": f"{a}:6"}]
    assert found["asked_too_pairs"][1] == {"place": f"{held}:2", "equal_to": f"{a}:4"}


def test_a_smaller_capacity_loses_more_and_the_forecast_counts_steps(config: Path) -> None:
    found = measured(config)
    assert [c["capacity"] for c in found["capacities"]] == [64, 128, 256, 512, 1024]
    assert [c["too_long"] for c in found["capacities"]] == sorted(
        (c["too_long"] for c in found["capacities"]), reverse=True
    )
    assert found["capacities"][-1]["too_long"] == 0
    assert found["epochs"] == 2
    assert found["steps"] == -(-found["packs"] // 2)
    fitting = sum(s["tokens"] for s in found["sources"]) * (1 - found["capacities"][2]["lost_tokens"])
    assert found["packs"] * 256 * found["fill"] == pytest.approx(2 * fitting, rel=0.05)


def test_several_processes_and_a_streamed_source_give_the_same_numbers(
    config: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measured(config, "--workers", 1)
    monkeypatch.setattr("sftstream.stats.measure.FEW_ROWS", 10)
    monkeypatch.setattr("sftstream.stats.measure.ROWS_AT_ONCE", 7)
    assert measured(config, "--workers", 2) == expected
    sources = [
        {"path": str(config.parent / "a.jsonl"), "weight": 1.0},
        {"path": str(config.parent / "b.jsonl"), "weight": 3.0, "streaming": True, "shuffle": False},
    ]
    rows = [json.loads(line) for line in (config.parent / "held_out.jsonl").read_text().splitlines()]
    streamed = measured(write(tmp_path, tokenizer, [], rows, sources=sources, mix_by="tokens"))
    assert streamed["lengths"] == expected["lengths"]
    assert streamed["steps"] is None
    assert [round(s["share_of_tokens"], 9) for s in streamed["sources"]] == [0.25, 0.75]


def test_a_sample_is_smaller_and_says_so(config: Path) -> None:
    found = measured(config, "--sample", 10)
    assert found["sampled"]
    assert [source["read"] for source in found["sources"]] == [10, 10]
    assert [source["rows"] for source in found["sources"]] == [54, 20]
    assert "a sample: 20 rows" in run(main, "stats", config, "--sample", 10).stdout


def test_the_terminal_plots_and_escapes(config: Path) -> None:
    printed = run(main, "stats", config).stdout
    text = " ".join(printed.split())
    assert "\x1b" not in printed
    assert "every row: 74 rows" in text
    assert "tokens of a conversation: mean" in text
    assert "█" in printed
    assert "256 (this config)" in text
    assert "duplicates: 1 training rows equal an earlier one" in text
    assert r"<img src=x onerror=alert(1)>\x1b[2J" in text


def test_data_without_a_trainable_row_is_an_error(tokenizer: str, tmp_path: Path) -> None:
    config = write(tmp_path, tokenizer, [{"messages": []}], [], sources=[{"path": str(tmp_path / "a.jsonl")}])
    (tmp_path / "held_out.jsonl").write_text(json.dumps(tiny.chat("what", "seven")))
    result = run(main, "stats", config)
    assert result.stderr == (
        f"error: none of 1 rows can be trained: empty conversation: 1 (one is {tmp_path}/a.jsonl:1: it has no messages); "
        "correct the rows, or name other sources in the config\n"
    )


def test_an_example_of_each_reason_is_named_however_late_it_comes(tokenizer: str, tmp_path: Path) -> None:
    empty, unanswered = {"messages": []}, {"messages": [{"role": "user", "content": "hi"}]}
    config = write(tmp_path, tokenizer, [*[empty] * 200, unanswered], tiny.rows(1))
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [{"role": "oracle", "content": "?" * 300}]}))
    refused = run(main, "stats", config).stderr
    place = f"{tmp_path}/a.jsonl"
    assert (
        f"none of 202 rows can be trained: empty conversation: 200 (one is {place}:1: it has no messages), " in refused
    )
    assert f"no assistant message: 1 (one is {place}:201: its roles are ['user'])" in refused
    assert f"unknown role: 1 (one is {tmp_path}/b.jsonl:1: " in refused
    assert "?" * 200 not in refused
    tiny.write_jsonl(tmp_path / "b.jsonl", tiny.rows(20))
    listed = [(row["place"], row["reason"]) for row in measured(config)["refused"]]
    assert listed == [
        *[(f"{place}:{line}", "empty conversation") for line in range(1, 21)],
        (f"{place}:201", "no assistant message"),
    ]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_shows_the_numbers_in_light_and_dark(browser: Any, config: Path, tmp_path: Path, width: int) -> None:
    path = tmp_path / "stats.html"
    assert re.fullmatch(
        rf"wrote {path}, \d.\d MB; open it in a browser\n", run(main, "stats", config, "--html", path).stdout
    )
    shots = []
    for scheme in ("light", "dark"):
        shown, seen = opened(browser, path, width, scheme)
        assert seen == []
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        assert shown.locator("svg.plot").count() == 3
        assert shown.locator("main img, main script").count() == 0
        text = shown.inner_text("body")
        assert "Training rows equal to an earlier training row: 1." in text
        assert "<img src=x onerror=alert(1)>\\x1b[2J" in text
        shots.append(shown.screenshot(path=tmp_path / f"{scheme}.png"))
    assert shots[0] != shots[1]
    before = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    shown.click("#theme")
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") != before
