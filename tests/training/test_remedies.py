"""Every remedy in a message that names a key is followed, and the error is gone."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import runs
import tiny
from test_imports import ORDER, files

from sftstream import PackLoader, Shard
from trainer.config import load_config


class Advice(NamedTuple):
    """A broken config, its message, and changes that the message advises, each to be tried alone."""

    broken: dict[str, str]
    message: str
    remedies: tuple[dict[str, str], ...]
    """Overrides; the value "-" takes the key away."""


STREAMED = {"data.sources": "[{path = 'rows.jsonl', streaming = true}]", "data.shuffle": "false"}
ADVICE = [
    Advice(
        {"data.shuffle": "true", "data.sources": STREAMED["data.sources"]},
        'set shuffle = "shards" to shuffle its',
        ({"data.shuffle": "'shards'"}, {"data.shuffle": "false"}),
    ),
    Advice({"data.capacity": "0"}, "capacity = 0 must be at least 1", ({"data.capacity": "256"},)),
    Advice({"data.window": "10000000000"}, "window = 10000000000 must be at most 131072", ({"data.window": "131072"},)),
    Advice(
        {"data.sources": "[{path = 'rows.jsonl', repeat = 2.0}]"},
        "repeat needs data.epochs; set data.epochs",
        ({"run.epochs": "2"}, {"data.sources": "[{path = 'rows.jsonl', weight = 2.0}]"}),
    ),
    Advice(
        {"data.sources": "[{path = 'rows.jsonl', columns = {}}]"},
        "name at least one column, or leave columns out",
        (
            {"data.sources": "[{path = 'rows.jsonl', columns = {messages = 'messages'}}]"},
            {"data.sources": "[{path = 'rows.jsonl'}]"},
        ),
    ),
    Advice(
        {"data.sources": "[{path = 'rows.jsonl', split = 'train'}]"},
        "has no meaning; leave split out",
        ({"data.sources": "[{path = 'rows.jsonl'}]"},),
    ),
    Advice(
        {"data.sources": "[{path = 'saved', split = 'train'}]"},
        "leave out split = 'train'",
        ({"data.sources": "[{path = 'saved'}]"},),
    ),
    Advice(
        {"data.sources": "[{path = 'splits'}]"},
        "set split to one of 'a', 'b'",
        ({"data.sources": "[{path = 'splits', split = 'a'}]"}, {"data.sources": "[{path = 'splits', split = 'b'}]"}),
    ),
    Advice(
        {"data.sources": "[{path = 'empty'}]"},
        "name files in subdirectories by a glob, or set split",
        ({"data.sources": "[{path = 'empty/*/*.jsonl'}]"},),
    ),
    Advice({"data.streams": "1"}, "raise data.streams to 2 or more", ({"data.streams": "2"},)),
    Advice(
        {"data.tokenizer": "{path = 'words', template = 'name:nothing'}"},
        "set the path of a file: template = ",
        ({"data.tokenizer": "{path = 'words', template = 'chat.jinja'}"},),
    ),
    Advice(
        {"data.tokenizer": "{path = 'words', template = 'dated.jinja'}"},
        'set data.tokenizer.date = "',
        ({"data.tokenizer": "{path = 'words', template = 'dated.jinja', date = '2025-01-31'}"},),
    ),
    Advice({"run": "{device = 'cpu'}"}, "neither steps nor epochs is given", ({"run.steps": "3"}, {"run.epochs": "3"})),
    Advice(
        {"checkpoint.root": "''"},
        "name a directory or URL, or leave root out",
        ({"checkpoint.root": "'x'"}, {"checkpoint.root": "-"}),
    ),
    Advice(
        {"checkpoint.keep_best": "1"},
        "add a [validation] table",
        ({"validation": "{sources = [{path = 'rows.jsonl'}], every = 2}"},),
    ),
    Advice(
        {"schedule": "{kind = 'cosine', over = 'data'}"},
        'set run.epochs, or schedule.over = "steps"',
        ({"run.epochs": "2"}, {"schedule.over": "'steps'"}),
    ),
    Advice(
        {"schedule": "{kind = 'cosine', over = 'data', steps = 5}", "run.epochs": "2"},
        "remove steps, or set over",
        ({"schedule": "{kind = 'cosine', over = 'data'}"}, {"schedule.over": "'steps'"}),
    ),
    Advice(
        {"schedule": "{kind = 'cosine'}", "run": "{device = 'cpu', epochs = 2}"},
        'set schedule.over = "data" or schedule.steps',
        ({"schedule.over": "'data'"}, {"schedule.steps": "9"}),
    ),
    Advice({"model.resize_vocabulary": "true"}, "set vocab_size instead", ({"model.resize_vocabulary": "-"},)),
    Advice({"data.epochs": "2"}, "data.epochs is set by run.epochs", ({"data.epochs": "-", "run.epochs": "2"},)),
]

ELSEWHERE = {
    "sftstream/rendering/": "tests/rendering",
    "sftstream/streaming/": "tests/streaming",
    "sftstream/tokenization/": "tests/tokenization",
    "trainer/checkpointing/": "tests/training",
    "trainer/reporting/": "tests/training",
    "trainer/llama/": "tests/llama",
    "trainer/training/": "tests/training",
    "trainer/distributed/": "tests/training",
    "trainer/choices.py": "tests/training/test_gpu.py",
    "sftstream/rebase.py": "tests/streaming",
}
"""Places of messages that need a run, and the tests that follow their remedies."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets

    directory = tmp_path_factory.mktemp("remedies")
    tiny.save_tokenizer(directory / "words")
    (directory / "chat.jinja").write_text(tiny.TEMPLATE)
    (directory / "dated.jinja").write_text(tiny.DATED_TEMPLATE)
    tiny.write_jsonl(directory / "rows.jsonl", tiny.rows(40))
    (directory / "empty/inner").mkdir(parents=True)
    tiny.write_jsonl(directory / "empty/inner/rows.jsonl", tiny.rows(20))
    rows = datasets.Dataset.from_list(tiny.rows(20))
    rows.save_to_disk(str(directory / "saved"))
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(str(directory / "splits"))
    return directory


def start(place: Path, changes: dict[str, str]) -> None:
    """Load the config and read a pack of the first of two shards."""
    config = runs.run_config("words", "rows.jsonl", data={"streams": 4})
    kept = [f"{key}={value}" for key, value in changes.items() if value != "-"]
    path = place / "run.toml"
    path.write_text("".join(f"{name} = {runs.toml(table)}\n" for name, table in config.items()))
    data = load_config(path, kept).data
    loader = PackLoader(data, shard=Shard(0, 2), workers=0)
    try:
        next(loader)
    finally:
        loader.close()


@pytest.mark.parametrize("advice", ADVICE, ids=[advice.message[:40] for advice in ADVICE])
def test_an_advice_that_is_followed_ends_the_error(place: Path, monkeypatch: Any, advice: Advice) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(ValueError, match=re.escape(advice.message)):
        start(place, advice.broken)
    for remedy in advice.remedies:
        start(place, {**advice.broken, **remedy})


NAMED = re.compile(
    r"(?:\bset|\braise|\blower|\bleave out|\badd) (?:(?:run|data|model|schedule|optimizer|checkpoint|validation)\.)?[a-z_]+"
    r"(?:\.[a-z_]+)*(?: =| to| out)|\bset (?:run|data|model|schedule|optimizer|checkpoint)\.[a-z_.]+"
)


def advice_in_code() -> list[tuple[str, str]]:
    """Return each advice of a message that names a key, with the file of the message."""
    found = []
    for package in ORDER:
        for path in files(package).values():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Raise) and node.exc is not None:
                    texts = [
                        n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant) and type(n.value) is str
                    ]
                    relative = str(path).partition(f"/{package}/")[2]
                    found += [(f"{package}/{relative}", match[0]) for text in texts for match in NAMED.finditer(text)]
    return found


def test_every_advice_of_a_config_or_a_source_is_in_the_table() -> None:
    advised = advice_in_code()
    assert len(advised) > 10
    messages = " | ".join(advice.message for advice in ADVICE)
    for file, words in advised:
        if not any(file.startswith(prefix) for prefix in ELSEWHERE):
            assert words in messages, f"{file}: no test follows {words!r}; add a row to ADVICE"
