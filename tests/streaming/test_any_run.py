"""Any sources, any mixture, any policy, any chain of topologies: the packs are those of one process that never stopped."""

from __future__ import annotations

import gzip
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import tiny

from sftstream import DataConfig, Pack, PackAssignment, PackLoader, Shard, merge

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.randrange(10**9))
DRAWS = 12
MORE_DRAWS = int(os.environ.get("SFTSTREAM_DRAWS") or 300)


class Given(NamedTuple):
    """A pack and its number in the run."""

    number: int
    digest: str


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Sources of every kind and of several sizes, one with rows that are refused, one with a single row."""
    directory = tmp_path_factory.mktemp("corpora")
    spoiled: list[Any] = tiny.rows(25, seed=3)
    spoiled[4] = spoiled[17] = {"text": "?"}
    flat = [{"prompt": f"{i} ?", "completion": "north " * (i % 9 + 1)} for i in range(31)]
    shards = directory / "shards"
    shards.mkdir()
    for number, size in enumerate((9, 0, 4, 17)):
        (shards / f"{number}.jsonl.gz").write_bytes(gzip.compress(tiny.json_lines(tiny.rows(size, seed=number))))
    repository = directory / "repository"
    repository.mkdir()
    for number in range(3):
        tiny.write_parquet(repository / f"train-{number}.parquet", tiny.rows(7 + number, seed=number))
    datasets.Dataset.from_list(tiny.rows(20, seed=5)).save_to_disk(str(directory / "saved"), num_shards=2)
    (directory / "flat.csv").write_text("q,a\n" + "".join(f"{i} ?,{'south ' * (i % 7 + 1)}\n" for i in range(19)))
    return [
        {"path": tiny.write_jsonl(directory / "many.jsonl", tiny.rows(60, seed=1))},
        {"path": tiny.write_json(directory / "some.json", tiny.rows(23, seed=2))},
        {"path": tiny.write_jsonl(directory / "spoiled.jsonl", spoiled)},
        {"path": tiny.write_jsonl(directory / "one.jsonl", tiny.rows(1, seed=4))},
        {"path": tiny.write_parquet(directory / "flat.parquet", flat)},
        {"path": str(directory / "flat.csv"), "columns": {"prompt": "q", "completion": "a"}},
        {"path": str(shards)},
        {"path": str(repository), "split": "train"},
        {"path": str(directory / "saved")},
    ]


def _draw_sources(draw: random.Random, corpora: list[dict[str, Any]], finite: bool) -> list[dict[str, Any]]:
    sources = [dict(source) for source in draw.sample(corpora, draw.randint(1, 4))]
    for source in sources:
        if draw.random() < 0.3:
            # In an unshuffled source of few shards an endless stream may find no row, and says so.
            source |= {"streaming": True, "shuffle": draw.choice(["shards", False]) if finite else "shards"}
        elif draw.random() < 0.2:
            source["shuffle"] = draw.choice([True, False, "shards"])
        if finite and draw.random() < 0.3:
            # Of a streamed source a half of one shard would be none, and says so.
            source["repeat"] = draw.choice([1.5 if source.get("streaming") else 0.5, 2, 1.7])
    if draw.random() < 0.4 or any(source.get("streaming") for source in sources):
        for source in sources:
            source["weight"] = draw.choice([1, 2, 0.3])
    return sources


def _draw_config(draw: random.Random, tokenizer: str, corpora: list[dict[str, Any]]) -> DataConfig:
    finite = draw.random() < 0.7
    sources = _draw_sources(draw, corpora, finite)
    weighted = "weight" in sources[0]
    stages = (
        [{"after": draw.randint(5, 60), "weights": [draw.choice([1, 2]) for _ in sources]}]
        if weighted and draw.random() < 0.4
        else []
    )
    return tiny.data_config(
        tokenizer,
        sources=sources,
        streams=draw.choice([1, 3, 4, 8, 12]),
        global_batch=draw.choice([1, 4, 6, 8]),
        capacity=draw.choice([128, 256]),
        window=draw.choice([1, 5, 16, 64]),
        shuffle=draw.choice([True, True, False, "shards"]),
        seed=draw.randint(0, 99),
        epochs=draw.randint(1, 3) if finite else None,
        overflow=draw.choice(["drop", "truncate", "split"]),
        mix_by=draw.choice(["conversations", "tokens", "trained_tokens"]),
        stages=stages,
        ends_with=draw.choice(["all", "first"]),
        prefetch=draw.choice([1, 2, 5]),
    )


def _reference(config: DataConfig, steps: int) -> list[list[Pack]]:
    """Steps of the run in one process."""
    loader = PackLoader(config)
    result = []
    while len(result) < steps and not (loader.exhausted and loader.packs % config.global_batch == 0):
        result.append(loader.next_step())
    return result


def _steps(
    config: DataConfig, state: Any, shards: int, workers: int, first: int, count: int
) -> tuple[list[list[str]], Any]:
    """The digests of `count` steps on a topology, in the order of the run, and the state after them."""
    loaders = [PackLoader(config, shard=Shard(r, shards), workers=workers, state=state) for r in range(shards)]
    assignment = PackAssignment(config.stream_count, config.global_batch, shards)
    result = []
    for step in range(first, first + count):
        packs = [loader.next_step() for loader in loaders]
        assert {len(own) for own in packs} == {assignment.micro_batches(step)}
        taken: Counter[int] = Counter()
        digests = []
        for shard in assignment.shards_of_step(step):
            digests.append(packs[shard][taken[shard]].digest())
            taken[shard] += 1
        result.append(digests)
    state = merge([loader.state_dict() for loader in loaders])
    for loader in loaders:
        loader.close()
    return result, state


def _check(number: int, tokenizer: str, corpora: list[dict[str, Any]]) -> None:
    draw = random.Random(f"{SEED}/{number}")
    config = _draw_config(draw, tokenizer, corpora)
    whole = _reference(config, steps=draw.randint(3, 14))
    expected = [tiny.digests(step) for step in whole]
    done, state, hops = 0, None, []
    while done < len(expected):
        shards, workers = draw.randint(1, min(config.stream_count, 5)), draw.choice([0, 0, 0, 1, 2, 3])
        count = draw.randint(1, len(expected) - done)
        hops.append((shards, workers, count))
        digests, state = _steps(config, state, shards, workers, done, count)
        assert digests == expected[done : done + count], f"seed {SEED}, draw {number}: {config}, hops {hops}"
        done += count


@pytest.mark.parametrize("number", range(DRAWS))
def test_a_random_run_gives_the_same_packs_on_any_chain_of_topologies(
    number: int, tokenizer: str, corpora: list[dict[str, Any]]
) -> None:
    _check(number, tokenizer, corpora)


@pytest.mark.slow
def test_hundreds_of_random_runs_give_the_same_packs(tokenizer: str, corpora: list[dict[str, Any]]) -> None:
    print(f"seed {SEED}")
    for number in range(1000, 1000 + MORE_DRAWS):
        _check(number, tokenizer, corpora)


def test_uneven_shards_lose_and_repeat_nothing(tokenizer: str, tmp_path: Path) -> None:
    """8 -> 7 -> 5 -> 8 shards."""
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(90))
    config = tiny.data_config(tokenizer, path, streams=8, global_batch=8, epochs=2)
    whole = [tiny.digests(step) for step in _reference(config, 1000)]
    digests: list[list[str]] = []
    state = None
    for shards, workers, count in ((8, 0, 2), (7, 1, 2), (5, 2, 2), (8, 0, len(whole) - 6)):
        more, state = _steps(config, state, shards, workers, len(digests), count)
        digests += more
    assert digests == whole


def test_no_state_can_be_taken_inside_an_unevenly_shared_step(tokenizer: str, corpus_path: str) -> None:
    loader = PackLoader(tiny.data_config(tokenizer, corpus_path, streams=8, global_batch=8), shard=Shard(0, 3))
    next(loader)
    with pytest.raises(
        ValueError, match="3 shards do not share a step of 8 packs evenly; take the state at the end of a step"
    ):
        loader.state_dict()
