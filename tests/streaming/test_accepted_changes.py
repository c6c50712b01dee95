"""Random walks of accepted changes, topologies, interrupts, edited states and mixtures: each drawn row is given or listed
once an epoch, and refused changes change nothing."""

from __future__ import annotations

import copy
import json
import os
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_any_run import interrupted_step, require_refused_if_edited

from sftstream import ChatEncoder, DataConfig, DataState, Pack, PackLoader, Refused, Shard, merge
from sftstream.formats import parse_row

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.randrange(10**9))
DRAWS = 4
MORE_DRAWS = int(os.environ.get("SFTSTREAM_DRAWS") or 500)
CHANGES = ("append", "add", "rename", "edit", "setting", "mixture", "template")
OTHER_TEMPLATE = tiny.TEMPLATE.replace("{{- bos_token }}", '{{- bos_token + "Read slowly. " }}')


class Run:
    """A run whose files and settings change, with a record of everything given and listed."""

    def __init__(self, draw: random.Random, directory: Path, tokenizer: str) -> None:
        self.draw = draw
        self.directory = directory
        self.rows = 0
        directory.mkdir()
        for name in draw.sample("abcdef", draw.randint(1, 3)):
            self.write(name, self.more_rows(draw.randint(2, 25)))
        (directory / "shards").mkdir()
        for number in range(3):
            tiny.write_jsonl(directory / "shards" / f"{number}.jsonl", self.more_rows(6))
        indexed = {"path": f"{directory}/*.jsonl", "shuffle": draw.choice([None, True, False, "shards"])}
        sources = [indexed]
        if streamed := draw.random() < 0.3:
            indexed["weight"] = 2
            sources.append({"path": f"{directory}/shards", "streaming": True, "shuffle": "shards", "weight": 1})
        if draw.random() < 0.4:
            (directory / "more").mkdir()
            path = tiny.write_jsonl(directory / "more" / "rows.jsonl", self.more_rows(draw.randint(3, 20)))
            sources.append({"path": path, "weight": draw.choice([1, 3])})
            indexed["weight"] = 2
        self.streamed = streamed
        self.settings: dict[str, Any] = {
            "tokenizer": {"path": tokenizer},
            "sources": sources,
            "streams": draw.choice([1, 2, 4]),
            "global_batch": draw.choice([2, 4]),
            "capacity": draw.choice([96, 256]),
            "window": draw.choice([1, 5, 12]),
            "epochs": draw.randint(1, 4),
            "overflow": draw.choice(["drop", "truncate", "split"]),
            "history": draw.choice(["as_rendered", "as_rendered", "per_turn"]),
            "seed": draw.randint(0, 9),
            "mix_by": draw.choice(["conversations", "tokens", "trained_tokens"]),
        }
        self.given: Counter[tuple[str, int, int]] = Counter()
        self.listed: Counter[tuple[str, int]] = Counter()
        self.log: list[str] = []
        self.open(None)

    @property
    def in_parts(self) -> bool:
        return self.settings["overflow"] == "split" or self.settings["history"] == "per_turn"

    def config(self, accept: bool = False) -> DataConfig:
        return tiny.data_config(
            **self.settings, accept_changed=("data",) if accept else (), max_refused=1.0, max_too_long=1.0
        )

    def more_rows(self, count: int) -> list[dict[str, Any]]:
        """Rows with an id, some of them refused."""
        rows = []
        for row in tiny.rows(count, seed=self.draw.randrange(10**6)):
            rows.append({"id": self.rows} | (row if self.draw.random() < 0.9 else {"text": "?"}))
            self.rows += 1
        return rows

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        tiny.write_jsonl(self.directory / f"{name}.jsonl", rows)

    def read(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / f"{name}.jsonl").read_text().splitlines()]

    def names(self) -> list[str]:
        return sorted(path.stem for path in self.directory.glob("*.jsonl"))

    def open(self, state: Any) -> None:
        """Go on with some number of shards and workers."""
        config = self.config(accept=state is not None)
        shards, workers = self.draw.randint(1, min(config.stream_count, 3)), self.draw.choice([0] * 9 + [2])
        self.log.append(f"{shards} shards, {workers} workers")
        self.loaders = [PackLoader(config, shard=Shard(r, shards), workers=workers, state=state) for r in range(shards)]

    @property
    def going(self) -> bool:
        return not all(loader.exhausted for loader in self.loaders)

    def close(self) -> Any:
        """Return the state of all shards."""
        state = merge([loader.state_dict() for loader in self.loaders])
        for loader in self.loaders:
            loader.close()
        return state

    def record(self, loader: PackLoader, packs: list[Pack]) -> None:
        for pack in packs:
            for segment in pack.segments:
                self.given[_id(loader, segment.source, segment.row), segment.epoch, segment.part] += 1
            for refusal in pack.refused:
                self.listed[_id(loader, refusal.source, refusal.row), refusal.epoch] += 1

    def append(self) -> None:
        name = self.draw.choice(self.names())
        self.write(name, [*self.read(name), *self.more_rows(self.draw.randint(1, 9))])

    def add(self) -> None:
        free = [name for name in "abcdefgh" if name not in self.names()]
        if free:
            self.write(self.draw.choice(free), self.more_rows(self.draw.randint(1, 9)))

    def rename(self) -> None:
        free = [name for name in "abcdefgh" if name not in self.names()]
        if free:
            path = self.directory / f"{self.draw.choice(self.names())}.jsonl"
            path.rename(self.directory / f"{self.draw.choice(free)}.jsonl")

    def edit(self) -> None:
        name = self.draw.choice(self.names())
        rows = self.read(name)
        for i in self.draw.sample(range(len(rows)), min(len(rows), self.draw.randint(1, 6))):
            new = tiny.rows(1, seed=self.draw.randrange(10**6))[0] if self.draw.random() < 0.8 else {"text": "?"}
            rows[i] = {"id": rows[i]["id"]} | new
        self.write(name, rows)

    def setting(self) -> None:
        changes: dict[str, list[Any]] = {"window": [3, 8], "global_batch": [2, 6], "epochs": [4, 5]}
        if not self.streamed:
            changes["streams"] = [1, 3, 5]
        if not self.in_parts:
            changes |= {"capacity": [80, 300], "train_turns": ["all", "last"]}
        name = self.draw.choice(list(changes))
        self.settings[name] = self.draw.choice(changes[name])

    def mixture(self) -> None:
        self.settings["mix_by"] = self.draw.choice(["conversations", "tokens", "trained_tokens"])
        for source in self.settings["sources"]:
            if "weight" in source:
                source["weight"] = self.draw.choice([0.5, 1, 4])

    def template(self) -> None:
        self.settings["tokenizer"] = {**self.settings["tokenizer"], "template": OTHER_TEMPLATE}

    def change(self) -> None:
        state = self.close()
        if self.draw.random() < 0.5:
            require_refused_if_edited(self.draw, self.config(accept=True), state)
        for name in self.draw.choices(CHANGES, k=self.draw.randint(1, 3)):
            self.log.append(name)
            before = (copy.deepcopy(self.settings), {name: self.read(name) for name in self.names()})
            getattr(self, name)()
            try:
                PackLoader(self.config(accept=True), state=state)
            except ValueError as error:
                # Several changes at once may leave no way to tell the rows: the message says so.
                if not re.search("change one file at a time|grew, but not at its end|is gone, with rows", str(error)):
                    raise
                self.log.append("refused")
                self.restore(*before)
        self.open(state)

    def restore(self, settings: dict[str, Any], files: dict[str, list[dict[str, Any]]]) -> None:
        self.settings = settings
        for name in self.names():
            (self.directory / f"{name}.jsonl").unlink()
        for name, rows in files.items():
            self.write(name, rows)

    def take(self) -> None:
        """Take a step, at times on another topology or interrupted before."""
        if self.draw.random() < 0.3:
            self.open(self.close())
        for loader in self.loaders:
            interrupts = loader.workers == 0 and self.draw.random() < 0.1
            self.record(loader, interrupted_step(self.draw, loader) if interrupts else loader.next_step())

    def require_nothing_to_train(self, source: int, rows: int) -> None:
        """The source has so many rows, each refused or longer than a pack if it is encoded alone."""
        path = Path(self.settings["sources"][source]["path"])
        files = path.glob("*.jsonl") if path.is_dir() else path.parent.glob(path.name)
        lines = [line for file in files for line in file.read_text().splitlines()]
        assert len(lines) == rows
        tokenizer, config = self.settings["tokenizer"], self.config()
        encoder = ChatEncoder(tokenizer["path"], tokenizer.get("template"), policy=config)
        for line in lines:
            try:
                examples = encoder.encode_conversation(parse_row(json.loads(line)))
            except Refused:
                continue
            assert max(len(example.tokens) for example in examples) > config.capacity, line

    def require_once(self) -> None:
        """No row of an epoch was given or listed twice."""
        assert set(self.given.values()) <= {1}, self.given.most_common(1)
        if not self.in_parts:
            twice = {(row, epoch) for row, epoch, part in self.given if part} | (
                {(row, epoch) for row, epoch, _ in self.given} & set(self.listed)
            )
            assert not twice
            assert set(self.listed.values()) <= {1}

    def check(self) -> None:
        self.require_once()
        epochs = defaultdict(set)
        for row, epoch, *_ in (*self.given, *self.listed):
            epochs[row].add(epoch)
        end = self.settings["epochs"]
        first = {row: min(seen) for row, seen in epochs.items()}
        assert all(epochs[row] == set(range(first[row], max(end, max(epochs[row]) + 1))) for row in epochs)
        streams = DataState.parse(self.close()).streams.values()
        assert sum(sum(reasons.values()) for stream in streams for reasons in stream.refused) == self.listed.total()


def _id(loader: PackLoader, source: int, row: int) -> str:
    files: Any = loader.corpus.sources[source]
    return str(json.loads(files.read(row))["id"]) if hasattr(files, "read") else f"streamed {row}"


def _check(number: int, tmp_path: Path, tokenizer: str) -> list[str]:
    run = Run(random.Random(f"{SEED}/{number}"), tmp_path / str(number), tokenizer)
    try:
        try:
            _walk(run)
        except ValueError as error:
            # A draw may leave a source without one row that can be trained, and the run says so.
            found = re.match(r"source (\d+) holds no conversation to train: each of its (\d+) rows", str(error))
            if not found:
                raise
            run.require_nothing_to_train(int(found[1]), int(found[2]))
            run.require_once()
            run.log.append("nothing to train")
    except (AssertionError, ValueError) as error:
        raise AssertionError(f"seed {SEED}, draw {number}, {run.log}, {run.settings}: {error}") from error
    finally:
        for loader in run.loaders:
            loader.close()
    return run.log


def _walk(run: Run) -> None:
    """Change the run between steps, go on to its end, and check the rows that it gave and listed."""
    initial = [row["id"] for name in run.names() for row in run.read(name)]
    changes = run.draw.randint(1, 4)
    while run.going or changes:
        for _ in range(run.draw.randint(0, 6)):
            if run.going:
                run.take()
        if changes:
            changes -= 1
            run.change()
    run.check()
    begun = {row for row, epoch, *_ in (*run.given, *run.listed) if epoch == 0}
    assert {str(row) for row in initial} <= begun


def test_random_walks_of_changes_and_topologies_give_or_list_each_row_once_an_epoch(
    tmp_path: Path, tokenizer: str
) -> None:
    print(f"seed {SEED}")
    for number in range(DRAWS):
        _check(number, tmp_path, tokenizer)


@pytest.mark.slow
def test_hundreds_of_walks_of_changes_and_topologies(tmp_path: Path, tokenizer: str) -> None:
    print(f"seed {SEED}")
    logs = [log for number in range(1000, 1000 + MORE_DRAWS) for log in _check(number, tmp_path, tokenizer)]
    assert {*CHANGES} <= set(logs)
