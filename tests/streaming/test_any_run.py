"""Any sources, any mixture, any policy, any chain of topologies: the packs are those of one process that never stopped."""

from __future__ import annotations

import copy
import gzip
import json
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import msgspec
import pytest
import tiny
from test_interrupts import Interrupt, interrupt_after

from sftstream import DataConfig, DataState, Pack, PackAssignment, PackLoader, Shard, SourceConfig, merge
from sftstream.records import Ref
from sftstream.streaming.order import draws_of_source, draws_of_stream

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.randrange(10**9))
DRAWS = 20
MORE_DRAWS = int(os.environ.get("SFTSTREAM_DRAWS") or 500)
OTHER_TEMPLATE = tiny.TEMPLATE.replace("{{- bos_token }}", '{{- bos_token + "Read slowly. " }}')
LONGEST_ROW = 600
"""Tokens, more than any row drawn here has."""
LARGEST_STREAM = 20_000
"""Bytes of a stream's state as JSON, far above any window drawn here."""


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
        # Draws with replacement may refuse the two bad rows of a source many times.
        max_refused=1.0,
        max_too_long=1.0,
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


def _require_mixture(config: DataConfig, state: dict[str, Any]) -> None:
    """Within a stage the amounts of a stream keep to the weights within 1 % and a conversation of each source.

    In a finite run they do so until the first source of the stream has ended.
    """
    if config.sources[0].weight is None or len(config.sources) < 2:
        return
    stages = [[source.weight or 0.0 for source in config.sources], *(stage.weights for stage in config.stages)]
    one = 1 if config.mix_by == "conversations" else LONGEST_ROW
    parsed = DataState.parse(state)
    rows = [source.rows for source in parsed.identity.sources]
    for number, stream in parsed.streams.items():
        if config.epochs is not None and any(
            size is None
            or drawn
            >= draws_of_stream(draws_of_source(size, source.repeat, config.epochs), number, len(parsed.streams))
            for size, drawn, source in zip(rows, stream.drawn, config.sources, strict=True)
        ):
            continue
        weights, total = stages[stream.stage], sum(stream.mixed)
        for weight, amount in zip(weights, stream.mixed, strict=True):
            assert abs(amount - total * weight / sum(weights)) <= 0.01 * total + one * len(weights), stream.mixed


def require_refused_if_edited(draw: random.Random, config: DataConfig, state: dict[str, Any]) -> None:
    """Change a random number of a state, or remove a random entry: the state is refused."""
    edited = draw.choice([tiny.plain, copy.deepcopy])(state)
    place, key = draw.choice(list(_places(edited)))
    if type(place[key]) in (int, float) and draw.random() < 0.8:
        place[key] += draw.choice([-1, 1, 10**6])
    elif isinstance(place[key], str) and draw.random() < 0.8:
        at = draw.randrange(len(place[key])) if place[key] else 0
        place[key] = f"{place[key][:at]}{draw.choice('x3')}" + place[key][at:]
    else:
        del place[key]
    with pytest.raises(
        ValueError, match=r"the state (was edited or|is) damaged|this is not a data state|reads formats"
    ):
        PackLoader(config, state=edited)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every entry of a state, as its holder and key."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def interrupted_step(draw: random.Random, loader: PackLoader) -> list[Pack]:
    """A step after a try that is interrupted somewhere, while a second thread asks for the state."""
    before, seen, done = loader.state_dict(), [], threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.append(loader.state_dict())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        with interrupt_after(draw.choice([30, 500, 6000])):
            packs = loader.next_step()
    except Interrupt:
        assert loader.state_dict() == before
        packs = loader.next_step()
    finally:
        done.set()
        thread.join()
    after = loader.state_dict()
    assert all(state in (before, after) for state in seen)
    return packs


def _check(number: int, tokenizer: str, corpora: list[dict[str, Any]]) -> None:
    draw = random.Random(f"{SEED}/{number}")
    config = _draw_config(draw, tokenizer, corpora)
    try:
        _check_config(draw, config)
    except (AssertionError, ValueError) as error:
        raise AssertionError(f"seed {SEED}, draw {number}: {config}: {error}") from error


def _check_config(draw: random.Random, config: DataConfig) -> None:
    whole = _reference(config, steps=draw.randint(3, 14))
    expected = [tiny.digests(step) for step in whole]
    done, state, hops = 0, None, []
    while done < len(expected):
        shards, workers = draw.randint(1, min(config.stream_count, 5)), draw.choice([0, 0, 0, 1, 2, 3])
        count = draw.randint(1, len(expected) - done)
        hops.append((shards, workers, count))
        if draw.random() < 0.3:
            loader = PackLoader(config, state=state)
            assert tiny.digests(interrupted_step(draw, loader)) == expected[done], f"interrupted after {hops}"
        digests, state = _steps(config, state, shards, workers, done, count)
        assert digests == expected[done : done + count], f"hops {hops}"
        assert max(len(json.dumps(stream)) for stream in tiny.plain(state)["streams"].values()) < LARGEST_STREAM
        _require_mixture(config, state)
        require_refused_if_edited(draw, config, state)
        done += count
    if config.epochs is not None:
        _require_each_row_once(draw, config, whole, state)


def _changed(draw: random.Random, config: DataConfig) -> DataConfig:
    """The config with another value of a setting, which the run accepts and which loses and repeats no row."""
    accepted = msgspec.structs.replace(config, accept_changed=("data",))
    streamed = any(source.streaming for source in config.sources)
    changes: list[dict[str, Any]] = [
        {"window": config.window + 3},
        {"global_batch": config.global_batch + 2},
        {"mix_by": draw.choice(["conversations", "tokens", "trained_tokens"])},
        {"tokenizer": msgspec.structs.replace(config.tokenizer, template=OTHER_TEMPLATE)},
    ]
    if not streamed:
        changes.append({"streams": config.stream_count % 5 + 1})
    if config.overflow != "split":
        changes += [{"capacity": config.capacity + 40}, {"train_turns": "last"}]
    return msgspec.structs.replace(accepted, **draw.choice(changes))


def _require_each_row_once(draw: random.Random, config: DataConfig, whole: list[list[Pack]], state: Any) -> None:
    """Each row of each epoch is given or listed once, at times over accepted changes of settings."""
    packs = [pack for step in whole for pack in step]
    loader = PackLoader(config, state=state)
    for _ in range(draw.choice([0, 1, 2])):
        config = _changed(draw, config)
        loader = PackLoader(config, state=loader.state_dict())
        packs += [pack for _ in range(draw.randint(0, 3)) if not loader.exhausted for pack in loader.next_step()]
    while not loader.exhausted:
        packs += loader.next_step()
    rows = Counter(segment.ref for pack in packs for segment in pack.segments if segment.part == 0)
    rows.update(Ref(refusal.source, refusal.row, refusal.epoch) for pack in packs for refusal in pack.refused)
    assert set(rows.values()) <= {1}
    if loader.total_rows is not None and config.ends_with == "all":
        assert rows.total() == loader.total_rows


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


@pytest.mark.parametrize("mix_by", ["conversations", "tokens", "trained_tokens"])
@pytest.mark.parametrize("number", range(3))
def test_a_random_run_with_a_source_of_refused_rows_is_an_error(
    number: int, mix_by: str, tokenizer: str, corpora: list[dict[str, Any]], tmp_path: Path
) -> None:
    draw = random.Random(f"{SEED}/bad/{number}")
    config = _draw_config(draw, tokenizer, corpora)
    weight = None if config.sources[0].weight is None else 1.0
    bad = SourceConfig(path=tiny.write_jsonl(tmp_path / "bad.jsonl", [{"text": "?"}] * 4), weight=weight)
    stages = tuple(msgspec.structs.replace(stage, weights=(*stage.weights, 1.0)) for stage in config.stages)
    config = msgspec.structs.replace(config, sources=(*config.sources, bad), stages=stages, mix_by=mix_by)
    loader = PackLoader(config)
    message = ""
    try:
        for _ in range(40):
            loader.next_step()
    except ValueError as error:
        message = str(error)
    # The streams of an unlucky draw come to their end before the first row of the source.
    drawn = sum(stream.drawn[-1] for stream in loader.state.streams.values())
    stopped = f"source {len(config.sources) - 1} holds no conversation to train" in message
    assert stopped or (drawn == 0 and not message), f"seed {SEED}, draw {number}: {config}: {message}"


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
