"""Random runs, killed and resumed on random topologies: their ledgers are those of unkilled runs, an
audit says yes to them, and names each fault that is planted in them."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny
from gloo_ranks import processes

from sftstream import DataConfig, Segments, batch_digest
from sftstream.ledger.audit import audit
from sftstream.ledger.data_run import run_data
from sftstream.ledger.files import closed_files, write_closed
from sftstream.ledger.reader import Ledger
from sftstream.ledger.rebuild import Rebuilder
from sftstream.ledger.records import StepSegments

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.randrange(10**9))
DRAWS = int(os.environ.get("SFTSTREAM_DRAWS") or 12)
QUICK = 2
REFUSED = {"messages": [{"role": "oracle", "content": "?"}]}

Steps = dict[int, Segments]
"""Segments of each step, by number of the step."""
Pack = tuple[int, int]
"""Number of a step, and place of a pack in the step."""


def _random_config(draw: random.Random, tokenizer: str, directory: Path) -> DataConfig:
    sources: list[dict[str, Any]] = []
    for number in range(draw.choice([1, 2, 3])):
        rows = [*tiny.rows(draw.randint(30, 80), number), REFUSED]
        sources.append({"path": tiny.write_jsonl(directory / f"{number}.jsonl", rows)})
    if draw.random() < 0.6:
        sources = [{**source, "weight": draw.choice([0.5, 1.0, 3.0])} for source in sources]
        if draw.random() < 0.5:
            sources[0] |= {"streaming": True, "shuffle": draw.choice(["shards", False])}
    skip = {}
    if draw.random() < 0.4:
        skip = {"rows": [[0, draw.randrange(20)]], "steps": [[first := draw.randint(1, 6), first + 1]]}
    return tiny.data_config(
        tokenizer,
        sources=sources,
        skip=skip,
        epochs=draw.choice([2, 3, None]),
        mix_by=draw.choice(["conversations", "tokens", "trained_tokens"]),
        overflow=draw.choice(["drop", "split", "truncate"]),
        capacity=draw.choice([128, 256]),
        streams=draw.choice([3, 4, 6]),
        global_batch=draw.choice([2, 4, 5]),
        max_refused=1.0,
        max_too_long=1.0,
        prefetch=2,
        seed=draw.randrange(100),
    )


def _killed_run(draw: random.Random, config: DataConfig, directory: Path, steps: int, every: int) -> list[str]:
    """Run in processes that are killed at random moments; return the topology of each attempt."""
    log = []
    for attempt in range(4):
        shards, workers = draw.choice([1, 2, 3]), draw.choice([0, 0, 1, 2])
        process = processes.Process(target=run_data, args=(config, directory, steps, every, shards, workers))
        process.start()
        log.append(f"{shards} shards x {workers} workers")
        wanted, deadline = _lines(directory) + draw.randint(1, 3), time.monotonic() + 240
        while process.is_alive() and (attempt == 3 or _lines(directory) < wanted):
            assert time.monotonic() < deadline, f"the run does not go on: {log}"
            time.sleep(0.002)
        if attempt < 3:
            time.sleep(draw.random() * 0.02)
            process.kill()
        process.join()
        log[-1] += f", exit code {process.exitcode}"
        assert process.exitcode in (0, -9), log
    assert process.exitcode == 0, log
    return log


def _lines(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _bytes(directory: Path) -> dict[str, bytes]:
    """Return the content of each file of a run but for `sessions.jsonl`, which tells of the kills."""
    files = [directory / "metrics.jsonl", directory / "refused.jsonl", *(directory / "ledger").iterdir()]
    return {path.name: path.read_bytes() for path in files if path.name != "sessions.jsonl"}


def _without(segments: Segments, place: int) -> Segments:
    return segments[segments["pack"] != place]


def _moved(segments: Segments, place: int) -> Segments:
    moved = segments.copy()
    moved["pack"] = place
    return moved


def _ordered(segments: Segments) -> Segments:
    return segments[np.argsort(segments["pack"], kind="stable")]


def _drop(draw: random.Random, steps: Steps, packs: list[Pack], config: DataConfig) -> list[int]:
    step, place = draw.choice(packs)
    steps[step] = _without(steps[step], place)
    return [step]


def _repeat(draw: random.Random, steps: Steps, packs: list[Pack], config: DataConfig) -> list[int]:
    (step, place), (later, target) = sorted(draw.sample(packs, 2))
    again = _moved(steps[step][steps[step]["pack"] == place], target)
    steps[later] = _ordered(np.concatenate([_without(steps[later], target), again]))
    return [step, later]


def _swap(draw: random.Random, steps: Steps, packs: list[Pack], config: DataConfig) -> list[int]:
    """Swap two packs of different streams."""

    def stream(pack: Pack) -> int:
        return ((pack[0] - 1) * config.global_batch + pack[1]) % config.stream_count

    pairs = [(a, b) for a in packs for b in packs if stream(a) != stream(b)]
    (step, place), (other, target) = draw.choice(pairs)
    one = steps[step][steps[step]["pack"] == place]
    two = steps[other][steps[other]["pack"] == target]
    steps[step] = _without(steps[step], place)
    steps[other] = _without(steps[other], target)
    steps[step] = _ordered(np.concatenate([steps[step], _moved(two, place)]))
    steps[other] = _ordered(np.concatenate([steps[other], _moved(one, target)]))
    return [step, other]


def _alter(draw: random.Random, steps: Steps, packs: list[Pack], config: DataConfig) -> list[int]:
    """Replace a field of a segment of a pack."""
    step, place = draw.choice(packs)
    index = draw.choice(np.flatnonzero(steps[step]["pack"] == place).tolist())
    match draw.choice(["row", "epoch", "tokens", "trained_tokens", "part"]):
        case "row":
            row = steps[step]["row"][index]
            steps[step]["row"][index] = row + 1 if row == 0 else row - 1
        case name:
            steps[step][name][index] += 1
    return [step]


FAULTS: dict[str, Callable[[random.Random, Steps, list[Pack], DataConfig], list[int]]] = {
    "dropped": _drop,
    "repeated": _repeat,
    "swapped": _swap,
    "altered": _alter,
}
"""Functions that plant a fault in a pack, and return the numbers of the changed steps."""


def _plant(directory: Path, steps: Steps) -> None:
    for file in closed_files(directory / "ledger"):
        file.path.unlink()
    write_closed(directory / "ledger", 1, [StepSegments(step, segments) for step, segments in steps.items()])


def _with_metrics(directory: Path, before: Ledger, steps: Steps) -> None:
    """Write into `metrics.jsonl` what a loader with the planted fault would have counted."""
    rebuilder = Rebuilder(before.sessions[-1])
    lines, rows = [], 0
    for step, old in before.metrics.items():
        packs = rebuilder.step(steps[step])
        given = steps[step][steps[step]["trained_tokens"] >= 0]
        rows += int((steps[step]["part"] == 0).sum()) + old.refused
        tokens, trained = (int(given[name].sum()) for name in ("tokens", "trained_tokens"))
        digest = batch_digest(pack.digest() for pack in packs)
        lines.append(
            msgspec.structs.replace(old, tokens=tokens, trained_tokens=trained, rows=rows, batch_digest=digest)
        )
    (directory / "metrics.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def _require_named(directory: Path, changed: list[int], rows: set[tuple[int, int]]) -> None:
    """An audit says no, and names a changed step, or a row or source of a changed pack."""
    differences = audit(Ledger(directory)).differences
    assert differences
    names = [rf"\bstep {step}\b" for step in changed]
    names += [rf"\brow {row} of source {source}\b" for source, row in rows]
    names += [rf"^source {source}: [\d,]+ rows were drawn, but" for source, _ in rows]  # the end of a streamed file
    assert re.search("|".join(names), differences[0], re.MULTILINE) or any(
        re.search("|".join(names), line) for line in differences
    ), differences


def _check(number: int, tokenizer: str, tmp_path: Path) -> None:
    print(f"seed {SEED}, draw {number}")
    draw = random.Random(f"{SEED}/{number}")
    config = _random_config(draw, tokenizer, tmp_path)
    steps, every = draw.randint(6, 12), draw.choice([1, 2, 3])
    directory = tmp_path / "run"
    print(_killed_run(draw, config, directory, steps, every))
    run_data(config, tmp_path / "whole", steps, every)
    expected = _bytes(tmp_path / "whole")
    assert _bytes(directory) == expected
    honest = audit(Ledger(directory))
    assert honest.differences == []
    ledger = Ledger(directory)
    original = {step: segments for step, segments in ledger.steps}
    packs = sorted(
        {
            (step, place)
            for step, segments in original.items()
            for place in segments["pack"][segments["trained_tokens"] >= 0].tolist()
        }
    )
    for name, fault in FAULTS.items():
        planted = {step: segments.copy() for step, segments in original.items()}
        changed = fault(draw, planted, packs, config)
        rows = {
            (source, row)
            for step in changed
            for table in (original[step], planted[step])
            for source, row in zip(table["source"].tolist(), table["row"].tolist(), strict=True)
        }
        print(f"{name} in steps {changed}")
        _plant(directory, planted)
        _require_named(directory, changed, rows)
        # A fault of the loader itself would be in the metrics too.
        if name != "altered":
            _with_metrics(directory, ledger, planted)
            _require_named(directory, changed, rows)
            (directory / "metrics.jsonl").write_bytes(expected["metrics.jsonl"])


@pytest.mark.parametrize("number", range(QUICK))
def test_killed_runs_are_proved_and_faults_in_them_named(number: int, tokenizer: str, tmp_path: Path) -> None:
    _check(number, tokenizer, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(QUICK, DRAWS))
def test_many_killed_runs_are_proved_and_faults_in_them_named(number: int, tokenizer: str, tmp_path: Path) -> None:
    _check(number, tokenizer, tmp_path)
